"""The ablations: which prior is good in distribution and far beyond it, on language and on retrieval alike?

From recipe to picture. Legend: S seeds, N lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
from numpy.typing import NDArray

from eotattn.experiments.evaluation import target_bits
from eotattn.experiments.figures import fig3_retrieval
from eotattn.experiments.figures.fig3_retrieval import RetrievalRun
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.intervals import verdict as decide
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure, Study, paired
from eotattn.experiments.tasks import LanguageTask, RetrievalTask
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.tasks.retrieval import ALPHABET
from eotattn.experiments.training import TrainingConfig, autocast, train, training_rows
from eotattn.plotting import panels, plot_ranking, title_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

__all__ = ["FIGURE", "VARIANTS", "AblationRecipe", "AblationStudy", "draw", "recipe", "runs", "verdict"]

#: Mean accuracy that counts as retrieving nearly everything, and a difference of accuracies that does not count.
KEPT, TOLERATED = 0.99, 0.01
#: Judge -> what it measures; for language less is better.
JUDGES = {"language": "bits_per_byte", "passkey": "exact_match", "needle": "token_accuracy"}

# Recipe -------------------------------------------------------------------------------------------------------------

#: Name of the attention -> what it is made of.
VARIANTS = {
    "goat": "split: local heads, global heads",
    "local_rotary_goat": "split, local heads rotary",
    "rope": "RoPE",
    "ntk_rope": "RoPE, NTK-aware scaling",
    "alibi": "ALiBi: fixed slopes",
    "none": "no positions",
    "paper_goat": "paper: waves, slopes, u(j)",
    "rotary_goat": "paper, on rotary content",
    "recency_only": "slopes alone",
    "relative_only": "waves alone",
    "sink_only": "u(j) alone",
    "without_waves": "paper without waves",
    "one_wave": "paper, one frequency",
    "sixteen_waves": "paper, 16 frequencies",
    "tied_waves": "paper, waves within the training length",
    "shared_waves": "paper, waves and u(j) shared by heads",
    "held_sink": "paper, u(j) constant beyond training",
    "floored_slopes": "paper, slopes above half of ALiBi's",
    "growing_scores": "paper, scores times ln(length)",
    "fast_goat": "split, prior at 10 times the rate",
    "fast_paper_goat": "paper, prior at 10 times the rate",
    "decaying_waves": "paper, waves with weight decay",
    "narrow_lanes": "paper, lanes of one bfloat16 number each",
    "tied_slopes": "slopes up to 8 training lengths",
    "half_global": "half of the heads global, no waves",
}

#: Variants that run with every seed.
REPEATED = ("rope", "alibi", "paper_goat", "goat", "fast_goat", "local_rotary_goat")

#: Variants that the small scales run beside them.
ALSO_SMALL = ("fast_paper_goat", "decaying_waves", "narrow_lanes")


@dataclass(frozen=True)
class AblationRecipe:
    """Every variant on both tasks.

    Args:
        scale: Name of the scale.
        corpus: Text of the language task, as in :func:`eotattn.experiments.tasks.find_texts`.
        decoders: One a variant; equal but for the attention. The vocabulary is the task's own.
        language: Training on language, once a variant and seed.
        retrieval: Training on retrieval, once a variant and seed.
        seeds: Seeds of weights and batches.
        repeated: Variants that run with every seed; the others run with the first alone.
        length_factors: Examined contexts as multiples of the training length; the last is the judge of extrapolation.
        depths: Examined depths of retrieval, 0 to 1.
        windows: Held-out windows of language.
        count: Sequences examined a retrieval task, length and depth.
    """

    scale: str
    corpus: str
    decoders: tuple[DecoderConfig, ...]
    language: TrainingConfig
    retrieval: TrainingConfig
    seeds: tuple[int, ...]
    repeated: tuple[str, ...]
    length_factors: tuple[int, ...]
    depths: tuple[float, ...]
    windows: int
    count: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Examined contexts, tokens."""
        return tuple(factor * self.decoders[0].train_length for factor in self.length_factors)

    def seeds_of(self, variant: str) -> tuple[int, ...]:
        """Seeds that a variant runs with."""
        return self.seeds if variant in self.repeated else self.seeds[:1]


SMOKE = TrainingConfig(steps=2, batch_size=4, log_every=1)

LAPTOP = TrainingConfig(
    steps=300,
    batch_size=32,
    learning_rate=3e-3,
    prior_learning_rate=3e-3,
    warmup_steps=50,
    log_every=50,
    checkpoint_every=400,
)

H200 = TrainingConfig(
    steps=500,
    batch_size=32,
    learning_rate=1e-3,
    prior_learning_rate=1e-3,
    warmup_steps=100,
    log_every=50,
    precision="bf16",
)

#: Scale -> training on language and on retrieval.
TRAININGS = {"smoke": (SMOKE, SMOKE), "laptop": (LAPTOP, replace(LAPTOP, steps=800))}
#: Retrieval takes the paper's steps and rate of figure 3: baselines do not learn it at the rate of language.
H200_TRAINING = (
    H200,
    replace(H200, steps=2000, learning_rate=3e-4, prior_learning_rate=3e-4, warmup_steps=400),
)


def recipe(scale: str = "laptop") -> AblationRecipe:
    """The ablations at a scale; ``"paper"`` is ``"h200"``, since the paper has none. Nothing is chosen in them.

    Example:
        >>> recipe("laptop").lengths
        (64, 256, 1024)
    """
    check_scale("ablations", scale)
    is_small = scale in ("smoke", "laptop")
    sizes: dict[str, Any] = {"num_layers": 4, "embed_dim": 256, "num_heads": 8, "num_frequencies": 8}
    if is_small:
        sizes = {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_frequencies": 4}
    sizes |= {"train_length": 64 if is_small else 256, "min_period": 2 * math.pi, "max_period": 2 * math.pi * 10_000}
    names = (*REPEATED, *ALSO_SMALL) if is_small else tuple(VARIANTS)
    language, retrieval = TRAININGS.get(scale, H200_TRAINING)
    return AblationRecipe(
        scale=scale,
        corpus=PYTHON_STDLIB,
        decoders=tuple(DecoderConfig(name, vocabulary_size=max(256, len(ALPHABET)), **sizes) for name in names),
        language=language,
        retrieval=retrieval,
        seeds=(0,) if is_small else (0, 1, 2),
        repeated=REPEATED,
        length_factors=(1, 2) if scale == "smoke" else (1, 4, 16),
        depths=(0.1, 0.9) if scale == "smoke" else (0.1, 0.5, 0.9),
        windows={"smoke": 4, "laptop": 96}.get(scale, 64),
        count={"smoke": 4}.get(scale, 32),
    )


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageAblation(TrainedRun):
    """One decoder, trained and measured on language, also as the kinds that are trained as this one."""

    decoder: DecoderConfig
    corpus: str
    training: TrainingConfig
    lengths: tuple[int, ...]
    windows: int
    also_read_as: tuple[str, ...] = ()


def runs(recipe: AblationRecipe, records: Records) -> list[Run]:
    """Two runs a seed and variant that trains, one a task; the first seed's come first."""
    found = []
    for seed in recipe.seeds:
        for decoder in recipe.decoders:
            name = decoder.attention
            if decoder.kind.trained_as is not None or seed not in recipe.seeds_of(name):
                continue
            also = tuple(other.attention for other in recipe.decoders if other.kind.trained_as == name)
            language, retrieval = (
                training.at(training.learning_rate, seed=seed, prior_rate_factor=decoder.kind.prior_rate_factor)
                for training in (recipe.language, recipe.retrieval)
            )
            reader, finder = (replace(decoder, vocabulary_size=size) for size in (256, len(ALPHABET)))
            task, own = RetrievalTask(finder.train_length), {"also_read_as": also}
            on_language = taken_from(recipe, LanguageAblation, decoder=reader, training=language, **own)
            on_retrieval = taken_from(recipe, RetrievalRun, decoder=finder, task=task, training=retrieval, **own)
            found.append(Run(f"language-{name}-seed{seed}", on_language, measure_language))
            found.append(Run(f"retrieval-{name}-seed{seed}", on_retrieval, fig3_retrieval.measure))
    return found


FIGURE = Figure("ablations", recipe, runs)


def measure_language(run: LanguageAblation, checkpoint: Path) -> Measurement:
    """Train a decoder on bytes and measure the last bytes of held-out windows at every length."""
    near, own = run.decoder.train_length, run.decoder.attention
    task = LanguageTask.from_corpus(run.corpus, length=near)
    windows = task.held_out_windows(run.lengths[-1], run.windows)  # fails before any training
    network = Decoder(run.decoder)
    training = train(network, task, run.training, label=f"{own}, language", checkpoint=checkpoint)
    rows: list[Row] = []
    with autocast(run.training, network.embedding.weight.device):
        for variant in (own, *run.also_read_as):
            reader = network.read_as(variant)
            for length in run.lengths:
                bits = target_bits(reader, windows, length=length, num_targets=near)
                place = {"variant": variant, "length": length, "count": run.windows, "unit": "bits"}
                rows.append(place | {"quantity": JUDGES["language"], "value": float(bits.mean())})
                rows += [
                    place | {"quantity": "window_bits", "window": n, "value": float(x)} for n, x in enumerate(bits)
                ]
    means = [f"{row['value']:.3f}" for row in rows if (row["variant"], row["quantity"]) == (own, "bits_per_byte")]
    rows = [{"variant": own, "task": "language"} | row for row in rows + training_rows(training)]
    return Measurement(rows, "bits per byte " + ", ".join(means), task.fingerprint)


# Table and claims ---------------------------------------------------------------------------------------------------


class AblationStudy(Study):
    """All variants on both tasks."""

    recipe: AblationRecipe
    figure = FIGURE

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return tuple(decoder.attention for decoder in self.recipe.decoders)

    def values(self, variant: str, judge: str) -> NDArray[np.float64]:
        """(S, N) what a judge measured, by seed and length, mean over depths."""
        return self.grid(JUDGES[judge], "seed", "length", variant=variant, task=judge)

    def retrieval(self, variant: str) -> NDArray[np.float64]:
        """(S, N) mean of passkey and needle."""
        return (self.values(variant, "passkey") + self.values(variant, "needle")) / 2

    def summary(self) -> pandas.DataFrame:
        """Mean over seeds of every variant (rows): bits per byte near and far, retrieval near and far."""
        found = {}
        for name in self.variants:
            bits, right = self.values(name, "language").mean(0), self.retrieval(name).mean(0)
            found[name] = {"bits near": bits[0], "bits far": bits[-1], "found near": right[0], "found far": right[-1]}
        return pandas.DataFrame(found).T

    def margins(self, variant: str) -> dict[str, SeedInterval]:
        """How much better than RoPE near, and than ALiBi far, paired by common seeds; in retrieval, a hundredth more.

        A hundredth of accuracy does not count: many variants retrieve everything, as these do.
        """
        found = {}
        for what, peer, k in (("near", "rope", 0), ("far", "alibi", -1)):
            ours, theirs = (dict(enumerate(self.values(name, "language")[:, k])) for name in (variant, peer))
            found[f"bits {what}"] = paired(theirs, ours)
            ours, theirs = (
                dict(enumerate(self.retrieval(name)[:, k] + more)) for name, more in ((variant, TOLERATED), (peer, 0.0))
            )
            found[f"found {what}"] = paired(ours, theirs)
        return found

    def standing(self, variant: str) -> str:
        """Whether all four margins are above zero: held, refuted (one is below), or undecided."""
        decided = {decide(margin) for margin in self.margins(variant).values()}
        return "held" if decided == {"held"} else "refuted" if "refuted" in decided else "undecided"

    def answers(self) -> list[str]:
        """Variants as good as RoPE at the training length and as ALiBi at the longest, by means over seeds."""
        summary = self.summary()
        rope, alibi = summary.loc["rope"], summary.loc["alibi"]
        as_rope = (summary["bits near"] <= rope["bits near"]) & (summary["found near"] >= rope["found near"])
        as_alibi = (summary["bits far"] <= alibi["bits far"]) & (summary["found far"] >= alibi["found far"])
        return [name for name in summary.index[as_rope & as_alibi] if name not in ("rope", "alibi")]

    def table_of_judges(self) -> pandas.DataFrame:
        """Each judge by variant (rows), at the training length and at the longest: mean over seeds, and the worst."""
        near, far = self.recipe.length_factors[0], self.recipe.length_factors[-1]
        found = {}
        for variant in self.variants:
            row: dict[str, float] = {}
            for judge in JUDGES:
                values = self.values(variant, judge)
                row |= {f"{judge} {near}x": values[:, 0].mean(), f"{judge} {far}x": values[:, -1].mean()}
                row[f"{judge} {far}x worst seed"] = values[:, -1].max() if judge == "language" else values[:, -1].min()
            found[variant] = row
        return pandas.DataFrame(found).T


def verdict(study: AblationStudy) -> str:
    """The question, the answer and its numbers, in Markdown."""
    recipe, summary, answers = study.recipe, study.summary(), study.answers()
    far = recipe.length_factors[-1]
    named = ", ".join(f"`{name}`" for name in answers) if answers else "none of these variants"
    lines = [
        f"- **Which trainable prior extrapolates at least as well as ALiBi and is at least as good in distribution "
        f"as RoPE, on language and on retrieval? By means over seeds: {named}.**"
    ]
    if answers:
        kept = ", ".join(f"`{name}`" for name in answers if summary["found far"][name] >= KEPT) or "none"
        lines.append(f"- Of these, retrieval at {far}x is at least {KEPT} (ALiBi's is no high bar) with: {kept}.")
    shown = dict.fromkeys(("rope", "alibi", "paper_goat", "goat", "local_rotary_goat", *answers))
    for name in [name for name in shown if name in study.variants]:
        row = summary.loc[name]
        text = (
            f"`{name}`: {row['bits near']:.3f} bits per byte at the training length and {row['bits far']:.3f} at "
            f"{far}x; retrieval {row['found near']:.3f} and {row['found far']:.3f}"
        )
        if name in ("rope", "alibi"):
            lines.append(f"- {text}.")
        else:
            margins = study.margins(name)
            lines.append(
                f"- **{name} better than RoPE near and ALiBi far, on both: {study.standing(name)}.** {text}. Paired by "
                f"seed it saves {margins['bits near']:+.3f} bits near and {margins['bits far']:+.3f} far."
            )
    for column, what in QUANTITIES.items():
        best = summary[column].sort_values(ascending=column.startswith("bits"), kind="stable")[:3]
        listed = ", ".join(f"`{name}` {value:.3f}" for name, value in best.items())
        lines.append(f"- Best in {what.format(far=far)}: {listed}.")
    count = len(recipe.seeds)
    once = [name for name in study.variants if len(study.values(name, "language")) < count]
    but = f", one of {', '.join(f'`{name}`' for name in once)}" if once else ""
    lines.append(f"- {count} seed{'s' if count > 1 else ''}{but} at scale `{recipe.scale}`; {study.origin()}.")
    return "\n".join(lines)


#: Column of the summary -> in words.
QUANTITIES = {
    "bits near": "bits per byte at the training length",
    "bits far": "bits per byte at {far}x",
    "found near": "retrieval at the training length",
    "found far": "retrieval at {far}x",
}

# Picture ------------------------------------------------------------------------------------------------------------


def draw(study: AblationStudy) -> Picture:
    """A row a variant, best language first: (a) and (b) language near and far, (c) and (d) retrieval near and far.

    Dashed lines stand at RoPE near and at ALiBi far; variants that pass all four stand out.
    """
    language = {name: study.values(name, "language") for name in study.variants}
    retrieval = {name: study.retrieval(name) for name in study.variants}
    order = sorted(study.variants, key=lambda name: float(language[name][:, 0].mean()))
    figure, grid = panels(1, 4, size=(15.0, 1.3 + 0.26 * len(order)))
    answers, far = study.answers(), study.recipe.length_factors[-1]
    for k, (axes, values) in enumerate(zip(grid[0], (language, language, retrieval, retrieval), strict=True)):
        plot_ranking(
            {name: values[name][:, -(k % 2)] for name in order},  # the first length, or the last
            labels=VARIANTS,
            highlight=answers,
            reference="alibi" if k % 2 else "rope",
            logarithmic=values is language,
            axes=axes,
        )
        what = "bits per byte" if values is language else "accuracy, mean of both tasks"
        axes.set_xlabel(f"{what}\n(dashed: {'ALiBi' if k % 2 else 'RoPE'})")
        if k:
            axes.set_yticklabels([])
    titles = ("language, training length", f"language, {far}x", "retrieval, training length", f"retrieval, {far}x")
    title_panels(grid[0], titles)
    return figure
