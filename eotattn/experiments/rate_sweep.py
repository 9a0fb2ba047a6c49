"""Learning rates by trial: choosing runs train every variant at every rate, and the others take the best one.

The choosing runs of some seeds are judged by their loss on data kept for choices, or by their training loss where
training data never repeat. The run that reports goes on from the weights of the choosing run that it equals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas

from eotattn.experiments.records import Configuration, Measurement, Records, Run
from eotattn.experiments.study import Study, as_table, select

__all__ = ["Sweep", "SweptStudy", "best_rate", "describe_rates", "run_name", "sweep_table", "swept_runs"]

Measure = Callable[[Any, Path], Measurement]
#: Stands before the names of choosing runs.
CHOOSE = "choose-"


class Sweep(Protocol):
    """What a recipe says about rates and seeds."""

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Rates to try."""
        ...

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of weights and batches."""
        ...

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """The first of them, which try the rates."""
        ...


def run_name(variant: str, rate: float, seed: int) -> str:
    """Name of a run.

    Example:
        >>> run_name("rope", 3e-3, 1)
        'rope-rate0.003-seed1'
    """
    return f"{variant}-rate{rate:g}-seed{seed}"


def swept_runs(
    sweep: Sweep,
    records: Records,
    variants: Mapping[str, Sequence[int]],
    configure: Callable[[str, float, int], Configuration],
    choose: Measure,
    measure: Measure,
) -> list[Run]:
    """The runs that can be named by now: first the choosing ones, then seed by seed those that report."""
    rates = sweep.learning_rates if len(sweep.learning_rates) > 1 else ()
    tried = [(variant, rate, seed) for seed in sweep.sweep_seeds for variant in variants for rate in rates]
    choosing = {run_name(*one): Run(CHOOSE + run_name(*one), configure(*one), choose, chooses=True) for one in tried}
    table = as_table(records)
    best = {variant: best_rate(sweep, table, variant) for variant in variants}
    reports = [
        Run(run_name(variant, rate, seed), configure(variant, rate, seed), measure)
        for seed in sweep.seeds
        for variant, rate in best.items()
        if rate is not None and seed in variants[variant]
    ]
    return [*choosing.values(), *(_continued(run, choosing) for run in reports)]


def _continued(run: Run, choosing: dict[str, Run]) -> Run:
    return Run(run.name, run.configuration, run.measure, continues=choosing.get(run.name))


def best_rate(sweep: Sweep, table: pandas.DataFrame, variant: str) -> float | None:
    """The rate whose runs ended with the least loss, mean over the sweeping seeds; None while one of them is missing.

    A rate at which a run diverged to NaN is taken last.
    """
    if len(sweep.learning_rates) == 1:
        return sweep.learning_rates[0]
    losses = {rate: _mean_loss(sweep, table, variant, rate) for rate in sweep.learning_rates}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: (math.isnan(known[rate]), known[rate])) if len(known) == len(losses) else None


def _mean_loss(sweep: Sweep, table: pandas.DataFrame, variant: str, rate: float) -> float | None:
    """Loss on data kept for choices at the end, or else the mean training loss over the last logged steps."""
    losses = []
    for seed in sweep.sweep_seeds:
        name = run_name(variant, rate, seed)
        rows = pandas.concat([select(table, run=CHOOSE + name), select(table, run=name)])
        kept = select(rows, quantity="choice_loss")
        rows = kept if len(kept) else select(rows, quantity="training_loss")
        if rows.empty:
            return None
        losses.append(float(rows.value.iloc[-1]))
    return sum(losses) / len(losses)


def sweep_table(sweep: Sweep, table: pandas.DataFrame, variants: Sequence[str]) -> pandas.DataFrame:
    """Loss by variant (rows) and learning rate (columns), and the rate taken."""
    losses = {v: {rate: _mean_loss(sweep, table, v, rate) for rate in sweep.learning_rates} for v in variants}
    taken = {variant: best_rate(sweep, table, variant) for variant in variants}
    return pandas.DataFrame(losses).T.assign(taken=taken)


def describe_rates(sweep: Sweep, table: pandas.DataFrame, variants: Sequence[str]) -> str:
    """The rates taken, and which of them lie at an end of the range, so that a better one may lie outside."""
    rates = sweep.learning_rates
    taken = {variant: best_rate(sweep, table, variant) for variant in variants}
    listed = ", ".join(f"{rate:g} for {variant}" for variant, rate in taken.items())
    if len(rates) == 1:
        return f"one learning rate, {rates[0]:g}"
    ends = [variant for variant, rate in taken.items() if rate in (min(rates), max(rates))]
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return f"learning rates of {tried}: {listed} (at an end of the range: {', '.join(ends) or 'none'})"


class SweptStudy(Study):
    """A study whose variants were trained at several rates: rows of a variant are those at the rate that it takes."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of what is compared."""
        raise NotImplementedError

    def trained_as(self, variant: str) -> str:
        """The variant whose runs measured this one."""
        return variant

    def rate(self, variant: str) -> float:
        """The learning rate that a variant takes."""
        rate = best_rate(self.recipe, self.table, self.trained_as(variant))
        assert rate is not None
        return rate

    def rows(self, quantity: str, **where: Any) -> pandas.DataFrame:
        """Rows of one quantity."""
        found, variant = super().rows(quantity, **where), where.get("variant")
        if variant not in self.variants:
            return found
        trained, rate = self.trained_as(variant), self.rate(variant)
        return found[found.run.isin([run_name(trained, rate, seed) for seed in self.recipe.seeds])]

    def sweep(self) -> pandas.DataFrame:
        """Loss by variant (rows) and learning rate (columns), and the rate taken."""
        return sweep_table(self.recipe, self.table, self._trained)

    def rates(self) -> str:
        """The rates taken, in words."""
        return describe_rates(self.recipe, self.table, self._trained)

    @property
    def _trained(self) -> list[str]:
        return [variant for variant in self.variants if self.trained_as(variant) == variant]
