"""The LogPrior contract, and its algebra: sums and multiples.

Legend: B batch, H heads, Q queries, K keys, C coordinates.

A prior is one formula, :meth:`LogPrior.evaluate`. Its dense form and its FlexAttention form follow from it; a prior
that is an inner product adds :meth:`LogPrior.expansions` or :meth:`LogPrior.factors`, and its lanes follow from that.
Dense forms add, lanes concatenate, score modifications chain.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int, require
from eotattn.priors.expansion import Expansion
from eotattn.priors.lanes import LaneFactors, Lanes, computing_dtype
from eotattn.priors.positions import check_positions, constants, pair_positions, position_lookup

__all__ = ["LogPrior", "ScaledPrior", "ScoreMod", "SumPrior"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class LogPrior(nn.Module):
    """A log-prior over keys for every head and query: attention is softmax(score + log_prior).

    A subclass writes :meth:`evaluate`, :meth:`reset_parameters` and, where the prior is an inner product of a query
    feature and a key feature, one more: :meth:`expansions` if it is linear in its learned numbers, else
    :meth:`factors`. Parameters and buffers keep their dtype (fp32, fixed slopes fp64) whatever dtype the surrounding
    model is cast to.

    Args:
        num_heads: Number of query heads H.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> RecencyPrior(1).dense(torch.arange(3), torch.arange(3))
        tensor([[[ 0.0000,  0.0039,  0.0078],
                 [-0.0039,  0.0000,  0.0039],
                 [-0.0078, -0.0039,  0.0000]]], grad_fn=<ToCopyBackward0>)
    """

    #: Numbers that make a position: 1 on a sequence, 2 on a grid.
    num_coordinates: int = 1

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = check_positive_int(type(self).__name__, "num_heads", num_heads)

    @abstractmethod
    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior of one (head, query position, key position), in nats, elementwise.

        Args:
            head: Integer tensor, broadcastable with the positions.
            query_position: Floating tensor, tokens; on grids with a trailing axis of C coordinates.
            key_position: The same for the key.

        Returns:
            Tensor of the broadcast shape. Computation is in the dtype of the positions.
        """
        raise NotImplementedError

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The log-prior as inner products that lanes are made from; by default its :meth:`expansions` multiplied out.

        Args:
            query_positions: (Q,) or (B, Q), with a trailing axis C on grids.
            key_positions: (K,) or (B, K), likewise.
            dtype: The kernel's dtype; factors come in float64 for float64, else in float32.

        Raises:
            NotImplementedError: If the prior has no finite factorisation.
        """
        parts = self.expansions(dtype)
        if parts is None:
            raise NotImplementedError(
                f"{type(self).__name__}.lanes: this prior is not a finite inner product of query and key features. "
                f"Use backend='reference' or 'flex', or a prior with lanes."
            )
        each = (part.factors(query_positions, key_positions, dtype=dtype) for part in parts)
        return tuple(factor for factors in each for factor in factors)

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...] | None:
        """The log-prior as learned numbers against fixed features: lanes that a GPU kernel can multiply out.

        A prior that is linear in its learned numbers states this and nothing else; one that is not states
        :meth:`factors`. ``None``, the default, says that there is no such form.

        Args:
            dtype: The kernel's dtype.
        """
        return None

    @property
    def has_lanes(self) -> bool:
        """Whether the prior is a finite inner product, so that any fused kernel can carry it."""
        stated, base = type(self), LogPrior
        return stated.factors is not base.factors or stated.expansions is not base.expansions

    def num_lanes(self, dtype: torch.dtype = torch.float32, num_kv_heads: int | None = None) -> int:
        """Number of lanes P that the prior occupies in a kernel of ``dtype``.

        Args:
            dtype: The kernel's dtype.
            num_kv_heads: Key heads, by default H; fewer need more lanes (:meth:`Lanes.grouped`).
        """
        shape = (1,) if self.num_coordinates == 1 else (1, self.num_coordinates)
        zero = torch.zeros(shape, dtype=torch.int64, device=self._device())
        group = 1 if num_kv_heads is None else self.num_heads // num_kv_heads
        parts = self.factors(zero, zero, dtype=dtype)
        return sum(part.num_lanes(dtype) * (1 if part.key.shape[-3] == 1 else group) for part in parts)

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The log-prior of every pair: the truth that other forms are measured against.

        Args:
            query_positions: (Q,) or (B, Q), tokens; with a trailing axis C on grids.
            key_positions: (K,) or (B, K), likewise.
            dtype: float32 or float64. Positions and phases are always computed in float64.

        Returns:
            (H, Q, K), or (B, H, Q, K) where a position has a batch axis, in nats.

        Raises:
            ValueError: If the positions are empty or of the wrong shape.
        """
        self.check_positions(query_positions, key_positions)
        query, key = pair_positions(query_positions, key_positions, self.num_coordinates)
        head = torch.arange(self.num_heads, device=query.device)[:, None, None]
        return self.evaluate(head, query, key).to(computing_dtype(dtype))

    def lanes(
        self,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        dtype: torch.dtype,
        terms: int | None = None,
        query_scale: float = 1.0,
    ) -> Lanes:
        """Query and key lanes whose inner product is the log-prior up to a constant of each row.

        Args:
            query_positions: (Q,) or (B, Q), tokens; with a trailing axis C on grids.
            key_positions: (K,) or (B, K), likewise.
            dtype: The kernel's dtype.
            terms: Numbers of ``dtype`` that a factor is split into; by default one for float32 and float64, two or
                three for 16-bit dtypes.
            query_scale: Factor on the query lanes, applied before rounding; kernels that multiply by ``scale`` need its
                inverse here.

        Returns:
            :class:`Lanes` with query (..., H, Q, P), key (..., 1 or H, K, P) and ``error_bound`` in nats.

        Raises:
            NotImplementedError: If the prior has no lanes.
        """
        self.check_positions(query_positions, key_positions)
        factors = self.factors(query_positions, key_positions, dtype=dtype)
        return Lanes.from_factors(factors, dtype=dtype, terms=terms, query_scale=query_scale)

    def score_mod(self, query_positions: Tensor | None = None, key_positions: Tensor | None = None) -> ScoreMod:
        """The FlexAttention form: a function (score, batch, head, query_index, key_index) -> score + log_prior.

        Args:
            query_positions: Positions of the queries as in :meth:`dense`; by default the index itself.
            key_positions: Positions of the keys, likewise.
        """
        given = query_positions is not None and key_positions is not None
        if self.num_coordinates > 1 or given:
            self.check_positions(query_positions, key_positions)
        query_at = position_lookup(query_positions, self.num_coordinates)
        key_at = position_lookup(key_positions, self.num_coordinates)

        def modified(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            log_prior = self.evaluate(head, query_at(batch, query_index), key_at(batch, key_index))
            return score + log_prior.to(score.dtype)

        return modified

    def reset_parameters(self) -> None:
        """Put parameters and buffers back to their start (also after ``to_empty`` on a meta-device module)."""

    def fill_constants(self) -> None:
        """Compute buffers that the constructor determines; they are in no state dict, so that no file can bend them."""

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.fill_constants()

    def freeze(self) -> LogPrior:
        """Stop training this prior; returns the prior itself."""
        self.requires_grad_(False)
        return self

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both are positions that this prior understands."""
        for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
            check_positions(type(self).__name__, name, positions, self.num_coordinates)

    def __add__(self, other: LogPrior) -> SumPrior:
        return SumPrior(self, other) if isinstance(other, LogPrior) else NotImplemented

    def __mul__(self, factor: float | Sequence[float]) -> ScaledPrior:
        return ScaledPrior(self, factor) if isinstance(factor, (int, float, tuple, list)) else NotImplemented

    __rmul__ = __mul__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the dtype: a prior is exact or it is nothing."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _device(self) -> torch.device:
        tensors = [*self.parameters(), *self.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")


def check_prior(owner: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is a :class:`LogPrior`."""
    is_prior = isinstance(value, LogPrior)
    require(is_prior, owner, argument, "be a LogPrior", value, "See eotattn.priors", error=TypeError)


class SumPrior(LogPrior):
    """The sum of log-priors, i.e. the product of priors. Written ``a + b``; nested sums are flattened.

    Args:
        parts: At least one prior; all with the same number of heads and coordinates.

    Attributes:
        parts: The summands, in order.

    Example:
        >>> from eotattn.priors import RecencyPrior, SinkPrior
        >>> len((RecencyPrior(2) + SinkPrior(2) + SinkPrior(2)).parts)
        3
    """

    parts: Sequence[LogPrior]

    def __init__(self, *parts: LogPrior) -> None:
        require(len(parts) > 0, "SumPrior", "parts", "hold at least one prior", parts, "Pass the priors to add")
        for part in parts:
            check_prior("SumPrior", "parts", part)
        flat = [leaf for part in parts for leaf in (part.parts if isinstance(part, SumPrior) else [part])]
        super().__init__(flat[0].num_heads)
        for part in flat:
            for name in ("num_heads", "num_coordinates"):
                ours, theirs = getattr(flat[0], name), getattr(part, name)
                require(ours == theirs, "SumPrior", "parts", f"agree in {name}", (ours, theirs), "Rebuild one of them")
        self.num_coordinates = flat[0].num_coordinates
        self.parts = cast("Sequence[LogPrior]", nn.ModuleList(flat))

    @property
    def has_lanes(self) -> bool:
        """Whether every summand has lanes."""
        return all(part.has_lanes for part in self.parts)

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The sum of the parts, in nats."""
        values = [part.evaluate(head, query_position, key_position) for part in self.parts]
        return torch.stack(torch.broadcast_tensors(*values)).sum(0) if len(values) > 1 else values[0]

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The factors of all parts."""
        each = (part.factors(query_positions, key_positions, dtype=dtype) for part in self.parts)
        return tuple(factor for factors in each for factor in factors)

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...] | None:
        """The expansions of all parts, if each has them."""
        each = [part.expansions(dtype) for part in self.parts]
        known = [part for part in each if part is not None]
        return tuple(one for part in known for one in part) if len(known) == len(each) else None

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless every part understands both positions."""
        super().check_positions(query_positions, key_positions)
        for part in self.parts:
            part.check_positions(query_positions, key_positions)

    def reset_parameters(self) -> None:
        """Reset every part."""
        for part in self.parts:
            part.reset_parameters()


class ScaledPrior(LogPrior):
    """A prior times a fixed number, or one a head. Written ``0.5 * prior``; the numbers travel in the state dict.

    Heads whose factor is zero are without the prior: ``prior * (1.0, 1.0, 0.0)`` leaves the third head uniform. A key
    that the prior makes inadmissible (-inf) stays so, whatever the factor.

    Args:
        prior: The prior to scale; stays trainable.
        factor: Finite, dimensionless; or H of them.

    Attributes:
        factor: (H,) the numbers, one a head.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> prior = 0.5 * RecencyPrior(8)
        >>> prior.dense(torch.tensor([1]), torch.tensor([0]))[0].item()
        -0.25
    """

    def __init__(self, prior: LogPrior, factor: float | Sequence[float]) -> None:
        check_prior("ScaledPrior", "prior", prior)
        super().__init__(prior.num_heads)
        numbers = [factor] * self.num_heads if isinstance(factor, (int, float)) else factor
        finite = all(isinstance(number, (int, float)) and abs(number) < float("inf") for number in numbers)
        good, rule = finite and len(numbers) == self.num_heads, f"be a finite number, or {self.num_heads} of them"
        require(good, "ScaledPrior", "factor", rule, factor, "Pass Python floats")
        self.num_coordinates = prior.num_coordinates
        self.prior = prior
        self.factor = self._initial_factor = tuple(float(number) for number in numbers)

    @property
    def has_lanes(self) -> bool:
        """Whether the scaled prior has lanes."""
        return self.prior.has_lanes

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The scaled log-prior, in nats."""
        value = self.prior.evaluate(head, query_position, key_position)
        scaled = constants(self.factor, value.device).to(value.dtype)[head] * value
        return torch.where(value == float("-inf"), value, scaled)  # times zero it would be NaN, times -1 a sole key

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The factors of the prior, scaled on the side that is not exact."""
        return tuple(self._scaled(part) for part in self.prior.factors(query_positions, key_positions, dtype=dtype))

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...] | None:
        """The expansions of the prior with their coefficients scaled."""
        parts = self.prior.expansions(dtype)
        if parts is None:
            return None
        scales = [tuple(map(mul, self.factor, part.scale)) for part in parts]
        return tuple(replace(part, scale=scale) for part, scale in zip(parts, scales, strict=True))

    def _scaled(self, part: LaneFactors) -> LaneFactors:
        factor = constants(self.factor, part.query.device).to(part.query.dtype)[:, None, None]
        row = None if part.row is None else factor[..., 0] * part.row
        if part.exact == "query":
            return replace(part, key=factor * part.key, row=row)
        return replace(part, query=factor * part.query, row=row)

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless the scaled prior understands both positions."""
        self.prior.check_positions(query_positions, key_positions)

    def reset_parameters(self) -> None:
        """Reset the prior and restore the factors given at construction."""
        self.prior.reset_parameters()
        self.factor = self._initial_factor

    def get_extra_state(self) -> Tensor:
        """The factors, for the state dict."""
        return torch.tensor(self.factor, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the factors out of a state dict."""
        self.factor = tuple(state.double().tolist())
