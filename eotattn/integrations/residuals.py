"""Norms of the residual stream after every block of a model, while it runs.

Legend: N sequences, L tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Residuals", "residuals"]


#: Names of the lists of :class:`Residuals`.
KINDS = ("first_token", "other_tokens", "largest", "median", "largest_at")


@dataclass(eq=False)
class Residuals:
    """Norms by block, one entry a sequence.

    Attributes:
        first_token: Name -> norms of the first token.
        other_tokens: Name -> mean norms of all other tokens.
        largest: Name -> largest |x|.
        median: Name -> median |x|.
        largest_at: Name -> position of the token that has the largest |x|.
    """

    first_token: dict[str, list[float]] = field(default_factory=dict)
    other_tokens: dict[str, list[float]] = field(default_factory=dict)
    largest: dict[str, list[float]] = field(default_factory=dict)
    median: dict[str, list[float]] = field(default_factory=dict)
    largest_at: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, hidden: Tensor) -> None:
        """Add the output (N, L, E) of a block."""
        hidden = hidden.detach().float()
        norms, size = hidden.norm(dim=-1), hidden.abs()
        by_token = size.amax(-1)
        numbers = {
            "first_token": norms[:, 0],
            "other_tokens": norms[:, 1:].mean(-1),
            "largest": by_token.amax(-1),
            "median": size.flatten(1).median(-1).values,
            "largest_at": by_token.argmax(-1),
        }
        for kind, values in numbers.items():
            getattr(self, kind).setdefault(name, []).extend(values.tolist())

    @property
    def blocks(self) -> list[str]:
        """Names, in the order of the first call."""
        return list(self.first_token)

    def massive_share(self, *, size: float = 100.0, ratio: float = 1000.0) -> dict[str, float]:
        """Name -> share of sequences with a massive activation: |x| above ``size`` and ``ratio`` times the median.

        Source:
            Sun et al. 2024 (arXiv 2402.17762).
        """
        shares = {}
        for name in self.blocks:
            pairs = list(zip(self.largest[name], self.median[name], strict=True))
            shares[name] = sum(x > size and x > ratio * middle for x, middle in pairs) / len(pairs)
        return shares

    def __add__(self, other: Residuals) -> Residuals:
        """Those of the sequences of both, in this order."""
        if not isinstance(other, Residuals):
            return NotImplemented
        joined = Residuals()
        for kind in KINDS:
            for part in (self, other):
                for name, values in getattr(part, kind).items():
                    getattr(joined, kind).setdefault(name, []).extend(values)
        return joined


@contextmanager
def residuals(model: nn.Module) -> Iterator[Residuals]:
    """Record norms after every block: every member of an ``nn.ModuleList`` whose output is (N, L, E), L at least two.

    Spikes of the first token accompany sinks; see :meth:`Residuals.massive_share`.

    Args:
        model: Any module; outputs do not change. Pass whole sequences without left padding.

    Yields:
        :class:`Residuals`.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})
        >>> with residuals(model) as norms:
        ...     _ = model["blocks"][0](torch.ones(2, 3, 4))
        >>> list(norms.first_token)
        ['blocks.0']
    """
    found = Residuals()

    def recorded(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[1] > 1:
                found.add(name, hidden)

        return hook

    handles = []
    try:
        for prefix, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for index, block in enumerate(module):
                    name = f"{prefix}.{index}" if prefix else str(index)
                    handles.append(block.register_forward_hook(recorded(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
