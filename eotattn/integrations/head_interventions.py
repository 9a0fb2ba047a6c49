"""Interventions: change heads of a trained model, and say what that costs.

Legend: N texts, L tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from eotattn.attention import AttentionSinks
from eotattn.checks import check_positive_int, require, speaking_as
from eotattn.integrations.attachment import attach, attention_layers, base_model, num_heads
from eotattn.integrations.head_fits import Head, HeadFits, fit_heads
from eotattn.integrations.intervention_report import Array, Effect, InterventionReport
from eotattn.priors import KeyTablePrior, LogPrior

__all__ = ["AddPrior", "AddSink", "HideKey", "Intervention", "ReplaceHeads", "intervene", "next_token_losses"]

OWNER = "intervene"
#: Nats that hide a key: more than scores of attention ever differ by, and exact in every dtype.
HIDDEN = 4096.0
#: Share above which the standard study takes a head to be one of position.
EXPLAINED = 0.8

#: A head as (layer, head), or a layer with all its heads; layers by name or number.
GivenHead: TypeAlias = "tuple[str, int] | tuple[int, int] | str | int"
#: Heads of an intervention: all, those listed, or those that a function of the fits chooses.
GivenHeads: TypeAlias = "Sequence[GivenHead] | Callable[[HeadFits], Sequence[Head]] | None"
Loss: TypeAlias = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of some heads.

    Args:
        name: What the report calls it.
        heads: (layer, head) pairs, or layers with all their heads, by name or number; or what chooses heads by
            :class:`HeadFits`, e.g. ``lambda fits: fits.above(0.8)``; all heads by default.
    """

    name: str
    heads: GivenHeads = None

    #: Whether the heads attend by the prior alone.
    positional: ClassVar[bool] = False

    @property
    def needs_fits(self) -> bool:
        """Whether implicit priors have to be fitted first."""
        return self.positional or callable(self.heads)

    def check(self, longest: int) -> None:
        """Raise unless it can change what is computed on texts of up to ``longest`` tokens."""

    def prior(self, layer: str, total: int, fits: HeadFits | None) -> LogPrior | None:
        """The prior of all ``total`` heads of a layer, if it gets one."""
        return None

    def sinks(self, heads: Sequence[int], total: int) -> AttentionSinks | None:
        """The sinks of some of ``total`` heads of a layer, if it gets any."""
        return None


@dataclass(frozen=True, eq=False)
class ReplaceHeads(Intervention):
    """Heads attend by the prior of position that was fitted to them, whatever the text says."""

    positional: ClassVar[bool] = True

    def prior(self, layer: str, total: int, fits: HeadFits | None) -> LogPrior:
        """The fitted prior."""
        assert fits is not None
        return fits.reports[layer].prior()


@dataclass(frozen=True, eq=False)
class HideKey(Intervention):
    """One key is hidden: a sink is taken away. A query that sees no other key keeps it.

    Args:
        position: Of the key, tokens from the first of the text.
    """

    position: int = 0

    def __post_init__(self) -> None:
        check_positive_int("HideKey", "position", self.position, minimum=0)

    def check(self, longest: int) -> None:
        """A key that no query after it sees, or that no text has, cannot be missed."""
        rule = f"be a key that a later token of a text sees, below {longest - 1}"
        remedy = "Choose an earlier one, or pass longer texts"
        require(self.position < longest - 1, OWNER, f"position of {self.name!r}", rule, self.position, remedy)

    def prior(self, layer: str, total: int, fits: HeadFits | None) -> LogPrior:
        """A table of keys whose entry weighs all scores down."""
        prior = KeyTablePrior(total, self.position + 2)
        with torch.no_grad():
            prior.table[:, self.position] = -HIDDEN
        return prior


@dataclass(frozen=True, eq=False)
class AddPrior(Intervention):
    """Heads get a prior beside their content.

    Args:
        make: What makes the prior of a number of heads, e.g. ``goat_prior``.
    """

    make: Callable[[int], LogPrior] | None = None

    def __post_init__(self) -> None:
        remedy = "Pass e.g. goat_prior"
        require(callable(self.make), "AddPrior", "make", "make a prior of H heads", self.make, remedy, error=TypeError)

    def prior(self, layer: str, total: int, fits: HeadFits | None) -> LogPrior:
        """What was asked for."""
        assert self.make is not None
        return self.make(total)


@dataclass(frozen=True, eq=False)
class AddSink(Intervention):
    """Heads get a sink beside their keys, that takes weight and adds nothing: softmax with exp(logit) more below.

    Args:
        logit: Of the sink, nats; zero is "softmax off by one".
    """

    logit: float = 0.0

    def __post_init__(self) -> None:
        is_number = isinstance(self.logit, (int, float))
        require(is_number, "AddSink", "logit", "be a number", self.logit, "Pass nats", error=TypeError)

    def sinks(self, heads: Sequence[int], total: int) -> AttentionSinks | None:
        """One logit a head, and none at the others."""
        logits = torch.full((total,), -torch.inf)
        logits[list(heads)] = float(self.logit)
        return AttentionSinks(logits=logits)


def standard_interventions() -> list[Intervention]:
    """Heads explained by position replaced, as many of the least explained, and the first token hidden."""
    return [
        ReplaceHeads(f"by their priors: heads explained above {EXPLAINED}", lambda fits: fits.above(EXPLAINED)),
        ReplaceHeads("by their priors: as many, least explained", lambda fits: fits.least(len(fits.above(EXPLAINED)))),
        HideKey("first token hidden"),
    ]


@torch.no_grad()
def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(L - 1,) negative log-likelihoods of the tokens of a text (1, L) after its first, nats."""
    logits = model(ids).logits
    return nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


@speaking_as(OWNER)
def intervene(  # noqa: PLR0913  (one argument an option of the study)
    model: nn.Module,
    texts: Sequence[str] | Sequence[Tensor],
    interventions: Sequence[Intervention] | None = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    num_splits: int = 3,
    num_controls: int = 3,
    loss: Loss | None = None,
    seed: int = 0,
) -> InterventionReport:
    """Change heads of a model and say what that does to its loss, with intervals over texts and random heads beside.

    Where priors have to be fitted, texts are dealt into parts; on each part, heads are chosen and replaced by what the
    other parts say. Intervals are paired over texts, which are taken to be independent.

    Args:
        model: A causal language model of transformers; left as it is.
        texts: Texts, or their ids (1, L) or (L,): at least two, and three where priors have to be fitted.
        interventions: What to do, each by itself; by default: replace the heads that a prior of positions explains
            above 0.8 by those priors, replace as many that are explained least, and hide the first token.
        tokenizer: Of the model, where texts are strings.
        max_length: Longer texts are cut here, tokens.
        num_splits: Parts of the texts, at least 2.
        num_controls: Groups of as many heads, drawn at random from all, that the same is done to; 0 for none. Where an
            intervention takes all heads there is no such group.
        loss: (model, ids) -> losses of tokens, nats; by default of every token after the first, given those before.
        seed: Of the parts and of the random heads.

    Returns:
        :class:`InterventionReport`.

    Raises:
        ValueError: For texts, heads or names that do not fit.
        NotImplementedError: If attention of the model does not go through the interface of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
        >>> texts = [torch.arange(9), torch.arange(9).flip(0)]
        >>> report = intervene(LlamaForCausalLM(LlamaConfig(**sizes)), texts, [HideKey("first token hidden")])
        >>> report["first token hidden"].num_heads, report.base.shape
        (4.0, (2,))
    """
    is_module = isinstance(model, nn.Module)
    require(is_module, OWNER, "model", "be a module", type(model), "Load it first", error=TypeError)
    model = base_model(model)
    ids = _encoded(model, texts, tokenizer, max_length)
    chosen = standard_interventions() if interventions is None else list(interventions)
    named = all(isinstance(one, Intervention) and isinstance(one.name, str) for one in chosen)
    names = [intervention.name for intervention in chosen] if named else []
    rule, remedy = "be some, each with its name", "Pass e.g. [HideKey('first token hidden')]"
    require(0 < len(set(names)) == len(names), OWNER, "interventions", rule, names or chosen, remedy)
    check_positive_int(OWNER, "num_controls", num_controls, minimum=0)
    for intervention in chosen:
        intervention.check(max(text.shape[1] for text in ids))
    fits_needed = any(intervention.needs_fits for intervention in chosen)
    parts = _parts(len(ids), num_splits, seed) if fits_needed else [list(range(len(ids)))]
    counts = {name: num_heads(name, module) for name, module in attention_layers(model).items()}
    study = _Study(model, ids, counts, loss or next_token_losses, num_controls, seed)
    groups = {
        intervention.name: study.heads(intervention) for intervention in chosen if not callable(intervention.heads)
    }
    base, losses = np.empty(len(ids)), np.full((2, len(chosen), len(ids)), np.nan)
    sizes, split = np.empty((len(chosen), len(parts))), np.empty(len(ids), dtype=np.int64)
    with _evaluated(model):
        for number, part in enumerate(parts):
            split[part] = number
            base[part] = study.losses(part)
            others = [n for n in range(len(ids)) if n not in part]
            fits = fit_heads(model, [ids[n] for n in others]) if fits_needed else None
            for k, intervention in enumerate(chosen):
                heads = groups.get(intervention.name) or study.heads(intervention, fits)
                sizes[k, number] = len(heads)
                losses[0, k, part] = study.under(intervention, heads, part, fits)
                losses[1, k, part] = study.under_random(intervention, len(heads), part, fits)
    effects = [
        Effect(name, float(sizes[k].mean()), losses[0, k], None if np.isnan(losses[1, k]).any() else losses[1, k])
        for k, name in enumerate(names)
    ]
    return InterventionReport(base, split, tuple(effects), num_controls)


@dataclass(frozen=True, eq=False)
class _Study:
    """A model, its texts, and what was measured with random heads."""

    model: nn.Module
    ids: list[Tensor]
    counts: dict[str, int]
    loss: Loss
    num_controls: int
    seed: int
    known: dict[tuple[Any, ...], Array] = field(default_factory=dict)

    @property
    def everything(self) -> list[Head]:
        """All heads, layer by layer."""
        return [(layer, head) for layer, count in self.counts.items() for head in range(count)]

    def heads(self, intervention: Intervention, fits: HeadFits | None = None) -> list[Head]:
        """The heads of an intervention, by names of layers."""
        given = intervention.heads
        if given is None:
            return self.everything
        if callable(given):
            assert fits is not None
            return list(given(fits))
        names, found = list(self.counts), list[Head]()
        for entry in given:
            layer, head = entry if isinstance(entry, tuple) else (entry, None)
            layer = names[layer] if isinstance(layer, int) and 0 <= layer < len(names) else layer
            known = layer in self.counts and (head is None or head in range(self.counts[layer]))
            rule = "be (layer, head) pairs or layers that the model has"
            require(known, OWNER, f"heads of {intervention.name!r}", rule, entry, "Count both from 0")
            found += [(str(layer), h) for h in (range(self.counts[str(layer)]) if head is None else [head])]
        rule = "name at least one, and each once"
        once = 0 < len(found) == len(set(found))
        require(once, OWNER, f"heads of {intervention.name!r}", rule, list(given), "Pass None for all")
        return found

    def losses(self, part: list[int]) -> Array:
        """Mean loss of each text of a part."""
        return np.array([float(self.loss(self.model, self.ids[n]).double().mean()) for n in part])

    def under(self, intervention: Intervention, heads: list[Head], part: list[int], fits: HeadFits | None) -> Array:
        """The same with heads changed."""
        priors: dict[str, LogPrior] = {}
        sinks: dict[str, AttentionSinks] = {}
        for layer in dict.fromkeys(layer for layer, _ in heads):
            total = self.counts[layer]
            here = [head for head in range(total) if (layer, head) in heads]
            if (prior := intervention.prior(layer, total, fits)) is not None:
                priors[layer] = prior * tuple(1.0 if head in here else 0.0 for head in range(total))
            if (added := intervention.sinks(here, total)) is not None:
                sinks[layer] = added
        if not priors and not sinks:
            return self.losses(part)
        with attach(self.model, priors or None, sinks=sinks or None, positional=intervention.positional):
            return self.losses(part)

    def under_random(self, intervention: Intervention, count: int, part: list[int], fits: HeadFits | None) -> Array:
        """The same with as many random heads changed, the mean over groups; NaN where there are none to draw."""
        everything = self.everything
        if not self.num_controls or not 0 < count < len(everything):
            return np.full(len(part), np.nan)
        deed = [
            getattr(intervention, entry.name) for entry in fields(intervention) if entry.name not in ("name", "heads")
        ]
        key = (type(intervention), *deed, count, part[0])
        if key not in self.known:
            generator = np.random.default_rng([self.seed, count, part[0]])
            drawn = [generator.choice(len(everything), count, replace=False) for _ in range(self.num_controls)]
            groups = [[everything[n] for n in sorted(group)] for group in drawn]
            self.known[key] = np.mean([self.under(intervention, group, part, fits) for group in groups], axis=0)
        return self.known[key]


def _encoded(model: nn.Module, texts: Sequence[Any], tokenizer: Any, max_length: int | None) -> list[Tensor]:
    """Ids (1, L) of every text, on the device of the model."""
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    require(is_list, OWNER, "texts", "be a list of texts or ids", type(texts), "Put it into a list", error=TypeError)
    require(len(texts) > 1, OWNER, "texts", "be at least two", len(texts), "An interval needs more than one text")
    if max_length is not None:
        check_positive_int(OWNER, "max_length", max_length, minimum=2)
    device, found = next(model.parameters()).device, []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            require(tokenizer is not None, OWNER, "tokenizer", "be given with texts", None, "Pass the model's")
            text = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        is_ids = isinstance(text, Tensor) and text.dim() in (1, 2) and not text.is_floating_point()
        require(is_ids, OWNER, f"texts[{number}]", "be a text or its ids", text, "See tokenizer", error=TypeError)
        ids = text.reshape(-1, text.shape[-1])[:, :max_length]
        fits = ids.shape[0] == 1 and ids.shape[1] > 1
        require(fits, OWNER, f"texts[{number}]", "be one text of at least two tokens", ids, "Pass texts one by one")
        found.append(ids.to(device))
    return found


def _parts(count: int, num_splits: int, seed: int) -> list[list[int]]:
    """Texts dealt into parts such that at least two are outside each."""
    check_positive_int(OWNER, "num_splits", num_splits, minimum=2)
    largest = -(-count // num_splits)
    enough = num_splits <= count and count - largest > 1
    require(enough, OWNER, "texts", f"be enough for {num_splits} parts and two more to fit", count, "Pass more texts")
    order = np.random.default_rng(seed).permutation(count)
    return [sorted(map(int, part)) for part in np.array_split(order, num_splits)]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
