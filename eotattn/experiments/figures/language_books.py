"""Language on whole books: every kind of attention at its best, from the training length to 131 072 tokens.

Short of nothing but the attention: each arm tries the same rates of the content, with a slow and a fast log-prior where
it has one; validation authors choose, test authors judge. Every arm is read whole and through a sliding window, whose
recomputed positions no attention has to extrapolate.

From recipe to picture. Legend: N windows, L tokens, T scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch
from torch import Tensor

from eotattn.experiments.device import training_device
from eotattn.experiments.evaluation import sliding_pieces
from eotattn.experiments.figures import sink_study
from eotattn.experiments.intervals import SeedInterval, claim
from eotattn.experiments.interventions import target_losses
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig, display_name
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure, Study, as_table, savings, select
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.tasks.token_text import BOOKS, TokenText, Windows
from eotattn.experiments.training import TrainingConfig, TrainingResult, autocast, train, training_rows
from eotattn.plotting import line_styles, panels, title_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

__all__ = ["FIGURE", "Arm", "BooksRecipe", "BooksStudy", "Option", "draw", "measure", "recipe", "runs", "verdict"]

#: Nats a token that are asked for in distribution.
GAIN = 0.05

# Recipe -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One decoder: its attention, and how many training lengths of the others its windows are long."""

    attention: str
    stretch: int = 1

    @property
    def name(self) -> str:
        """In tables and file names."""
        return self.attention if self.stretch == 1 else f"{self.attention}_{self.stretch}x"

    @property
    def label(self) -> str:
        """In legends."""
        kind = display_name(self.attention)
        return kind if self.stretch == 1 else f"{kind}, trained on {self.stretch}x"


@dataclass(frozen=True)
class Option:
    """What is chosen: the rate of the content, and that of log-priors as its multiple."""

    rate: float
    prior_factor: float = 1.0

    @property
    def name(self) -> str:
        """In file names.

        Example:
            >>> Option(1e-3, 10).name
            'rate0.001-prior10'
        """
        return f"rate{self.rate:g}-prior{self.prior_factor:g}"


#: By priority; those with all seeds first.
HEADLINE = (Arm("rope"), Arm("alibi_goat"), Arm("paper_goat"), Arm("goat"))
OTHERS = (
    Arm("alibi"),
    Arm("forgetting"),
    Arm("alibi_goat_forgetting"),
    Arm("none"),
    Arm("rope", stretch=8),
    Arm("kerple"),
    Arm("t5"),
)


@dataclass(frozen=True)
class BooksRecipe:
    """The study at a scale.

    Args:
        scale: Name of the scale.
        corpus: As in :meth:`TokenText.open`; windows begin with its first token.
        headline: Arms that run with all seeds.
        others: Arms that run with the first.
        decoder: Their sizes; the attention is replaced.
        training: The run; seed and rates are replaced. Arms of longer windows have fewer of them a step.
        rates: Of the content.
        prior_factors: Of log-priors, for arms that have one or other numbers of nats.
        seeds: Of weights and batches; the first one chooses.
        choice_windows: Validation windows that judge.
        lengths: Contexts on test documents; the first is the training length, whose last tokens are scored.
        near_windows: Windows up to ``middle`` tokens, and how many of them one document gives at most.
        far_windows: The same at all lengths, on the documents that are long enough.
        middle: The longest context of near windows.
        readings: Kinds of attention that arms trained as "rope" are also read as.
    """

    scale: str
    corpus: str
    headline: tuple[Arm, ...]
    others: tuple[Arm, ...]
    decoder: DecoderConfig
    training: TrainingConfig
    rates: tuple[float, ...]
    prior_factors: tuple[float, ...]
    seeds: tuple[int, ...]
    choice_windows: int
    lengths: tuple[int, ...]
    near_windows: tuple[int, int]
    far_windows: tuple[int, int]
    middle: int
    readings: tuple[str, ...] = ("ntk_rope", "yarn_rope")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All of them."""
        return self.headline + self.others

    def options(self, arm: Arm) -> tuple[Option, ...]:
        """What an arm tries."""
        kind = ATTENTION_KINDS[arm.attention]
        has_nats = (kind.prior is not None and arm.attention not in ("alibi", "forgetting")) or kind.sinks is not None
        factors = self.prior_factors if has_nats else (1.0,)
        return tuple(Option(rate, factor) for factor in factors for rate in self.rates)


_GPU = sink_study.recipe("gpu")
_SMOKE = sink_study.recipe("smoke")

RECIPES = {
    "smoke": BooksRecipe(
        scale="smoke",
        corpus=PYTHON_STDLIB,
        headline=HEADLINE[:2],
        others=(Arm("rope", stretch=2),),
        decoder=_SMOKE.decoder,
        training=replace(_SMOKE.training, steps=4, log_every=2, evaluate_every=0),
        rates=(1e-3, 3e-3),
        prior_factors=(1.0, 10.0),
        seeds=(0, 1),
        choice_windows=4,
        lengths=(32, 64, 128, 256),
        near_windows=(8, 2),
        far_windows=(4, 2),
        middle=128,
    ),
    "gpu": BooksRecipe(
        scale="gpu",
        corpus=BOOKS,
        headline=HEADLINE,
        others=OTHERS,
        decoder=_GPU.decoder,
        training=replace(_GPU.training, evaluate_every=0),  # 144e6 tokens
        rates=(5e-4, 1e-3, 2e-3),
        prior_factors=(1.0, 10.0),
        seeds=(0, 1, 2, 3, 4),
        choice_windows=128,
        lengths=(1024, 2048, 4096, 16_384, 65_536, 131_072),
        near_windows=(128, 2),
        far_windows=(24, 3),
        middle=16_384,
    ),
}


def recipe(scale: str = "gpu") -> BooksRecipe:
    """The study at a scale.

    Example:
        >>> recipe("gpu").options(Arm("goat"))[-1]
        Option(rate=0.002, prior_factor=10.0)
    """
    return RECIPES[check_scale("language_books", scale, RECIPES)]


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BooksRun(TrainedRun):
    """One arm with one option and seed; other fields as in :class:`BooksRecipe`."""

    corpus: str
    arm: Arm
    option: Option
    decoder: DecoderConfig
    training: TrainingConfig
    choice_windows: int
    lengths: tuple[int, ...]
    near_windows: tuple[int, int]
    far_windows: tuple[int, int]
    middle: int
    readings: tuple[str, ...]


def runs(recipe: BooksRecipe, records: Records) -> list[Run]:
    """The headline arms, then the others: a choosing run an option, then what validation chose, seed by seed."""
    found = _stage(recipe, records, recipe.headline, recipe.seeds)
    if all(run.name in records for run in found):
        found += _stage(recipe, records, recipe.others, recipe.seeds[:1])
    return found


def _stage(recipe: BooksRecipe, records: Records, arms: tuple[Arm, ...], seeds: tuple[int, ...]) -> list[Run]:
    table, first = as_table(records), seeds[0]
    choosing = {
        (arm, option): Run(f"choose-{arm.name}-{option.name}", _run(recipe, arm, option, first), choose, chooses=True)
        for arm in arms
        for option in recipe.options(arm)
    }
    best = {arm: best_option(recipe, table, arm) for arm in arms}
    reports = [(arm, option, seed) for seed in seeds for arm, option in best.items() if option is not None]
    return [*choosing.values()] + [
        Run(
            f"{arm.name}-seed{seed}",
            _run(recipe, arm, option, seed),
            measure,
            continues=choosing[arm, option] if seed == first else None,
        )
        for arm, option, seed in reports
    ]


def _run(recipe: BooksRecipe, arm: Arm, option: Option, seed: int) -> BooksRun:
    decoder = replace(recipe.decoder, attention=arm.attention, train_length=arm.stretch * recipe.decoder.train_length)
    training = recipe.training.at(option.rate, seed=seed, prior_rate_factor=option.prior_factor)
    training = replace(training, batch_size=training.batch_size // arm.stretch)
    own: dict[str, Any] = {"arm": arm, "option": option, "decoder": decoder, "training": training}
    return taken_from(recipe, BooksRun, **own, readings=recipe.readings if arm.attention == "rope" else ())


def best_option(recipe: BooksRecipe, table: pandas.DataFrame, arm: Arm) -> Option | None:
    """The option with the least loss on validation documents; None until all are judged."""
    losses = {}
    for option in recipe.options(arm):
        rows = select(table, quantity="choice_loss", arm=arm.name, rate=option.rate, prior_factor=option.prior_factor)
        if rows.empty:
            return None
        losses[option] = float(rows.value.iloc[-1])
    return min(losses, key=lambda option: (math.isnan(losses[option]), losses[option]))


FIGURE = Figure("fig_books", recipe, runs, tuple(RECIPES))


def _train(run: BooksRun, checkpoint: Path) -> tuple[TokenText, Decoder, TrainingResult]:
    text = TokenText.open(run.corpus)
    text.check_long_enough("test", run.lengths[-1])  # before any training
    network = Decoder(run.decoder).to(training_device())
    task = text.training(run.decoder.train_length, begins=True)
    label = f"{run.arm.name}, {run.option.name}, seed {run.seed}"
    return text, network, train(network, task, run.training, label=label, checkpoint=checkpoint)


def _of(run: BooksRun, rows: list[Row]) -> list[Row]:
    place = {"arm": run.arm.name, "rate": run.option.rate, "prior_factor": run.option.prior_factor}
    return [place | row for row in rows]


def choose(run: BooksRun, checkpoint: Path) -> Measurement:
    """Train a decoder; its loss on validation documents, at the length that all are scored at, judges its rates."""
    text, network, training = _train(run, checkpoint)
    near = run.lengths[0]
    windows = text.windows("validation", near, per_document=8, limit=run.choice_windows).tokens
    with autocast(run.training, training_device()):
        losses = target_losses(network, windows, length=near, num_targets=near, beginning=text.beginning)
    loss = float(losses.mean())
    rows = [*training_rows(training), {"quantity": "choice_loss", "unit": "nats per token", "value": loss}]
    rows.append({"quantity": "training_seconds", "unit": "seconds", "value": training.wall_seconds})
    return Measurement(_of(run, rows), f"validation {loss:.4f} nats a token", text.fingerprint)


def measure(run: BooksRun, checkpoint: Path) -> Measurement:
    """Train a decoder and read the last tokens of every test window with all contexts, whole and otherwise."""
    text, network, training = _train(run, checkpoint)
    rows = training_rows(training)
    counts = {"near": (run.near_windows, run.middle), "far": (run.far_windows, run.lengths[-1])}
    with autocast(run.training, training_device()):
        for where, ((limit, per_document), longest) in counts.items():
            windows = text.windows("test", longest, per_document=per_document, limit=limit)
            for reading, length, losses in _readings(network, run, windows.tokens, text.beginning):
                place = {"where": where, "reading": reading, "length": length}
                rows += [place | row for row in _document_rows(windows, losses)]
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    rows.append({"quantity": "parameters", "unit": "count", "value": count})
    tokens = run.training.steps * run.training.batch_size * run.decoder.train_length
    rows.append({"quantity": "training_tokens", "unit": "tokens", "value": tokens})
    here = ("near", "whole", run.lengths[0])
    own = [row["value"] for row in rows if (row.get("where"), row.get("reading"), row.get("length")) == here]
    summary = f"test {sum(own) / len(own):.4f} nats a token at {run.lengths[0]}"
    return Measurement(_of(run, rows), summary, text.fingerprint)


def _readings(network: Decoder, run: BooksRun, windows: Tensor, beginning: int) -> Iterator[tuple[str, int, Tensor]]:
    """(reading, context, (N,) mean loss of the last T tokens of every window), T the first of the lengths."""
    near = run.lengths[0]
    kinds = {"whole": network} | {kind: network.read_as(kind) for kind in run.readings}
    for length in (length for length in run.lengths if length < windows.shape[1]):
        for reading, reader in kinds.items():
            if reading == "whole" or length > run.decoder.train_length:  # where it makes a difference
                losses = target_losses(reader, windows, length=length, num_targets=near, beginning=beginning)
                yield reading, length, losses
    for reading, kept in (("sliding window", 0), ("first and recent", 4)):
        window = run.decoder.train_length
        options = {"length": window, "stride": near // 2, "keep_first": kept}
        pieces = sliding_pieces(windows, num_targets=near, **options)
        losses = target_losses(network, pieces, length=window, num_targets=near // 2, beginning=beginning)
        yield reading, windows.shape[1] - 1, losses.view(len(windows), -1).mean(-1)


def _document_rows(windows: Windows, losses: Tensor) -> list[Row]:
    """One row a document, the mean of its windows, so that arms are compared document by document."""
    return [
        {"quantity": "test_loss", "document": document, "value": float(losses[windows.documents == document].mean())}
        for document in torch.unique(windows.documents).tolist()
    ]


# Table and claims ---------------------------------------------------------------------------------------------------


class BooksStudy(Study):
    """All arms and readings; arms whose runs are missing are left out."""

    recipe: BooksRecipe
    figure = FIGURE
    may_be_partial = True

    @property
    def arms(self) -> dict[str, Arm]:
        """Arms with a finished report, by name."""
        known = set(self.rows("test_loss").get("arm", ()))
        return {arm.name: arm for arm in self.recipe.arms if arm.name in known}

    def losses(self, arm: str, length: int, *, reading: str = "whole") -> pandas.DataFrame:
        """Rows of test losses at a context, near ones where there are some: of more documents."""
        where = "near" if length <= self.recipe.middle else "far"
        if reading in ("sliding window", "first and recent"):
            length = self.recipe.middle if where == "near" else self.recipe.lengths[-1]
        return self.rows("test_loss", arm=arm, length=length, reading=reading, where=where)

    def mean_loss(self, arm: str, length: int, *, reading: str = "whole") -> SeedInterval | None:
        """Nats a token over seeds."""
        by_seed = self.losses(arm, length, reading=reading).groupby("seed").value.mean()
        return SeedInterval.of(by_seed.tolist()) if len(by_seed) else None

    def saving(
        self, arm: str, over: str, length: int, *, reading: str = "whole", other: str = "whole"
    ) -> tuple[SeedInterval, SeedInterval]:
        """Nats a token that an arm saves over another: over common seeds, and over documents."""
        return savings(self.losses(arm, length, reading=reading), self.losses(over, length, reading=other))

    def option(self, arm: str) -> Option | None:
        """What validation chose for an arm."""
        return best_option(self.recipe, self.table, self.arms[arm])

    def table_of_arms(self) -> pandas.DataFrame:
        """Nats a token by arm (rows) and context, whole and through a window; costs, and what was chosen."""
        first, middle, last = self.recipe.lengths[0], self.recipe.middle, self.recipe.lengths[-1]
        found = {}
        for name, arm in self.arms.items():
            row = {f"{n}": self.mean_loss(name, n) for n in (first, middle, last)}
            row |= {f"{n}, sliding window": self.mean_loss(name, n, reading="sliding window") for n in (middle, last)}
            said: dict[str, Any] = {key: "-" if each is None else f"{each:.4f}" for key, each in row.items()}
            chosen = self.option(name)
            costs = {"parameters": "parameters", "seconds of training": "training_seconds"}
            said |= {key: f"{self.rows(name_of, arm=name).value.max():.0f}" for key, name_of in costs.items()}
            found[arm.label] = said | {"chosen": "-" if chosen is None else chosen.name}
        return pandas.DataFrame(found).T

    def sweep(self) -> pandas.DataFrame:
        """Loss on validation documents by arm (rows) and option."""
        rows = self.rows("choice_loss")
        return rows.pivot_table(index="arm", columns=["prior_factor", "rate"], values="value", sort=False)

    def best_prior(self) -> str | None:
        """The arm with a log-prior that validation likes best, among those that are read."""
        losses = self.rows("choice_loss").groupby("arm").value.min()
        known = [name for name in self.arms if name in losses and ATTENTION_KINDS[self.arms[name].attention].prior]
        return min(known, key=lambda name: float(losses[name]), default=None)


def verdict(study: BooksStudy) -> str:
    """The claims, the numbers and what became of them, in Markdown; intervals are of 95 %.

    Margins are over common seeds, where there are several; else over documents.
    """
    near, far = study.recipe.lengths[0], study.recipe.lengths[-1]
    others = [name for name in study.arms if name != "rope"] if "rope" in study.arms else []
    lines = [_saves(study, name, "rope", near, at_least=GAIN) for name in others if study.arms[name].stretch == 1]
    for name in others:
        if study.arms[name].stretch == 1:
            lines.append(_saves(study, name, "rope", far, other="sliding window"))
            longer = [other for other in study.arms if study.arms[other].stretch > 1]
            lines += [_saves(study, name, other, far, other="sliding window") for other in longer]
    lines += [_read_otherwise(study, name, far) for name in study.arms]
    best = study.best_prior()
    if best is not None:
        rivals = [name for name in others if name != best and study.arms[name].stretch == 1]
        lines.append(f"- The prior that validation likes best: {study.arms[best].label}.")
        lines += [_saves(study, best, rival, near) for rival in rivals]
    tokens = study.rows("training_tokens").value
    said = f"{tokens.min() / 1e6:.0f} M training tokens an arm; " if len(tokens) else ""
    lines.append(f"- {said}{study.origin()}. Rates were chosen on validation authors before test authors were read.")
    return "\n".join(lines)


def _read_otherwise(study: BooksStudy, arm: str, length: int) -> str:
    readings = study.rows("test_loss", arm=arm, where="far").reading.unique()
    losses = {reading: study.mean_loss(arm, length, reading=reading) for reading in readings}
    said = ", ".join(f"{reading.replace('_', ' ')} {loss:.4f}" for reading, loss in losses.items() if loss is not None)
    return f"- {study.arms[arm].label} at {length} tokens, nats a token by how it is read: {said}."


def _saves(study: BooksStudy, arm: str, over: str, length: int, *, other: str = "whole", at_least: float = 0.0) -> str:
    seeds, documents = study.saving(arm, over, length, other=other)
    judged = seeds if seeds.count > 1 else documents
    margin = SeedInterval(judged.mean - at_least, judged.half_width, judged.count)
    read = "" if other == "whole" else " read through a sliding window"
    asked = f", by at least {at_least} nats" if at_least else ""
    return claim(
        f"{study.arms[arm].label} predicts better than {study.arms[over].label}{read} at {length} tokens{asked}",
        margin,
        f"Nats a token saved: {seeds:+.4f} over seeds; {documents:+.4f} paired over {documents.count} documents.",
    )


# Picture ------------------------------------------------------------------------------------------------------------


def draw(study: BooksStudy) -> Picture:
    """(a) loss by context, on documents long enough for all, (b) saved over RoPE at the training length, (c) rates."""
    figure, grid = panels(1, 3, size=(16.0, 5.2))
    curves, savings, rates = grid[0]
    styles = line_styles([arm.label for arm in study.recipe.arms])
    for name, arm in study.arms.items():
        _draw_curve(study, name, styles[arm.label], curves)
    curves.set_xscale("log", base=2)
    curves.set_xticks(study.recipe.lengths, [f"{n // 1024}k" if n >= 1024 else f"{n}" for n in study.recipe.lengths])
    curves.minorticks_off()
    curves.set_xlabel("context (tokens)")
    curves.set_ylabel("nats a token, test authors")
    rows = [name for name in study.arms if name != "rope" and study.arms[name].stretch == 1]
    for place, name in enumerate(rows if "rope" in study.arms else []):
        seeds, documents = study.saving(name, "rope", study.recipe.lengths[0])
        shown, style = seeds if seeds.count > 1 else documents, styles[study.arms[name].label]
        savings.errorbar(shown.mean, place, xerr=shown.half_width, fmt="o", color=style["color"], capsize=3)
    savings.set_yticks(range(len(rows)), [study.arms[name].label for name in rows], fontsize=8)
    savings.axvline(0, color="0.45", linewidth=1)
    savings.axvline(GAIN, color="0.45", linestyle=":", linewidth=1)
    savings.set_xlabel(f"nats a token saved over RoPE, {study.recipe.lengths[0]} tokens")
    for name, losses in study.sweep().iterrows():
        label = next((arm.label for arm in study.recipe.arms if arm.name == name), str(name))
        for factor, each in losses.dropna().groupby(level=0):
            line = "-" if factor == 1 else "--"
            rates.plot(each.index.get_level_values("rate"), each, **(styles[label] | {"linestyle": line}))
    rates.set_xscale("log")
    rates.set_xlabel("learning rate (dashed: log-prior ten times as fast)")
    rates.set_ylabel("nats a token, validation authors")
    title_panels([curves, savings, rates], ("context", "in distribution", "choice of rates"))
    figure.legend(*curves.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return figure


def _draw_curve(study: BooksStudy, name: str, style: dict[str, Any], axes: Axes) -> None:
    """The first seed on the far documents; a dotted line is its sliding window."""
    rows = study.rows("test_loss", arm=name, where="far", seed=study.recipe.seeds[0])
    whole = select(rows, reading="whole").groupby("length").value.mean()
    axes.plot(whole.index, whole, label=study.arms[name].label, **style)
    sliding = select(rows, reading="sliding window").value.mean()
    axes.axhline(sliding, color=style["color"], linestyle=":", linewidth=1)
