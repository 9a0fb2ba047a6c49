"""What the features of a prior are like: found by looking at their values, never declared.

Legend: C coordinates, F features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.compat import plain_tensors
from eotattn.priors.terms import FEATURES

__all__ = ["FeatureFacts", "Span", "bits_of", "constant_key_features", "probe"]

#: Bits of a position that are planned for, in steps: up to 65 535, then up to 16 777 215, ...
REACH_STEP = 8
FEWEST_BITS = 16
#: Positions looked at first; and where some feature looks like a whole number there, which one exception would spoil.
FEW, MANY = 2**10, 2**16
#: Turns whole positions into others.
FRACTION = 0.7501


class Span(NamedTuple):
    """What is known of the positions of a call before lanes are planned.

    Args:
        bits: No position is 2 ** bits or more from zero.
        relative_bits: Nor from the origin that relative terms count from.
        whole: Whether all of them are whole numbers.
    """

    bits: int = FEWEST_BITS
    relative_bits: int = FEWEST_BITS
    whole: bool = True


class FeatureFacts(NamedTuple):
    """What one feature is like at the positions looked at.

    Args:
        largest: Its largest size.
        is_whole: Whether it is a whole number everywhere.
        is_one: Whether it is one everywhere.
    """

    largest: float
    is_whole: bool
    is_one: bool


def bits_of(largest: float) -> int:
    """Bits of a position, in the steps that are planned for."""
    bits = FEWEST_BITS
    while 2**bits <= abs(largest):  # comparisons alone, so that a length may be a symbol of a graph
        bits += REACH_STEP
    return bits


@lru_cache(maxsize=512)
@plain_tensors()
def probe(features: str, side: str, num_coordinates: int, span: Span) -> tuple[FeatureFacts, ...]:
    """The facts of each feature of a side; without gaps where all positions are below 65 536."""
    stated = FEATURES[features]
    bits = span.relative_bits if stated.is_relative else span.bits
    facts: tuple[FeatureFacts, ...] = ()
    for count in (FEW, MANY):
        numbers = _numbers(count, 2**bits - 1, has_negative=stated.is_relative)
        numbers = numbers if span.whole else torch.cat([numbers, FRACTION * numbers])
        positions = numbers if num_coordinates == 1 else _on_grid(numbers, num_coordinates)
        facts = tuple(_facts(values) for values in getattr(stated, side)(positions).double().unbind(-1))
        if not any(fact.is_whole for fact in facts):
            break
    return facts


def constant_key_features(features: str, num_coordinates: int) -> tuple[bool, ...]:
    """Which key features are one at every position: constants of each row, which softmax does not see."""
    return tuple(fact.is_one for fact in probe(features, "key", num_coordinates, Span()))


def _facts(values: Tensor) -> FeatureFacts:
    return FeatureFacts(float(values.abs().max()), bool((values == values.round()).all()), bool((values == 1).all()))


def _numbers(count: int, reach: int, *, has_negative: bool) -> Tensor:
    """The first ``count`` whole numbers, as many spread up to ``reach``, and its end: float64."""
    first = torch.arange(min(count, reach + 1), dtype=torch.float64)
    spread = torch.linspace(count, reach, count, dtype=torch.float64).round() if reach >= count else first[:0]
    before = torch.tensor([-1.0], dtype=torch.float64)  # where keys that belong to no token may lie
    numbers = torch.cat([first, spread, torch.tensor([reach - 1, reach], dtype=torch.float64)])
    return torch.cat([numbers, -numbers if has_negative else before])


def _on_grid(numbers: Tensor, num_coordinates: int) -> Tensor:
    """(n, C): every number as each coordinate of a border cell, and as all of them; all cells near the origin."""
    along = [torch.zeros(len(numbers), num_coordinates, dtype=torch.float64) for _ in range(num_coordinates)]
    for coordinate, cells in enumerate(along):
        cells[:, coordinate] = numbers
    near = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)  # minus one: the class token
    diagonal = numbers[:, None].expand(-1, num_coordinates)
    return torch.cat([*along, diagonal, torch.cartesian_prod(*[near] * num_coordinates)])
