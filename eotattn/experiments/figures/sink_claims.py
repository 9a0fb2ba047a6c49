"""What the records of the sink study say: intervals, the table, claims with verdicts of three values, the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

from eotattn.experiments.figures.sink_study import FIGURE
from eotattn.experiments.intervals import SeedInterval, claim
from eotattn.experiments.sink_measures import EPSILON
from eotattn.experiments.study import Study, paired, savings
from eotattn.plotting import line_styles, mosaic, plot_sink_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NAMES", "SinkStudy", "draw_sinks", "sink_verdict"]

#: Names in tables and legends.
NAMES = {
    "rope": "RoPE",
    "rope_without_token": "RoPE, no first token",
    "paper_goat": "GOAT, paper's form",
    "goat": "GOAT, default form",
    "alibi_goat": "GOAT, ALiBi slopes",
    "alibi_goat_forgetting": "GOAT + forgetting gate",
    "forgetting": "forgetting gate",
    "rope_key_only": "RoPE + u(j)",
    "rope_sink_logit": "RoPE + sink logit",
    "rope_zero_key": "RoPE + zero key",
    "rope_output_gate": "RoPE + output gate",
}


@dataclass(frozen=True, eq=False)
class SinkStudy(Study):
    """All runs of the study; columns arm, seed, quantity, value, and where it was measured."""

    figure = FIGURE
    may_be_partial = True

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms with a finished run, in the order of their names."""
        return tuple(arm for arm in NAMES if arm in set(self.table.arm))

    def rows(self, quantity: str, **where: Any) -> pandas.DataFrame:
        """Rows of one quantity, at the last step where there are several."""
        found = super().rows(quantity, **where)
        if "step" in found and found.step.notna().any():
            found = found[found.step == found.step.max()]
        return found

    def cost(self, arm: str, removed: str, *, beyond: str = "nothing") -> dict[int, float]:
        """Seed -> nats a token that are lost when something is removed, beyond what something else costs."""
        one, other = (self.of_seeds("loss_without", arm=arm, removed=name) for name in (removed, beyond))
        return {seed: one[seed] - other[seed] for seed in one if seed in other}

    def saving(self, arm: str, *, over: str, length: int) -> tuple[SeedInterval, SeedInterval]:
        """Nats a token that ``arm`` saves over another on test documents: over common seeds, and over documents."""
        return savings(*(self.rows("test_loss", arm=name, length=length) for name in (arm, over)))

    def strongest(self, arm: str, name: str) -> dict[int, float]:
        """Seed -> a number of the head with the most mass on the first token."""
        heads = self.rows("head_mass", arm=arm).set_index("seed")
        top = {int(s): each.loc[each.value.idxmax()] for s, each in heads.reset_index().groupby("seed")}
        rows = self.rows(f"head_{name}", arm=arm).set_index(["seed", "block", "head"]).value
        return {seed: float(rows[seed, each.block, each["head"]]) for seed, each in top.items()}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Contexts of the test documents."""
        lengths = self.table[self.table.quantity == "test_loss"].length.unique()
        return tuple(sorted(int(length) for length in lengths))

    def arm_table(self) -> pandas.DataFrame:
        """The table that readers get: one row an arm, means and 95 % intervals over seeds."""
        return pandas.DataFrame([self._row(arm) for arm in self.arms]).set_index("arm")

    def _row(self, arm: str) -> dict[str, str]:
        """One line of that table."""
        row = {"arm": NAMES[arm], "seeds": str(len(self.of_seeds("sink_rate", arm=arm)))}
        for length in self.lengths:
            row[f"nats at {length}"] = _said(self.interval("test_loss", arm=arm, length=length), ".3f")
        for name in ("mass", "margin", "prior_margin"):
            strongest = SeedInterval.of(list(self.strongest(arm, name).values()))
            row[f"strongest head: {name.replace('_', ' ')}"] = _said(strongest, ".2f")
        columns = {"sink_rate": ".2f", "margin_of_sinks": ".2f", "prior_share": ".2f", "key_only_of_sinks": ".2f"}
        columns |= {"outside": ".2f", "massive": ".0f", "kurtosis": ".0f", "value_norm_of_sinks": ".2f"}
        row |= {name.replace("_", " "): _said(self.interval(name, arm=arm), spec) for name, spec in columns.items()}
        for label, removed, beyond in (
            ("8 bits cost", "eight_bits", "nothing"),
            ("u cost", "key_only", "nothing"),
            ("far keys cost", "far_keys_but_the_first", "nothing"),
            ("the first key, then", "far_keys", "far_keys_but_the_first"),
        ):
            lost = list(self.cost(arm, removed, beyond=beyond).values())
            row[label] = _said(SeedInterval.of(lost) if lost else None, ".3f")
        return row


def _said(interval: SeedInterval | None, spec: str) -> str:
    if interval is None:
        return "-"
    return f"{interval.mean:{spec}}" if math.isnan(interval.half_width) else f"{interval:{spec}}"


# Claims -------------------------------------------------------------------------------------------------------------


def sink_verdict(study: SinkStudy) -> str:
    """The claims, the numbers and what became of them, in Markdown; intervals are of 95 %."""
    with_u = [arm for arm in study.arms if study.interval("key_only", arm=arm) is not None]
    with_prior = [arm for arm in study.arms if study.of_seeds("key_only_of_sinks", arm=arm)]
    others = [arm for arm in study.arms if arm not in ("rope", "rope_without_token")]
    lines = []
    if "rope_without_token" in study.arms:
        lines.append(_differ(study, "sinks need a first token", "rope", "rope_without_token", "sink_rate", ".2f"))
    lines += [_u_is_higher(study, arm) for arm in with_u]
    lines += [_most_is_prior(study, arm) for arm in with_prior]
    lines += [_strongest_is_prior(study, arm) for arm in with_u]
    lines += [_smaller(study, arm) for arm in others]
    lines += [_bits(study, arm) for arm in others]
    lines += [_first_key(study, arm) for arm in study.arms]
    lines += [_falls(study, protocol) for protocol in sorted(study.table.protocol.dropna().unique())]
    ends = (study.lengths[0], study.lengths[-1])
    lines += [_saves(study, arm, "rope", length) for arm in others for length in ends]
    order = ("alibi_goat_forgetting", "alibi_goat", "forgetting")
    lines += [
        _saves(study, better, worse, length)
        for better, worse in pairwise(order)
        for length in ends
        if {better, worse} <= set(study.arms)
    ]
    return "\n".join(lines)


def _line(text: str, interval: SeedInterval, spec: str, what: str) -> str:
    return claim(text, interval, f"{what} {interval:{spec}}, n = {interval.count}.")


def _differ(study: SinkStudy, text: str, arm: str, other: str, quantity: str, spec: str) -> str:
    ours, theirs = (study.of_seeds(quantity, arm=name) for name in (arm, other))
    what = f"{quantity.replace('_', ' ')}, {NAMES[arm]} less {NAMES[other]}:"
    return _line(text, paired(ours, theirs), "+" + spec, what)


def _u_is_higher(study: SinkStudy, arm: str) -> str:
    text = f"{NAMES[arm]}: u is higher at the first token than at the others"
    higher = SeedInterval.of(list(study.of_seeds("key_only", arm=arm).values()))
    return _line(text, higher, "+.2f", "u(0) less the mean of the others, nats, all heads:")


def _most_is_prior(study: SinkStudy, arm: str) -> str:
    shares = study.of_seeds("prior_share", arm=arm)
    text = f"{NAMES[arm]}: more than half of the margin of its sinks is prior"
    return _line(text, SeedInterval.of([share - 0.5 for share in shares.values()]), "+.2f", "Share less one half:")


def _strongest_is_prior(study: SinkStudy, arm: str) -> str:
    margin, prior = (study.strongest(arm, name) for name in ("margin", "prior_margin"))
    text = f"{NAMES[arm]}: the head with the most mass on the first token owes it to the prior more than to content"
    excess = SeedInterval.of([2 * prior[seed] - margin[seed] for seed in margin])
    return _line(text, excess, "+.2f", "Nats of the prior's part of its margin less the content's:")


def _smaller(study: SinkStudy, arm: str) -> str:
    rope, ours = ({s: math.log(x) for s, x in study.of_seeds("massive", arm=name).items()} for name in ("rope", arm))
    text = f"{NAMES[arm]}: the first token's activations are less massive than RoPE's"
    return _line(text, paired(rope, ours), "+.2f", "Logarithm of RoPE's ratio to the median over its own:")


def _bits(study: SinkStudy, arm: str) -> str:
    text = f"{NAMES[arm]}: eight bits cost less than they cost RoPE"
    saved = paired(study.cost("rope", "eight_bits"), study.cost(arm, "eight_bits"))
    return _line(text, saved, "+.4f", "Nats a token saved:")


def _first_key(study: SinkStudy, arm: str) -> str:
    text = f"{NAMES[arm]}: where far keys are dropped, the first one is missed"
    lost = SeedInterval.of(list(study.cost(arm, "far_keys", beyond="far_keys_but_the_first").values()))
    return _line(text, lost, "+.4f", "Nats a token lost without it:")


def _falls(study: SinkStudy, protocol: str) -> str:
    """Figure 2c in one protocol: how much mass the strongest bin has less than the weakest, and the untrained one."""
    parts = []
    for arm in study.arms:
        trained, untrained = (_fall(study, arm, protocol, state) for state in ("trained", "untrained"))
        parts.append(f"{NAMES[arm]} {trained:+.3f} (untrained {untrained:+.3f})")
    what = "mass in the weakest bin of the signal less that in the strongest"
    return f"- Figure 2c, {protocol}: {what}: {'; '.join(parts)}."


def _fall(study: SinkStudy, arm: str, protocol: str, state: str) -> SeedInterval:
    rows = study.rows("mass_by_signal", arm=arm, protocol=protocol, state=state).sort_values("signal")
    return SeedInterval.of([float(each.value.iloc[0] - each.value.iloc[-1]) for _, each in rows.groupby("seed")])


def _saves(study: SinkStudy, arm: str, over: str, length: int) -> str:
    by_seed, by_document = study.saving(arm, over=over, length=length)
    text = f"{NAMES[arm]} predicts better than {NAMES[over]} at {length} tokens"
    judged = by_document if by_seed.count == 1 else by_seed
    said = f"{by_seed:+.4f} over seeds; {by_document:+.4f} paired over {by_document.count} documents"
    return claim(text, judged, f"Nats a token saved: {said}.")


# Picture ------------------------------------------------------------------------------------------------------------


def draw_sinks(study: SinkStudy) -> Figure:
    """Above, every head of every arm: size is mass on the first token, colour how much of its margin is prior."""
    arms = study.arms
    rows = -(-len(arms) // 6)
    columns = max(3, -(-len(arms) // rows))
    below = ("last block, all queries", "all blocks, late queries", "outliers", "losses")
    cells = [*arms, *["."] * (rows * columns - len(arms))]
    maps = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [2.6] * rows + [3.6]
    layout = [*([arm for arm in row for _ in below] for row in maps), [name for name in below for _ in range(columns)]]
    figure, axes = mosaic(layout, size=(max(15.0, 2.6 * columns), sum(heights)), heights=heights)
    for arm in arms:
        mass, share = (_heads(study, arm, name) for name in ("mass", "prior_share"))
        plot_sink_heads(mass, share, threshold=EPSILON, axes=axes[arm], legend=arm == arms[-1])
        rate = _said(study.interval("sink_rate", arm=arm), ".2f")
        if arm not in [row[0] for row in maps]:
            axes[arm].set_ylabel("")
        axes[arm].set_title(f"{NAMES[arm]}\nsink rate {rate}", fontsize=9, loc="left")
    for protocol in below[:2]:
        _draw_signal(study, protocol, axes[protocol])
    axes[below[0]].legend(frameon=False, fontsize=8, loc="upper right")
    _draw_outliers(study, axes["outliers"])
    _draw_losses(study, axes["losses"])
    return figure


def _heads(study: SinkStudy, arm: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(blocks, heads) of the first seed: the mass, or the share of the prior in the margin, between 0 and 1."""

    def grid(quantity: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        rows = study.rows(f"head_{quantity}", arm=arm)
        rows = rows[rows.seed == rows.seed.min()]
        return rows.pivot(index="block", columns="head", values="value").to_numpy(dtype=np.float64)

    if name == "mass":
        return grid("mass")
    margin = grid("margin")
    return np.where(margin > 0, np.clip(grid("prior_margin") / margin, 0.0, 1.0), np.nan)


def _draw_signal(study: SinkStudy, protocol: str, axes: Axes) -> None:
    """Figure 2c by one protocol, and the networks before training; the first seed."""
    shown = [arm for arm in ("rope", "paper_goat", "goat", "alibi_goat") if arm in study.arms]
    styles = line_styles(shown, order=list(NAMES))
    for state in ("trained", "untrained"):
        for arm in shown:
            rows = study.rows("mass_by_signal", arm=arm, protocol=protocol, state=state).sort_values("signal")
            rows = rows[rows.seed == rows.seed.min()]
            colour = styles[arm]["color"] if state == "trained" else "0.65"
            label = NAMES[arm] if state == "trained" else "untrained" if arm == shown[-1] else None
            axes.plot(rows.signal, rows.value, color=colour, linewidth=1.3, label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel("signal strength ω (nats)", fontsize=9)
    axes.set_ylabel("mass on the first token", fontsize=9)
    axes.set_title(f"figure 2c: {protocol}", fontsize=9, loc="left")


def _bars(axes: Axes, arms: Sequence[str], intervals: Sequence[SeedInterval | None]) -> None:
    """One row an arm, in its colour."""
    styles = line_styles(arms, order=list(NAMES))
    for row, (arm, interval) in enumerate(zip(arms, intervals, strict=True)):
        if interval is not None:
            error, colour = 0.0 if math.isnan(interval.half_width) else interval.half_width, styles[arm]["color"]
            axes.errorbar(interval.mean, row, xerr=error, fmt="o", color=colour, capsize=2, markersize=4)
    axes.set_yticks(range(len(arms)), [NAMES[arm] for arm in arms], fontsize=7)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _draw_outliers(study: SinkStudy, axes: Axes) -> None:
    _bars(axes, study.arms, [study.interval("massive", arm=arm) for arm in study.arms])
    axes.set_xlim(left=0)
    axes.set_xlabel("largest activation / median", fontsize=9)
    axes.set_title("massive activations, first token", fontsize=9, loc="left")


def _draw_losses(study: SinkStudy, axes: Axes) -> None:
    arms = [arm for arm in study.arms if arm != "rope"]
    pairs = [study.saving(arm, over="rope", length=study.lengths[0]) for arm in arms]
    _bars(axes, arms, [seeds if seeds.count > 1 else documents for seeds, documents in pairs])
    axes.axvline(0.0, color="0.45", linestyle="--", linewidth=1)
    axes.set_xlabel("nats a token saved over RoPE", fontsize=9)
    axes.set_title(f"language, {study.lengths[0]} tokens", fontsize=9, loc="left")
