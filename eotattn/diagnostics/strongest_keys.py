"""The strongest key of every head and text, wherever it is: sinks without a decree where to look.

Legend: A layers, N sequences, H heads, K keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_positive, require
from eotattn.provenance import Table

__all__ = ["StrongestKeys", "key_share", "strongest_keys", "strongest_positions", "uniform_share"]

OWNER = "strongest_keys"


def key_share(statistics: SequenceStatistics) -> Tensor:
    """(N, H, K) mean of p_ik over the queries that admit key k; NaN where none does (Gu et al. 2024)."""
    return statistics.column_mass / statistics.column_count


def strongest_positions(statistics: SequenceStatistics) -> Tensor:
    """(N, H) position of the key that receives the most weight in total, from the first token of each sequence."""
    return statistics.column_mass.argmax(-1)


def uniform_share(statistics: SequenceStatistics) -> Tensor:
    """(N,) what :func:`key_share` of the first key would be if every query attended evenly to what it admits.

    A sink can be told only where this is small. Over n causal tokens it is (1 + 1/2 + ... + 1/n) / n.
    """
    shares = []
    for counts in statistics.column_count.amax(1):  # a stored map may hide keys of a head by weights of zero
        queries = int(counts[0])
        is_causal = queries > 1 and float(counts[counts > 0][-1]) == 1
        keys = torch.arange(1, queries + 1) if is_causal else (counts > 0).sum().expand(max(queries, 1))
        shares.append((1 / keys.double()).mean())
    return torch.stack(shares)


@dataclass(frozen=True, eq=False)
class StrongestKeys(Table):
    """The key that receives the most weight in total, by layer, text and head.

    Attributes:
        layers: A names.
        position: A arrays (N, H): where it is, tokens from the start of the text.
        mass: A arrays (N, H): mean weight on it, over the queries that admit it, in [0, 1].
        token: A arrays (N, H) of strings: what it is; empty where tokens were not given.
        threshold: Mass above which the key is a sink.
    """

    layers: tuple[str, ...]
    position: tuple[NDArray[np.int64], ...]
    mass: tuple[NDArray[np.float64], ...]
    token: tuple[NDArray[np.str_], ...]
    threshold: float

    @property
    def sink_rate(self) -> NDArray[np.float64]:
        """(A,) share of heads and texts whose strongest key is a sink."""
        return np.array([(mass > self.threshold).mean() for mass in self.mass])

    @property
    def first_rate(self) -> NDArray[np.float64]:
        """(A,) share of heads and texts whose strongest key is a sink and the first token."""
        pairs = zip(self.mass, self.position, strict=True)
        return np.array([((mass > self.threshold) & (at == 0)).mean() for mass, at in pairs])

    def of(self, texts: NDArray[np.bool_]) -> StrongestKeys:
        """Those of some of the texts, (N,) true for each that stays."""
        position = tuple(each[texts[: len(each)]] for each in self.position)
        mass = tuple(each[texts[: len(each)]] for each in self.mass)
        token = tuple(each[texts[: len(each)]] for each in self.token)
        return replace(self, position=position, mass=mass, token=token)

    def common(self, layer: int) -> list[tuple[str, int]]:
        """What is a sink in how many texts of a layer, most texts first: the first token, other tokens, or keys."""
        sinks = self.mass[layer] > self.threshold
        pairs = zip(self.token[layer].flat, self.position[layer].flat, strict=True)
        named = [f"{str(token)!r}" if token else f"key {at}" for token, at in pairs]
        seen = np.where(self.position[layer] == 0, "first token", np.reshape(named, sinks.shape))
        counts = Counter(name for text, here in zip(seen, sinks, strict=True) for name in sorted(set(text[here])))
        return [(str(name), texts) for name, texts in counts.most_common()]

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Columns of a tidy table: one row a layer, text and head."""
        parts = []
        for layer, position, mass, token in zip(self.layers, self.position, self.mass, self.token, strict=True):
            text, head = np.indices(position.shape)
            names = np.full(position.size, layer)
            parts.append((names, text.ravel(), head.ravel(), position.ravel(), mass.ravel(), token.ravel()))
        columns = ("layer", "text", "head", "position", "mass", "token")
        return {name: np.concatenate(values) for name, values in zip(columns, zip(*parts, strict=True), strict=True)}

    def __str__(self) -> str:
        """One line a layer."""
        width = max(map(len, self.layers))
        lines = [f"{'layer':<{width}}  sinks  of them first  what is a sink (in texts)"]
        for a, layer in enumerate(self.layers):
            rate, first = self.sink_rate[a], self.first_rate[a]
            share = f"{first / rate:13.2f}" if rate else f"{'':13}"
            found = [f"{what} ({texts} of {len(self.mass[a])})" for what, texts in self.common(a)[:2]]
            lines.append(f"{layer:<{width}}  {rate:5.2f}  {share}  {', '.join(found) or 'none'}")
        return "\n".join(lines)


def strongest_keys(
    layers: Mapping[str, SequenceStatistics],
    *,
    tokens: Sequence[Sequence[str]] | None = None,
    threshold: float = 0.3,
) -> StrongestKeys:
    """Find the key that receives the most weight in total, of every layer, text and head.

    In total, not on average: the last keys are admitted by few queries, and a single one that attends to itself is no
    sink.

    Args:
        layers: Name -> statistics, from a capture or from maps.
        tokens: The tokens of every sequence, for names; padding left out.
        threshold: Mean weight above which a key is a sink, in (0, 1).

    Returns:
        :class:`StrongestKeys`.

    Raises:
        ValueError: If there is no layer, or tokens do not fit the sequences.

    Source:
        Sink rate and its threshold of 0.3: Gu et al. 2024 (arXiv 2410.10781), there of the first tokens.

    Example:
        >>> from eotattn.attention.statistics import weight_statistics
        >>> stats = SequenceStatistics.of(weight_statistics(torch.tensor([[0.1, 0.9], [0.2, 0.8]])[None, None]))
        >>> strongest_keys({"first": stats}, tokens=[["a", "b"]]).common(0)
        [("'b'", 1)]
    """
    require(len(layers) > 0, OWNER, "layers", "hold at least one layer", dict(layers), "Run the model first")
    check_positive(OWNER, "threshold", threshold)
    found: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.str_]]] = []
    for statistics in layers.values():
        at = strongest_positions(statistics)
        mass = key_share(statistics).gather(-1, at.unsqueeze(-1)).squeeze(-1)
        found.append((at.numpy(), torch.nan_to_num(mass).numpy(), _names(at, tokens)))
    position, mass_of, token = zip(*found, strict=True)
    return StrongestKeys(tuple(layers), position, mass_of, token, threshold)


def _names(position: Tensor, tokens: Sequence[Sequence[str]] | None) -> NDArray[np.str_]:
    if tokens is None:
        return np.full(position.shape, "", dtype=str)
    fits = len(tokens) == len(position) and all(
        int(row.max()) < len(text) for row, text in zip(position, tokens, strict=False)
    )
    rule = f"name the tokens of {len(position)} sequences"
    require(fits, OWNER, "tokens", rule, [len(text) for text in tokens], "Pass one list a sequence, in their order")
    return np.array([[text[k] for k in row] for row, text in zip(position.tolist(), tokens, strict=True)])
