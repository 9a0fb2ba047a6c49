"""Walkers on the hidden states of an artificial genome: how its sequences are drawn.

Legend: B sequences, C isochore classes, P tandem periods, F families of interspersed repeats, K their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eotattn.experiments.tasks.isochores import IsochoreModel

__all__ = ["NOTHING", "HiddenStates", "Walk"]

#: Row of the background table that stands for "no base before this one".
NOTHING = 4


class HiddenStates(NamedTuple):
    """One number a hidden state: probabilities, or emissions.

    Attributes:
        background: (..., C).
        tandem: (..., C, P).
        element: (..., C, F, K).
    """

    background: Tensor
    tandem: Tensor
    element: Tensor

    def flat(self) -> Tensor:
        """(..., S), all states in one axis."""
        parts = (self.background, self.tandem, self.element)
        return torch.cat([part.flatten(self.background.dim() - 1) for part in parts], dim=-1)


@dataclass
class Walk:
    """B walkers on the hidden states.

    Attributes:
        kind: (B,) class of each.
        rule: (B,) 0 background, then the tandem periods, then the bases of the families, family by family.
    """

    model: IsochoreModel
    generator: torch.Generator
    kind: Tensor
    rule: Tensor

    def __post_init__(self) -> None:
        model = self.model
        self.cumulative = model.background_table().cumsum(-1)
        self.families = model.families().flatten()
        self.periods = torch.tensor((0, *model.periods))
        self.shares = torch.tensor(model.class_shares, dtype=torch.float64).cumsum(-1)

    @classmethod
    def begin(cls, model: IsochoreModel, start: HiddenStates, generator: torch.Generator) -> Walk:
        """Draw every walker's state from the probabilities ``start``."""
        kinds, periods = len(model.class_shares), len(model.periods)
        by_rule = torch.cat([start.background.unsqueeze(-1), start.tandem, start.element.flatten(-2)], dim=-1)
        cumulative = by_rule.flatten(1).cumsum(-1)
        uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
        width = 1 + periods + 2 * model.num_families * model.family_length
        assert by_rule.shape[1:] == (kinds, width)
        return cls(model, generator, drawn // width, drawn % width)

    def emit(self, columns: Tensor, t: int) -> Tensor:
        """(B,) uint8: the next bases, at place ``t`` after ``columns[:t]`` (t, B)."""
        before = columns[t - 1].long() if t > 0 else torch.full_like(self.kind, NOTHING)
        base = (self._uniform()[:, None] >= self.cumulative[before, self.kind]).sum(-1).clamp(max=3)
        first_element = len(self.periods)
        in_tandem, in_element = (self.rule > 0) & (self.rule < first_element), self.rule >= first_element
        back = t - self.periods[self.rule.clamp(max=first_element - 1)]
        copied = columns[back.clamp(min=0), torch.arange(len(back))].long()
        copied = torch.where(in_element, self.families[(self.rule - first_element).clamp(min=0)], copied)
        copies = (in_element | (in_tandem & (back >= 0))) & (self._uniform() >= self.model.divergence)
        return torch.where(copies, copied, base).to(torch.uint8)

    def step(self) -> None:
        """Move every walker to the state of the next base."""
        model, first_element = self.model, len(self.periods)
        count = 2 * model.num_families * model.family_length
        drawn, which = self._uniform(), self._uniform()
        new_class = 1 / model.segment_length
        tandem_below = new_class + model.tandem_rate
        element_below = tandem_below + model.element_rate
        outside, in_element = self.rule == 0, self.rule >= first_element
        redrawn = (which[:, None] >= self.shares).sum(-1).clamp(max=len(self.shares) - 1)
        self.kind = torch.where(outside & (drawn < new_class), redrawn, self.kind)
        to_tandem = outside & (drawn >= new_class) & (drawn < tandem_below)
        to_element = outside & (drawn >= tandem_below) & (drawn < element_below)
        at_end = in_element & ((self.rule - first_element) % model.family_length == model.family_length - 1)
        ends = at_end | (~outside & ~in_element & (drawn < 1 / model.tandem_length))
        rule = torch.where(in_element, self.rule + 1, self.rule)
        rule = torch.where(to_tandem, 1 + (which * len(model.periods)).long(), rule)
        rule = torch.where(to_element, first_element + (which * count).long(), rule)
        self.rule = torch.where(ends, 0, rule)

    def _uniform(self) -> Tensor:
        return torch.rand(self.kind.shape, generator=self.generator, dtype=torch.float64)
