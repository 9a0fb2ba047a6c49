"""Isochores: an artificial genome whose exact likelihood is known, because it is a hidden Markov model.

Legend: B sequences, L bases, C isochore classes, P tandem periods, F families of interspersed repeats, K their length.
A token is a base: 0 A, 1 C, 2 G, 3 T.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.checks import check_positive, check_positive_int, require

__all__ = ["IsochoreModel"]

A, C, G, T = range(4)
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


@dataclass(frozen=True)
class IsochoreModel:
    """A genome made of long segments of differing GC content, with depleted CpG, and two kinds of repeats.

    Four rules, in the order in which a base is made. (1) *Isochores*: a segment has a class with a GC fraction; at
    every base outside repeats the class is drawn anew with probability 1 / ``segment_length``. (2) *Background*: A and
    T, and C and G, are equally frequent; after a C, a G appears ``cpg_depletion`` times as often as that, and the rest
    goes to A, as deamination on the other strand leaves it. (3) *Tandem repeats*: for ``tandem_length`` bases on
    average, every base copies the one ``period`` before it. (4) *Interspersed repeats*: copies of one of
    ``num_families`` fixed sequences or of their reverse complements, beginning at a random base of them and ending
    with their last. A base of a repeat is replaced by a background base with probability ``divergence``. A sequence
    begins anywhere in the genome; a tandem repeat that reaches back before its first base makes background.

    Which rule made a base is hidden, and depends on the rule of the base before it alone: a hidden Markov model whose
    emissions look back. So :meth:`surprisal` is exact, and no model of the sequence can do better on average.

    Args:
        gc_fractions: GC fraction of each class; the defaults are those of the human isochores L1 to H3.
        class_shares: Share of each class; they sum to one.
        segment_length: Mean distance of two drawings of the class, background bases.
        cpg_depletion: Factor on CpG, in [0, 1].
        periods: Periods of tandem repeats, bases.
        tandem_share: Share of bases in tandem repeats.
        tandem_length: Mean length of a tandem repeat, bases.
        num_families: Families of interspersed repeats; each counts twice, with its reverse complement.
        family_length: Bases K of a family's sequence.
        element_share: Share of bases in interspersed repeats.
        divergence: Share of replaced bases in repeats.
        family_seed: Seed of the families' sequences.

    Source:
        Bernardi 2000 (Gene 241:3) for isochores; class fractions and shares rounded from Costantini et al. 2006 (Genome
        Research 16:536). The model is original.

    Example:
        >>> model = IsochoreModel()
        >>> genome = model.sample(2, 50, seed=0)
        >>> genome.shape, float(model.surprisal(genome).mean()) < 1.5
        (torch.Size([2, 50]), True)
    """

    gc_fractions: tuple[float, ...] = (0.36, 0.39, 0.43, 0.49, 0.55)
    class_shares: tuple[float, ...] = (0.19, 0.36, 0.31, 0.11, 0.03)
    segment_length: float = 4096.0
    cpg_depletion: float = 0.25
    periods: tuple[int, ...] = (2, 3, 4, 6)
    tandem_share: float = 0.04
    tandem_length: float = 32.0
    num_families: int = 2
    family_length: int = 128
    element_share: float = 0.2
    divergence: float = 0.1
    family_seed: int = 0

    def __post_init__(self) -> None:
        owner = "IsochoreModel"
        for name in ("num_families", "family_length"):
            check_positive_int(owner, name, getattr(self, name))
        for name in ("segment_length", "tandem_length"):
            value = check_positive(owner, name, getattr(self, name))
            require(value > 1, owner, name, "exceed 1 base", value, "Use a longer mean")
        unit = [f.name for f in fields(self) if f.name.endswith(("_share", "_depletion", "divergence"))]
        for name in unit:
            require(0 <= getattr(self, name) <= 1, owner, name, "lie in [0, 1]", getattr(self, name), "Pass a share")
        for period in self.periods:
            check_positive_int(owner, "periods", period)
        require(len(self.periods) > 0, owner, "periods", "hold at least one period", self.periods, "Use e.g. (2, 3)")
        inside = all(0 < fraction < 1 for fraction in self.gc_fractions)
        require(inside, owner, "gc_fractions", "lie in (0, 1)", self.gc_fractions, "Pass fractions")
        fits = len(self.class_shares) == len(self.gc_fractions) and min(self.class_shares) >= 0
        fits = fits and abs(sum(self.class_shares) - 1) < 1e-9
        rule = f"be {len(self.gc_fractions)} shares that sum to one"
        require(fits, owner, "class_shares", rule, self.class_shares, "Pass one share a class")
        leaves = 1 / self.segment_length + self.tandem_rate + self.element_rate if self._background > 0 else 2.0
        rule = "leave room for background between repeats"
        got = (self.tandem_share, self.element_share)
        require(leaves < 1, owner, "tandem_share and element_share", rule, got, "Lower them or lengthen repeats")

    # Numbers that follow from the arguments ---------------------------------------------------------------------

    @property
    def _background(self) -> float:
        """Share of background bases."""
        return 1 - self.tandem_share - self.element_share

    @property
    def tandem_rate(self) -> float:
        """Probability that a tandem repeat follows a background base."""
        return self.tandem_share / (self._background * self.tandem_length)

    @property
    def element_rate(self) -> float:
        """Probability that an interspersed repeat follows a background base; its mean length is (K + 1) / 2."""
        return 2 * self.element_share / (self._background * (self.family_length + 1))

    def families(self) -> Tensor:
        """(F, K) int64 sequences of the interspersed repeats, every second one a reverse complement."""
        generator = torch.Generator().manual_seed(self.family_seed)
        forward = torch.randint(4, (self.num_families, self.family_length), generator=generator)
        return torch.stack([forward, 3 - forward.flip(-1)], dim=1).flatten(0, 1)

    def background_table(self) -> Tensor:
        """(5, C, 4) float64: probability of a background base after each base, last row after none; rows sum to one."""
        gc = torch.tensor(self.gc_fractions, dtype=torch.float64)
        composition = torch.stack([1 - gc, gc, gc, 1 - gc], dim=-1) / 2
        table = composition.repeat(5, 1, 1)
        table[C, :, G] *= self.cpg_depletion
        table[C, :, A] += (1 - self.cpg_depletion) * composition[:, G]
        return table

    def _stationary(self) -> HiddenStates:
        """Share of bases in every hidden state; the class does not depend on the rule."""
        shares = torch.tensor(self.class_shares, dtype=torch.float64)
        periods, families = len(self.periods), 2 * self.num_families
        tandem = shares[:, None].expand(-1, periods) * self.tandem_share / periods
        reached = torch.arange(1, self.family_length + 1, dtype=torch.float64)
        place = reached / reached.sum() / families  # the k-th base is in every copy that begins at or before it
        element = shares[:, None, None] * self.element_share * place.expand(families, -1)
        return HiddenStates(shares * self._background, tandem, element)

    # Likelihood ---------------------------------------------------------------------------------------------------

    def surprisal(self, tokens: Tensor) -> Tensor:
        """-log probability of every base given all bases before it: the least loss that any model can have on average.

        Returns:
            (B, L) float64, nats.
        """
        return self._filter(tokens)[0]

    def _filter(self, tokens: Tensor) -> tuple[Tensor, HiddenStates]:
        """Surprisals, and the probability of every hidden state of the base after the last (forward algorithm)."""
        self._check_tokens(tokens)
        tokens = tokens.long()
        state = HiddenStates(*(part.expand(tokens.shape[0], *part.shape) for part in self._stationary()))
        table, families = self.background_table(), self.families()
        surprisals = []
        for t in range(tokens.shape[1]):
            emission = self._emission(tokens[:, : t + 1], table, families)
            joint = HiddenStates(*(p * e for p, e in zip(state, emission, strict=True)))
            probability = joint.flat().sum(-1)
            surprisals.append(-probability.log())
            scale = 1 / probability
            state = self._advance(HiddenStates(*(torch.einsum("b...,b->b...", part, scale) for part in joint)))
        return torch.stack(surprisals, dim=-1), state

    def _emission(self, seen: Tensor, table: Tensor, families: Tensor) -> HiddenStates:
        """Probability that each hidden state makes the last base of ``seen`` (B, t + 1)."""
        last, t = seen[:, -1], seen.shape[1] - 1
        before = seen[:, -2] if t > 0 else torch.full_like(last, NOTHING)
        background = table[before, :, last]
        copies = [
            background if t < period else self._copied(last == seen[:, t - period], background)
            for period in self.periods
        ]
        element = self._copied(families == last[:, None, None], background[..., None, None])
        return HiddenStates(background, torch.stack(copies, dim=-1), element)

    def _copied(self, same: Tensor, background: Tensor) -> Tensor:
        """Probability of a base of a repeat, which is as in the original or replaced."""
        return (1 - self.divergence) * same.unsqueeze(1).double() + self.divergence * background

    def _advance(self, state: HiddenStates) -> HiddenStates:
        """Probabilities of the hidden states of the next base."""
        background, tandem, element = state
        new_class, ends = 1 / self.segment_length, 1 / self.tandem_length
        stays = 1 - new_class - self.tandem_rate - self.element_rate
        drawn = background.sum(-1, keepdim=True) * torch.tensor(self.class_shares, dtype=torch.float64)
        ended = tandem.sum(-1) * ends + element[..., -1].sum(-1)
        begun = background[..., None, None] * self.element_rate / (element.shape[-2] * element.shape[-1])
        moved = torch.cat([torch.zeros_like(element[..., :1]), element[..., :-1]], dim=-1) + begun
        copying = tandem * (1 - ends) + background[..., None] * self.tandem_rate / tandem.shape[-1]
        return HiddenStates(stays * background + new_class * drawn + ended, copying, moved)

    def _check_tokens(self, tokens: Tensor) -> None:
        is_integer = not tokens.is_floating_point() and tokens.dim() == 2 and tokens.numel() > 0
        require(is_integer, "IsochoreModel", "tokens", "be integers of shape (B, L)", tokens, "Encode the bases first")
        highest, lowest = int(tokens.max()), int(tokens.min())
        rule, remedy = "be bases 0 to 3", "Leave windows with N out"
        require(lowest >= 0 and highest <= T, "IsochoreModel", "tokens", rule, (lowest, highest), remedy)

    # Sampling -----------------------------------------------------------------------------------------------------

    def sample(self, count: int, length: int, *, seed: int) -> Tensor:
        """Draw independent stretches of the genome.

        Returns:
            (B, L) uint8.
        """
        check_positive_int("IsochoreModel.sample", "count", count)
        check_positive_int("IsochoreModel.sample", "length", length)
        generator = torch.Generator().manual_seed(seed)
        start = HiddenStates(*(part.expand(count, *part.shape) for part in self._stationary()))
        empty = torch.empty(count, 0, dtype=torch.uint8)
        return self._simulate(start, empty, length, generator)

    def continuations(self, tokens: Tensor, length: int, *, seed: int) -> Tensor:
        """Draw what may follow: samples of the true distribution of the next bases given all bases so far.

        Returns:
            (B, length) uint8.
        """
        check_positive_int("IsochoreModel.continuations", "length", length)
        generator = torch.Generator().manual_seed(seed)
        return self._simulate(self._filter(tokens)[1], tokens.to(torch.uint8), length, generator)

    def _simulate(self, start: HiddenStates, history: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Draw hidden states from ``start``, then walk: (B, length) bases that follow ``history`` (B, any)."""
        walk = Walk.begin(self, start, generator)
        known = history.shape[1]
        columns = torch.empty(known + length, history.shape[0], dtype=torch.uint8)  # a base of all walkers is one run
        columns[:known] = history.T
        for t in range(known, known + length):
            columns[t] = walk.emit(columns, t)
            walk.step()
        return columns[known:].T.contiguous()


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
