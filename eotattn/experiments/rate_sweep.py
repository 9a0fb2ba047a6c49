"""Learning rates by trial: the sweeping seeds train every variant at every rate, the other seeds take the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from eotattn.experiments.records import Records, Row

__all__ = ["Sweep", "best_rate", "describe_rates", "run_name", "sweep_table", "swept_runs"]


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


def best_rate(sweep: Sweep, records: Records, variant: str) -> float | None:
    """The rate whose runs ended with the least loss, mean over the sweeping seeds; None while one of them is missing.

    A rate at which a run diverged to NaN is taken last.

    That is the loss on data kept for choices where runs measured one, so that no rate is chosen for learning by heart,
    and the training loss where data do not repeat.
    """
    losses = {rate: _mean_loss(sweep, records, variant, rate) for rate in sweep.learning_rates}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: (math.isnan(known[rate]), known[rate])) if len(known) == len(losses) else None


def _mean_loss(sweep: Sweep, records: Records, variant: str, rate: float) -> float | None:
    """Loss on data kept for choices at the end, or else the mean training loss over the last logged steps."""
    names = [run_name(variant, rate, seed) for seed in sweep.sweep_seeds]
    if any(name not in records for name in names):
        return None
    rows = [(records[name].rows_of("choice_loss") or records[name].rows_of("training_loss"))[-1] for name in names]
    return sum(float(row["value"]) for row in rows) / len(rows)


def swept_runs(sweep: Sweep, records: Records, variants: Sequence[str]) -> list[tuple[int, str, float]]:
    """(seed, variant, rate) of every run that can be named by now: first all rates, then the other seeds."""
    rates, first = sweep.learning_rates, sweep.sweep_seeds
    found = [(seed, variant, rate) for seed in first for variant in variants for rate in rates]
    for variant in variants:
        best = best_rate(sweep, records, variant)
        found += [(seed, variant, best) for seed in sweep.seeds if seed not in first and best is not None]
    return found


def sweep_table(sweep: Sweep, records: Records, variants: Sequence[str]) -> list[Row]:
    """One row a variant and rate, for display."""
    return [
        {
            "variant": variant,
            "learning rate": rate,
            "loss": _mean_loss(sweep, records, variant, rate),
            "taken": rate == best_rate(sweep, records, variant),
        }
        for variant in variants
        for rate in sweep.learning_rates
    ]


def describe_rates(sweep: Sweep, records: Records, variants: Sequence[str]) -> str:
    """The rates taken, and which of them lie at an end of the range, so that a better one may lie outside."""
    rates = sweep.learning_rates
    taken = {variant: best_rate(sweep, records, variant) for variant in variants}
    listed = ", ".join(f"{rate:g} for {variant}" for variant, rate in taken.items())
    if len(rates) == 1:
        return f"one learning rate, {rates[0]:g}"
    ends = [variant for variant, rate in taken.items() if rate in (min(rates), max(rates))]
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return f"learning rates of {tried}: {listed} (at an end of the range: {', '.join(ends) or 'none'})"
