"""The ablations' recipe at every scale: which prior extrapolates, judged on language and on retrieval."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from eotattn.experiments.networks import DecoderConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.tasks.retrieval import ALPHABET
from eotattn.experiments.training import TrainingConfig

__all__ = ["AblationRecipe", "ablations"]

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
_ALSO_SMALL = ("fast_paper_goat", "decaying_waves", "narrow_lanes")


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
    def train_length(self) -> int:
        """Tokens of a training window."""
        return self.decoders[0].train_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Examined contexts, tokens."""
        return tuple(factor * self.train_length for factor in self.length_factors)

    def seeds_of(self, variant: str) -> tuple[int, ...]:
        """Seeds that a variant runs with."""
        return self.seeds if variant in self.repeated else self.seeds[:1]


def ablations(scale: str = "laptop") -> AblationRecipe:
    """The ablations at a scale; ``"paper"`` is ``"h200"``, since the paper has none.

    Example:
        >>> ablations("laptop").lengths
        (64, 256, 1024)
    """
    check_scale("ablations", scale)
    is_small = scale in ("smoke", "laptop")
    length = 64 if is_small else 256
    sizes: dict[str, Any] = {"num_layers": 2, "embed_dim": 64, "num_heads": 4}
    if not is_small:
        sizes = {"num_layers": 4, "embed_dim": 256, "num_heads": 8}
    names = (*REPEATED, *_ALSO_SMALL) if is_small else tuple(VARIANTS)
    decoders = tuple(
        DecoderConfig(
            name,
            vocabulary_size=max(256, len(ALPHABET)),
            **sizes,
            train_length=length,
            num_frequencies=4 if is_small else 8,
            min_period=2 * math.pi,
            max_period=2 * math.pi * 10_000,
        )
        for name in names
    )
    language, retrieval = _TRAINING.get(scale, _H200_TRAINING)
    return AblationRecipe(
        scale=scale,
        corpus=PYTHON_STDLIB,
        decoders=decoders,
        language=language,
        retrieval=retrieval,
        seeds=(0,) if is_small else (0, 1, 2),
        repeated=REPEATED,
        length_factors=(1, 2) if scale == "smoke" else (1, 4, 16),
        depths=(0.1, 0.9) if scale == "smoke" else (0.1, 0.5, 0.9),
        windows={"smoke": 4, "laptop": 96}.get(scale, 64),
        count={"smoke": 4}.get(scale, 32),
    )


_SMOKE = TrainingConfig(steps=2, batch_size=4, log_every=1)

_LAPTOP = TrainingConfig(
    steps=300,
    batch_size=32,
    learning_rate=3e-3,
    prior_learning_rate=3e-3,
    warmup_steps=50,
    log_every=50,
    checkpoint_every=400,
)

_H200 = TrainingConfig(
    steps=500,
    batch_size=32,
    learning_rate=1e-3,
    prior_learning_rate=1e-3,
    warmup_steps=100,
    log_every=50,
    precision="bf16",
)

#: Scale -> training on language and on retrieval.
_TRAINING = {"smoke": (_SMOKE, _SMOKE), "laptop": (_LAPTOP, replace(_LAPTOP, steps=800))}
#: Retrieval takes the paper's steps and rate of figure 3: baselines do not learn it at the rate of language.
_H200_TRAINING = (
    _H200,
    replace(_H200, steps=2000, learning_rate=3e-4, prior_learning_rate=3e-4, warmup_steps=400),
)
