"""AppendedKeys: keys and values that belong to no token, as ``add_bias_kv`` and ``add_zero_attn`` make them.

Legend: B batch, Hk key heads, Q queries, K keys, N appended keys, D key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.checks import require
from eotattn.priors.memory import is_plain

__all__ = ["AppendedKeys"]


class AppendedKeys(nn.Module):
    """A learned key and value, a key and value of zeros, or both: something to attend to instead of any token.

    They stand before the first token, at positions -N to -1, so that every causal query sees them and a window leaves
    them behind. A :class:`~eotattn.priors.TokenPrior` is zero there: their mass is up to the content.

    Args:
        num_kv_heads: Key heads Hk.
        key_width: Width D of a key.
        value_width: Width V of a value.
        learned: Whether there is a learned key (``bias_k``, ``bias_v`` of ``nn.MultiheadAttention``).
        zero: Whether there is a key of zeros (``add_zero_attn``).
        make: ``device`` and ``dtype`` of the parameters.

    Attributes:
        key: (Hk, 1, D), or ``None``.
        value: (Hk, 1, V), or ``None``.
        count: Appended keys N.

    Example:
        >>> AppendedKeys(2, 4, 4, learned=True, zero=True)(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))[0].shape
        torch.Size([1, 2, 5, 4])
    """

    def __init__(
        self, num_kv_heads: int, key_width: int, value_width: int, *, learned: bool, zero: bool, **make: Any
    ) -> None:
        super().__init__()
        self.learned, self.zero, self.count = learned, zero, int(learned) + int(zero)
        self.key = nn.Parameter(torch.empty(num_kv_heads, 1, key_width, **make)) if learned else None
        self.value = nn.Parameter(torch.empty(num_kv_heads, 1, value_width, **make)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with the variance that ``nn.MultiheadAttention`` gives its own, 1 / (Hk * width)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter[:, 0].numel() ** -0.5)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the appended ones before keys (B, Hk, K, D) and values (B, Hk, K, V)."""
        return self._before(key, self.key), self._before(value, self.value)

    def _before(self, side: Tensor, learned: Tensor | None) -> Tensor:
        parts = [side]
        if self.zero:
            parts.insert(0, side.new_zeros(()).expand(*side.shape[:2], 1, side.shape[3]))
        if learned is not None:
            parts.insert(0, learned.to(side.dtype).expand(side.shape[0], -1, -1, -1))
        return torch.cat(parts, dim=2)

    def positions(self, owner: str, keys: Tensor | range | None, length: int, device: torch.device) -> Tensor | range:
        """Positions of all keys, given those of the ``length`` keys of tokens, which count from 0.

        Raises:
            ValueError: If tokens lie where the appended keys do; on a GPU only ranges are looked at.
        """
        if keys is None and torch.compiler.is_compiling():  # a range would hold a graph to this length
            return torch.arange(-self.count, length, device=device)
        keys = range(length) if keys is None else keys
        rule, remedy = "count from 0 beside appended keys", "Shift the positions of both sides"
        if isinstance(keys, range):
            require(keys.start >= 0, owner, "key_positions", rule, keys, remedy)
            if keys.start == 0:
                return range(-self.count, keys.stop)
            keys = torch.arange(keys.start, keys.stop, device=device)
        elif keys.device.type == "cpu" and is_plain():
            require(not bool((keys < 0).any()), owner, "key_positions", rule, keys, remedy)
        before = torch.arange(-self.count, 0, device=device)
        return torch.cat([before.expand(*keys.shape[:-1], -1), keys], dim=-1)

    def widen(self, mask: Tensor | None, keys: int, *, visible: bool) -> Tensor | None:
        """A mask (..., Q, K) or (B, K) with these keys visible to every query.

        Args:
            mask: Boolean, or floating and added.
            keys: Keys K of tokens, where the mask broadcasts over them.
            visible: What a boolean mask says of a key that may be attended to.
        """
        if mask is None:
            return None
        mask = torch.atleast_2d(mask)
        every = mask.expand(*mask.shape[:-1], keys) if mask.shape[-1] == 1 else mask
        return functional.pad(every, (self.count, 0), value=visible and mask.dtype == torch.bool)

    def widen_bias(self, bias: Tensor | None) -> Tensor | None:
        """A bias of keys (B, heads, K), zero at these keys."""
        return None if bias is None else functional.pad(bias, (self.count, 0))

    def last(self, weights: Tensor) -> Tensor:
        """Weights (B, H, Q, K) with the appended keys last, as ``nn.MultiheadAttention`` returns them."""
        return weights.roll(-self.count, dims=-1)
