"""Two analyses of the same texts: what differs between the models, with intervals paired over the texts.

Legend: A layers, H heads, N texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eotattn.analysis.head_kinds import tellable
from eotattn.analysis.summary import Summary
from eotattn.checks import require, speaking_as
from eotattn.integrations.intervention_report import PairedMean
from eotattn.provenance import Table

__all__ = ["LOSS", "NORM", "ModelComparison", "compare", "known_mean", "text_numbers", "whole_numbers"]

Array = NDArray[np.float64]

#: Quantities of which the highest head is told: a mean over heads would hide the few that do it.
HIGHEST = ("previous-token score", "induction score", "duplicate-token score")
#: Names of what is not a quantity of heads.
SINKS, FIRST, LOSS, NORM = "sink rate", "sink rate of the first token", "loss", "norm of the first token over others"
#: What is printed; the table has every quantity.
PRINTED = (LOSS, SINKS, FIRST, "mass of the strongest key", "normalised entropy", NORM, *HIGHEST[:2])
#: Words for a change that lies below zero, or above.
WORDS = ("lower", "higher")


def text_numbers(analysis: Summary) -> dict[str, Array]:
    """Name -> (A, N): the mean over heads, or the highest, of every quantity; shares of heads with a sink.

    NaN where a layer did not see every text or lacks the quantity; sinks also where a text is too short to tell one.
    """
    strongest, told = analysis.strongest, tellable(analysis)
    sinks = tuple(
        np.where(told[: len(mass), None], (mass > strongest.threshold).astype(np.float64), np.nan)
        for mass in strongest.mass
    )
    first = tuple(sink * (at == 0) for sink, at in zip(sinks, strongest.position, strict=True))
    by_head = {SINKS: sinks, FIRST: first, **analysis.heads.by_sequence}
    return {
        name: np.array([_over_heads(each, analysis.heads.num_sequences, highest=name in HIGHEST) for each in layers])
        for name, layers in by_head.items()
    }


def whole_numbers(analysis: Summary) -> dict[str, Array]:
    """Name -> (N,): the same of the whole model, its loss, and the largest norm of the first token over the others'."""
    found = {name: _reduced(values, axis=0, highest=name in HIGHEST) for name, values in text_numbers(analysis).items()}
    norms = analysis.residuals
    if norms.blocks:
        ratios = [np.divide(norms.first_token[block], norms.other_tokens[block]) for block in norms.blocks]
        found[NORM] = np.max(ratios, axis=0)
    if np.isfinite(analysis.loss).all():
        found[LOSS] = analysis.loss
    return found


@dataclass(frozen=True, eq=False)
class ModelComparison(Table):
    """What changes from a first model to a second one, over the same texts.

    Attributes:
        models: Their names.
        layer: One entry a row: a layer's name, or "all".
        quantity: What changed.
        first: (N,) a row: the first model's numbers, one a text.
        second: (N,) a row: the second model's.
    """

    models: tuple[str, str]
    layer: tuple[str, ...]
    quantity: tuple[str, ...]
    first: tuple[Array, ...]
    second: tuple[Array, ...]

    def change(self, quantity: str, layer: str = "all") -> PairedMean:
        """By how much a quantity rose, with the 95 % interval paired over texts.

        Raises:
            ValueError: If there is no such row.
        """
        rows = list(zip(self.layer, self.quantity, strict=True))
        known = (layer, quantity) in rows
        rule = f"be among {sorted(set(self.quantity))}, of {list(dict.fromkeys(self.layer))}"
        require(known, "change", "quantity", rule, (quantity, layer), "Choose one that both models have")
        return self._change(rows.index((layer, quantity)))

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Columns of a table, one row a layer and quantity."""
        changes = [self._change(row) for row in range(len(self.layer))]
        return {
            "layer": np.array(self.layer),
            "quantity": np.array(self.quantity),
            "first": np.array([known_mean(values).mean for values in self.first]),
            "second": np.array([known_mean(values).mean for values in self.second]),
            "change": np.array([change.mean for change in changes]),
            "low": np.array([change.low for change in changes]),
            "high": np.array([change.high for change in changes]),
            "verdict": np.array([change.verdict(WORDS) for change in changes]),
        }

    def __str__(self) -> str:
        """The whole models' chosen quantities, one a line."""
        rows = [
            row
            for name in PRINTED
            for row, what in enumerate(self.quantity)
            if (self.layer[row], what) == ("all", name)
        ]
        width = max(map(len, PRINTED))
        lines = [f"{'':<{width}}  {'first':>9}  {'second':>9}  change"]
        for row in rows:
            change = self._change(row)
            means = "  ".join(f"{known_mean(side[row]).mean:9.3f}" for side in (self.first, self.second))
            lines.append(f"{self.quantity[row]:<{width}}  {means}  {change} {change.verdict(WORDS)}")
        texts = f"{len(self.first[0])} texts; 95 % intervals, paired over texts."
        return "\n".join([*lines, f"First: {self.models[0]}. Second: {self.models[1]}. {texts}"])

    def _change(self, row: int) -> PairedMean:
        return known_mean(self.second[row] - self.first[row])


@speaking_as("compare")
def compare(first: Summary, second: Summary) -> ModelComparison:
    """Say what changes from one model, or checkpoint, to another.

    Quantities of heads are averaged over heads and then over layers; of scores that few heads have (previous token,
    induction, duplicate token) the highest head is taken, of each model its own. Layers are compared too where both
    models have the same.

    Args:
        first: An analysis of the one, of at least two texts.
        second: An analysis of the other, of the same texts.

    Raises:
        ValueError: If the texts differ, or are fewer than two.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eotattn.analysis import ByteTokenizer, analyze
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
        >>> found = analyze(model, ["the key", "a query"], tokenizer=ByteTokenizer(64))
        >>> compare(found, found).change("entropy").mean
        0.0
    """
    for name, one in (("first", first), ("second", second)):
        require(
            isinstance(one, Summary),
            "compare",
            name,
            "be an analysis",
            type(one),
            "Pass what analyze returns",
            error=TypeError,
        )
    counts = first.heads.num_sequences, second.heads.num_sequences
    rule = "be of the texts of first"
    same = counts[0] == counts[1] and first.tokens == second.tokens
    require(same, "compare", "second", rule, f"{counts[1]} texts beside {counts[0]}", "Analyse both on the same texts")
    require(counts[0] > 1, "compare", "first", "be of at least two texts", counts[0], "An interval needs more than one")
    rows: list[tuple[str, str, Array, Array]] = []
    whole = whole_numbers(first), whole_numbers(second)
    rows += [("all", name, whole[0][name], whole[1][name]) for name in whole[0] if name in whole[1]]
    if first.heads.layers == second.heads.layers:
        each = text_numbers(first), text_numbers(second)
        for a, layer in enumerate(first.heads.layers):
            rows += [(layer, name, each[0][name][a], each[1][name][a]) for name in each[0] if name in each[1]]
    layers, names, ones, others = zip(*rows, strict=True)
    return ModelComparison((str(first.subject), str(second.subject)), layers, names, ones, others)


def known_mean(values: Array) -> PairedMean:
    """The mean over the texts that have a number, and its interval; NaN where none has."""
    known = values[~np.isnan(values)]
    return PairedMean.of(known if len(known) else np.array([np.nan]))


def _over_heads(values: Array, count: int, *, highest: bool) -> Array:
    """(N, H) of a layer -> (N,)."""
    return _reduced(values, axis=1, highest=highest) if len(values) == count else np.full(count, np.nan)


def _reduced(values: Array, *, axis: int, highest: bool) -> Array:
    """Mean or maximum of what is known along an axis; NaN where nothing is."""
    known = ~np.isnan(values)
    if highest:
        most = np.where(known, values, -np.inf).max(axis)
        return np.where(known.any(axis), most, np.nan)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis) / known.sum(axis)
