"""Figure 2: what the runs say, in tables, claims with verdicts of three values, and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas

from eotattn.diagnostics import SinkMassReport
from eotattn.experiments.figures.fig2_language import FIGURE, LanguageRecipe, at_rate, best_rate
from eotattn.experiments.intervals import SeedInterval, claim
from eotattn.experiments.networks import display_name
from eotattn.experiments.optimisation import learning_rate_factor
from eotattn.experiments.study import Study, paired
from eotattn.plotting import (
    line_styles,
    panels,
    plot_key_only,
    plot_length_curves,
    plot_sink_mass,
    shade_lines,
    title_panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

__all__ = ["LanguageStudy", "draw", "verdict"]

#: Relative gain that is asked for at the training length.
GAIN = 0.01
#: Bits per byte that count as divergence.
DIVERGENCE = 0.5
#: Nats that count as a spike, or a rise, of u(j).
SPIKE = 0.5
#: Size of a rank correlation that counts as falling.
FALLS = 0.5


class LanguageStudy(Study):
    """All decoders of figure 2."""

    recipe: LanguageRecipe
    figure = FIGURE

    @property
    def names(self) -> tuple[str, ...]:
        """Variants, contrasts and readings: every curve of panel (a)."""
        trained = [decoder.attention for decoder in self.recipe.variants + self.recipe.contrasts]
        return (*trained, *(kind for kind, _ in self.recipe.readings))

    @property
    def learned(self) -> tuple[str, ...]:
        """The decoders whose prior has a key-only part."""
        return tuple(name for name in self.names if len(self.rows("key_only_log_prior", variant=name)))

    @property
    def headline(self) -> tuple[str, ...]:
        """Those among them that run with all seeds."""
        return tuple(d.attention for d in self.recipe.variants if d.attention in self.learned)

    def rate(self, name: str) -> float:
        """The learning rate of a decoder's runs."""
        swept = {decoder.attention for decoder in self.recipe.variants}
        rate = best_rate(self.recipe, self.table, name if name in swept else self.recipe.variants[0].attention)
        assert rate is not None
        return rate

    def reach(self, name: str) -> float:
        """Sum of the learning rates of the log-prior over the run: what steps of one sign add up to, nats."""
        (decoder,) = [d for d in self.recipe.variants + self.recipe.contrasts if d.attention == name]
        training = at_rate(self.recipe.training, decoder, self.rate(name), 0)
        steps = range(training.steps)
        return training.prior_learning_rate * sum(learning_rate_factor(step, training) for step in steps)

    def bits(self, name: str, length: int) -> dict[int, float]:
        """Seed -> bits per byte at a context length."""
        return self.of_seeds("bits_per_byte", panel="a", variant=name, length=length)

    def mean_bits(self, name: str, length: int) -> SeedInterval:
        """The same over seeds."""
        return SeedInterval.of(list(self.bits(name, length).values()))

    def saving(self, name: str, *, over: str, length: int) -> SeedInterval:
        """Bits per byte that ``name`` saves over another variant, seed by seed: they share start and batches."""
        return paired(self.bits(over, length), self.bits(name, length))

    def drift(self, name: str) -> SeedInterval:
        """Bits per byte at the longest context less those at the training length, seed by seed."""
        return paired(self.bits(name, self.recipe.lengths[-1]), self.bits(name, self.recipe.lengths[0]))

    @property
    def uniform_mass(self) -> float:
        """Mass on the first token if attention were uniform over the keys, for the queries of panel (d)."""
        length = self.recipe.train_length
        return float(np.mean([1 / (query + 1) for query in range(length // 2, length)]))

    def sinks(self, name: str, seed: int) -> SinkMassReport:
        """Panel (d) of one run; the edges of the bins are not kept."""
        rows = self.rows("sink_mass", panel="d", variant=name, seed=seed).sort_values("score_range")
        columns = (rows[name].to_numpy() for name in ("count", "score_range", "value", "standard_error"))
        return SinkMassReport(np.full(len(rows) + 1, np.nan), *columns)

    def formation(self, name: str) -> pandas.DataFrame:
        """Mass on the first token by step (rows) and seed (columns), mean over blocks and heads."""
        rows = self.rows("sink_mass", panel="e", variant=name)
        return rows.pivot_table(index="step", columns="seed", values="value")

    def curves(self) -> pandas.DataFrame:
        """Bits per byte over seeds of every curve (rows) and length (columns)."""
        intervals = {name: [self.mean_bits(name, n) for n in self.recipe.lengths] for name in self.names}
        said = {name: [f"{each:.3f}" for each in found] for name, found in intervals.items()}
        return pandas.DataFrame.from_dict(said, orient="index", columns=list(self.recipe.lengths))

    def sweep(self) -> pandas.DataFrame:
        """Bits per byte on validation files of every variant (rows) and rate (columns), and the rate taken."""
        rows = self.rows("bits_per_byte", panel="sweep")
        found = rows.pivot_table(index="variant", columns="learning_rate", values="value", sort=False)
        return found.assign(taken=[self.rate(name) for name in found.index])

    def costs(self) -> pandas.DataFrame:
        """Parameters and training time, mean over seeds, and the learning rate."""
        rows = self.table[self.table.quantity.isin(["parameters", "training_seconds"])]
        found = rows.pivot_table(index="variant", columns="quantity", values="value", sort=False)
        return found.assign(learning_rate=[self.rate(name) for name in found.index])


# Claims -------------------------------------------------------------------------------------------------------------


def verdict(study: LanguageStudy) -> str:
    """The claims, the numbers and what became of them, in Markdown; intervals are of 95 % over seeds."""
    lines = []
    for name in study.headline:
        lines += [_gain(study, name, over) for over in ("rope", "alibi")]
        lines += [_stable(study, name), _not_worse_far(study, name)]
    lines.append(_diverges(study, "rope"))
    for name in study.learned:
        lines += [*_key_only(study, name), _sink_falls(study, name)]
    return "\n".join([*lines, _formation(study), _rates(study), _conditions(study)])


def _gain(study: LanguageStudy, name: str, over: str) -> str:
    near = study.recipe.train_length
    ours, theirs = study.bits(name, near), study.bits(over, near)
    relative = SeedInterval.of([1 - ours[seed] / theirs[seed] - GAIN for seed in ours if seed in theirs])
    one, other = study.mean_bits(name, near), study.mean_bits(over, near)
    return claim(
        f"{name}: at least {GAIN:.0%} below {over} at the training length ({near})",
        relative,
        f"{one:.4f} against {other:.4f} bits per byte: {1 - one.mean / other.mean:+.2%}; seed by seed it saves "
        f"{study.saving(name, over=over, length=near):+.4f}.",
    )


def _stable(study: LanguageStudy, name: str) -> str:
    factor, drift = study.recipe.length_factors[-1], study.drift(name)
    means = [study.mean_bits(name, length).mean for length in study.recipe.lengths]
    rise = max(value - min(means[: k + 1]) for k, value in enumerate(means))
    numbers = f"It moves by {drift:+.4f}; its largest rise above a shorter context is {rise:+.4f}."
    text = f"{name}: at {factor}x better than at 1x, on the same bytes"
    return claim(text, SeedInterval(-drift.mean, drift.half_width, drift.count), numbers)


def _not_worse_far(study: LanguageStudy, name: str) -> str:
    factor, far = study.recipe.length_factors[-1], study.recipe.lengths[-1]
    saved = study.saving(name, over="alibi", length=far)
    numbers = f"{study.mean_bits(name, far):.4f} against {study.mean_bits('alibi', far):.4f}; "
    return claim(f"{name}: at {factor}x better than ALiBi", saved, f"{numbers}seed by seed it saves {saved:+.4f}.")


def _diverges(study: LanguageStudy, name: str) -> str:
    drift, (near, *_, far) = study.drift(name), study.recipe.lengths
    kinds = [kind for kind, trained in study.recipe.readings if trained == name]
    readings = ", ".join(f"{kind} {study.mean_bits(kind, far):.3f}" for kind in kinds)
    return claim(
        f"{name} diverges, by more than {DIVERGENCE} bits per byte",
        SeedInterval(drift.mean - DIVERGENCE, drift.half_width, drift.count),
        f"From {near} to {far} tokens it moves by {drift:+.3f}. The same weights at {far} tokens, read otherwise: "
        f"{readings}.",
    )


def _key_only(study: LanguageStudy, name: str) -> tuple[str, str]:
    """Spike and rise of u(j), means over blocks and heads."""
    curves = study.rows("key_only_log_prior", variant=name)
    curves = curves.pivot_table(index="seed", columns="position", values="value")
    end = max(j for j in curves.columns if j < study.recipe.train_length)
    spike, rise = ((curves[j] - curves[1]).tolist() for j in (0, end))
    means = [SeedInterval.of(values) for values in (spike, rise)]
    margins = [SeedInterval.of([value - SPIKE for value in values]) for values in (spike, rise)]
    return (
        claim(
            f"{name}: u(j) has a spike at the first token, of more than {SPIKE} nats",
            margins[0],
            f"u(0) - u(1), mean over blocks and heads: {means[0]:+.2f} nats; AdamW could move a number of it "
            f"by about {study.reach(name):.2f} nats in this run.",
        ),
        claim(
            f"{name}: u(j) rises towards the training length, by more than {SPIKE} nats",
            margins[1],
            f"u({end:.0f}) - u(1): {means[1]:+.2f} nats.",
        ),
    )


def _sink_falls(study: LanguageStudy, name: str) -> str:
    seeds = study.rows("sink_mass", panel="d", variant=name).seed.unique()
    masses = {seed: pandas.Series(study.sinks(name, seed).mean_sink_mass) for seed in seeds}
    ranks = [float(mass.rank().corr(pandas.Series(range(len(mass))))) for mass in masses.values()]
    first, last = masses[study.recipe.seeds[0]].iloc[[0, -1]]
    rope_first, rope_last = study.sinks("rope", study.recipe.seeds[0]).mean_sink_mass[[0, -1]]
    return claim(
        f"{name}: sink mass falls as the signal grows, with a rank correlation below {-FALLS}",
        SeedInterval.of([-rank - FALLS for rank in ranks]),
        f"Rank correlation of mass and omega over the bins {SeedInterval.of(ranks):+.2f}. First seed: {first:.2g} in "
        f"the weakest bin of omega, {last:.2g} in the strongest (RoPE: {rope_first:.2g} and {rope_last:.2g}); uniform "
        f"attention would give {study.uniform_mass:.2g}.",
    )


def _formation(study: LanguageStudy) -> str:
    parts = []
    for decoder in study.recipe.variants:
        mass = study.formation(decoder.attention).mean(axis=1)
        parts.append(f"{decoder.attention} {mass.iloc[0]:.4f} to {mass.iloc[-1]:.4f}")
    return (
        f"- Sink formation: mean mass on the first token before training and after {mass.index[-1]:.0f} steps, over "
        f"blocks, heads, queries and seeds: {'; '.join(parts)}."
    )


def _rates(study: LanguageStudy) -> str:
    rates = study.recipe.sweep.rates
    chosen = {d.attention: study.rate(d.attention) for d in study.recipe.variants}
    ends = [name for name, rate in chosen.items() if rate in (min(rates), max(rates))]
    listed = ", ".join(f"{name} {rate:g}" for name, rate in chosen.items())
    return f"- Learning rates: {listed}; swept: {rates} (at an end of the range: {', '.join(ends) or 'none'})."


def _conditions(study: LanguageStudy) -> str:
    recipe = study.recipe
    tokens = recipe.training.steps * recipe.training.batch_size * recipe.train_length
    return (
        f"- {len(recipe.seeds)} seeds at scale `{recipe.scale}`, {tokens / 1e6:.1f} million training bytes a run, the "
        f"same for all; {study.origin()}. Rates were chosen on validation files; every number above is from held-out "
        f"files, which no run can read before the rates are stored."
    )


# Picture ------------------------------------------------------------------------------------------------------------


def draw(study: LanguageStudy) -> Picture:
    """(a) and (b) bits per byte by context, (c) u(j), (d) sink mass by signal and (e) by step, (f) rates."""
    figure, grid = panels(2, 3, size=(15.5, 8.6))
    (curves, close, key_only), (by_signal, by_step, rates) = grid
    order = [display_name(decoder.attention) for decoder in study.recipe.variants + study.recipe.contrasts]
    readings = [kind for kind, _ in study.recipe.readings]
    _draw_curves(study, [name for name in study.names if name not in readings], order, curves)
    _draw_readings(study, order, curves)
    _draw_curves(study, [name for name in study.names if name in ("alibi", *study.headline)], order, close)
    furthest = max(reversed(study.learned), key=study.reach)
    _draw_key_only(study, furthest, key_only)
    reports = {display_name(name): study.sinks(name, study.recipe.seeds[0]) for name in ("rope", *study.learned)}
    plot_sink_mass(reports, uniform_mass=study.uniform_mass, order=order, axes=by_signal)
    _draw_formation(study, by_step, order)
    _draw_sweep(study, rates, order)
    shown = f"learned u(j), {display_name(furthest)}"
    titles = ("length extrapolation", "the close curves", shown, "sink mass", "sink formation", "choice of rates")
    title_panels([curves, close, key_only, by_signal, by_step, rates], titles)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // 2), frameon=False, fontsize=9)
    for axes in (curves, close):
        axes.legend().remove()  # one above all panels covers no curve
    return figure


def _draw_curves(study: LanguageStudy, names: list[str], order: list[str], axes: Axes) -> None:
    """Means and 95 % intervals over seeds."""
    recipe = study.recipe
    found = {display_name(name): [study.mean_bits(name, length) for length in recipe.lengths] for name in names}
    curves = {label: [interval.mean for interval in intervals] for label, intervals in found.items()}
    errors = {label: [interval.half_width for interval in intervals] for label, intervals in found.items()}
    plot_length_curves(recipe.lengths, curves, errors=errors, train_length=recipe.train_length, order=order, axes=axes)


def _draw_readings(study: LanguageStudy, order: list[str], axes: Axes) -> None:
    """Trained decoders read with other positions: the colour of the decoder, broken lines."""
    styles, lengths = line_styles(order), study.recipe.lengths
    for (kind, trained), dashes in zip(study.recipe.readings, ("--", ":", "-."), strict=False):
        means, colour = [study.mean_bits(kind, n).mean for n in lengths], styles[display_name(trained)]["color"]
        axes.plot(lengths, means, linestyle=dashes, color=colour, label=display_name(kind))


def _draw_key_only(study: LanguageStudy, name: str, axes: Axes) -> None:
    """u(j) of every block of the first seed's decoder, averaged over heads, out to twice the training length."""
    length = study.recipe.train_length
    rows = study.rows("key_only_log_prior", variant=name, seed=study.recipe.seeds[0])
    shown = rows[rows.position < 2 * length].pivot_table(index="block", columns="position", values="value")
    labels = [f"block {block + 1:.0f}" for block in shown.index]
    positions = shown.columns.to_numpy()
    plot_key_only(shown.to_numpy(), positions=positions, labels=labels, train_length=length, axes=axes)
    if len(labels) > 3:
        shade_lines([line for line in axes.get_lines() if line.get_label() in labels])
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(labels) // 6)


def _draw_formation(study: LanguageStudy, axes: Axes, order: list[str]) -> None:
    """Mass on the first token while training, averaged over blocks, heads and queries; the band spans the seeds."""
    styles = line_styles(order)
    for decoder in study.recipe.variants:
        label, mass = display_name(decoder.attention), study.formation(decoder.attention)
        axes.plot(mass.index, mass.mean(axis=1), label=label, **(styles[label] | {"markersize": 3.5}))
        band = (mass.min(axis=1), mass.max(axis=1))
        axes.fill_between(mass.index, *band, color=styles[label]["color"], alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("mass on the first token, mean over queries")


def _draw_sweep(study: LanguageStudy, axes: Axes, order: list[str]) -> None:
    """Bits per byte on validation files against the learning rate; a ring marks the chosen rate."""
    styles, swept = line_styles(order), study.sweep()
    rates = list(study.recipe.sweep.rates)
    for name, bits in swept.iterrows():
        style = styles[display_name(str(name))]
        axes.plot(rates, bits[rates], label=display_name(str(name)), **style)
        axes.plot(bits.taken, bits[bits.taken], "o", markersize=11, fillstyle="none", color=style["color"])
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("bits per byte, validation files, short runs")
