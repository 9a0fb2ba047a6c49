"""StaticCache: a cache that counts its tokens on the device, so that one recorded graph is every step.

Legend: B batch, Hk key heads, S slots, L new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.cache import CacheView, KeyValueCache
from eotattn.attention.slot_products import SlotProducts
from eotattn.attention.slots import put
from eotattn.checks import require
from eotattn.compat import lasting
from eotattn.kernels import sdpa
from eotattn.priors.terms import Term

__all__ = ["StaticCache"]

OWNER = "StaticCache"


class StaticCache(KeyValueCache):
    """A :class:`KeyValueCache` for ``torch.compile(step, mode="reduce-overhead", fullgraph=True)``.

    Inside a compiled graph, or while a CUDA graph is captured, the number of tokens is a number on the device. A step
    writes into its slot in place and attends to all slots: a lane hides those that are free, so a stock kernel needs no
    mask, and nothing waits for the host. Outside of graphs it is the other cache: read the prompt there, as fast as
    ever; rolling back (``crop``) and beams (``reorder``) are done there too.

    In graphs: a step of several tokens, a window, or another prior than the cache's costs a mask or lanes of all slots.
    New tokens are never padding, a bias of keys or a prior that reads tokens begins with the prompt, and the caller
    sees to it that slots suffice: a step beyond them writes nothing, but on a GPU it is a failed assertion of a kernel,
    after which the process can use the GPU no more. Attention masks have a column for each of the S slots. For
    inference.

    Args:
        arguments: Those of :class:`KeyValueCache`.
        keywords: Likewise.

    Example:
        >>> from eotattn import PriorAttention
        >>> from eotattn.priors import RecencyPrior
        >>> layer, x = PriorAttention(8, 2, prior=RecencyPrior(2)).eval(), torch.ones(1, 5, 8)
        >>> cache = layer.make_cache(1, 64, is_static=True)
        >>> attend = lambda x: layer(x, is_causal=True, need_weights=False, cache=cache)[0]
        >>> with torch.no_grad():
        ...     prompt, step = attend(x), torch.compile(attend, fullgraph=True, backend="eager")
        ...     shape = step(x[:, :1]).shape
        >>> shape, cache.length
        (torch.Size([1, 1, 8]), 6)
    """

    @torch.inference_mode(False)
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._products: SlotProducts | None = None
        self._count = torch.zeros(1, dtype=torch.int64, device=keywords.get("device"))
        super().__init__(*arguments, **keywords)
        self._make_ready()

    @property
    def length(self) -> int:
        """Slots filled so far; waits for the device."""
        self._refuse_in_graphs("length", "be read or changed")
        return int(self._count)

    @property
    def kept(self) -> Tensor | None:
        """(B, N) float64, what was kept of the last token, or ``None`` in an empty cache."""
        if self.counts_on_host:
            return super().kept
        if self._kept is None:
            return None
        last = self._kept.index_select(2, (self._count - 1).clamp(min=0)).squeeze(2)
        return torch.where(self._count > 0, last, 0.0)

    def keep(self, numbers: Tensor) -> None:
        """Keep (B, N, L) numbers of the L tokens that were appended last."""
        if self._kept is None:
            self._refuse_in_graphs("prior", "have read a prompt")
        super().keep(numbers)
        self._make_ready()

    @property
    def counts_on_host(self) -> bool:
        """Whether the number of tokens is known on the host, as it is outside of graphs."""
        if torch.compiler.is_compiling():
            return False
        return not (self._count.is_cuda and torch.cuda.is_current_stream_capturing())

    def has_room(self, count: int) -> bool:
        """Whether ``count`` more tokens fit; in graphs the caller sees to it."""
        return not self.counts_on_host or super().has_room(count)

    def next_positions(self, count: int, padding: Tensor | None = None) -> Tensor | range:
        """Positions that the next ``count`` tokens will have; in graphs a tensor, (L,) or (B, L)."""
        if self.counts_on_host:
            return super().next_positions(count, padding)
        remedy = "Append padding outside of them"
        require(padding is None, OWNER, "key_padding_mask", "be left out in graphs", padding, remedy)
        at = self._next(count)
        return self._positions.index_select(1, at) if self._has_padding else self.first_position + at

    def after(
        self, key: Tensor, value: Tensor, padding: Tensor | None = None, key_bias: Tensor | None = None
    ) -> CacheView:
        """What :meth:`append` would make of the cache; in graphs all slots, of which the free ones are padding."""
        if self.counts_on_host:
            return super().after(key, value, padding, key_bias)
        self._check_new(key, value, key_bias)
        count = key.shape[-2]
        new = self.next_positions(count, padding)
        hidden = self._padding | (self._slot_numbers() >= self._count + count)
        of_keys = self._positions if self._has_padding else self._positions[0]
        bias = None if key_bias is None else self._key_bias
        return CacheView(self.keys, self.values, new, of_keys, hidden, bias)

    def fill(
        self,
        positions: Tensor | range,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor | range:
        """:meth:`append` what :meth:`after` has let through, at the positions that it gave."""
        positions = super().fill(positions, key, value, padding, key_bias)
        self._make_ready()
        return positions

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` slots; outside of graphs."""
        super().crop(length)
        self._make_ready()

    def reorder(self, samples: Tensor) -> None:
        """Let sample b continue what sample ``samples[b]`` was; outside of graphs."""
        super().reorder(samples)
        self._make_ready()

    # Where tokens go ------------------------------------------------------------------------------------------------

    @property
    def _filled(self) -> slice:
        return super()._filled if self.counts_on_host else slice(self.max_length)

    @property
    def _is_empty(self) -> bool:
        return self.counts_on_host and super()._is_empty

    @property
    def _hides_slots(self) -> bool:
        return True

    def _last(self, count: int) -> slice | Tensor:
        return super()._last(count) if self.counts_on_host else self._next(count) - count

    def _next(self, count: int) -> Tensor:
        """The slots of the next ``count`` tokens."""
        return self._count + torch.arange(count, device=self._count.device)

    def _hidden(self, start: int) -> Tensor:
        return (self._padding | (self._slot_numbers() >= self._count))[:, start:]

    def _set_length(self, length: int) -> None:
        first, last = sorted((self.length, length))
        hidden = sdpa.far_lane(self._keys.dtype, scale=self.scale) if length == first else 0.0
        self._keys.beside[:, :, first:last, self._num_lanes] = hidden
        self._count.fill_(length)

    def _write(self, key: Tensor, value: Tensor, key_bias: Tensor | None) -> None:
        if self.counts_on_host:
            return super()._write(key, value, key_bias)
        at, beside, last = self._next(key.shape[2]), self._keys.beside, self._num_lanes
        parts = [beside.index_select(2, at)[..., :last]]
        if key_bias is not None and self._key_bias is not None:
            bias = key_bias.detach().double()
            put(self._key_bias, at, bias)
            of_bias = self._bias_lanes(at, bias)
            parts = [parts[0][..., : last - of_bias.shape[-1]], of_bias.expand(*parts[0].shape[:-1], -1)]
        lanes = functional.pad(torch.cat(parts, dim=-1), (0, beside.shape[-1] - last))  # zero: no longer hidden
        self._keys.write_rows(at, key.detach(), lanes)
        self._values.write_rows(at, value.detach(), lanes.new_zeros((*value.shape[:-1], self._values.beside.shape[-1])))
        self._count.add_(key.shape[2])
        return None

    def _beside(self, query: Tensor, at: slice | Tensor, gains: Sequence[Tensor | None]) -> Tensor:
        if isinstance(at, slice) or self._plan is None or self._products is None or gains:
            return super()._beside(query, at, gains)
        each = [term.coefficients for term in self._terms() if isinstance(term, Term)]
        coefficients = torch.cat(each, dim=1).squeeze(-1).double()
        lanes = self._products.lanes(coefficients, at, self._plan.query.depth, query.dtype)
        far, spare = (
            sdpa.far_lift(query.dtype, scale=self.scale),
            self._keys.width - self.key_width - self._num_lanes - 1,
        )
        parts = [query, lanes.expand(*query.shape[:-1], -1), query.new_full((), far).expand(*query.shape[:-1], 1)]
        return functional.pad(torch.cat(parts, dim=-1), (0, spare))

    def _slot_numbers(self) -> Tensor:
        return torch.arange(self.max_length, device=self._count.device)

    def _make_ready(self) -> None:
        """Outside of graphs, make what a graph would have to, and let graphs read and write it all where it lies."""
        if not self.counts_on_host:
            return
        if self._plan is not None and self._query_table is None:
            with torch.inference_mode(False):
                self._query_table = self._plan.table("query", self._slot_positions(), self._origin)
                self._products = SlotProducts.of(self._plan.query, self._query_table)
        of_queries = () if self._products is None else self._products
        numbers = (
            *of_queries,
            self._count,
            self._padding,
            self._positions,
            self._query_table,
            self._key_bias,
            self._kept,
        )
        for tensor in (*numbers, *self._keys.tensors(), *self._values.tensors()):
            lasting(tensor)

    def _refuse_in_graphs(self, argument: str, rule: str) -> None:
        remedy = "Do it between steps"
        require(self.counts_on_host, OWNER, argument, f"{rule} outside of graphs", "a graph", remedy)
