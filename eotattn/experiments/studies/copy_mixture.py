"""Figure 1: does a neutral prior learn where a copy mixture copies from?

Legend: H heads, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from eotattn.experiments.networks import CopyReader
from eotattn.experiments.prior_parts import PriorParts, centre_rows, split_prior
from eotattn.experiments.recipes import CopyMixtureRecipe
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.training import Row, TrainingResult, train
from eotattn.records import provenance

__all__ = ["CopyMixtureStudy", "HeadFindings", "measure_head", "run"]

FIGURE = "fig1_copy_mixture"


@dataclass(frozen=True)
class HeadFindings:
    """What one head's log-prior shows; gaps in nats. Panels (a) and (b) in the gauge without key slope.

    Attributes:
        head: Index.
        top_key: Position where the key-only part is highest.
        key_gap: u there minus the second highest.
        top_lag: Lag where the relative part is highest, counted from the predicted token, so that 1 is its neighbour.
        lag_gap: kappa there minus the second highest.
        deepest_trough: Lowest entry of the row-centred log-prior.
        negative_share: Share of the pairs that the task never copies from whose row-centred log-prior is negative.
        correlation: Pearson correlation with the ideal log-prior, both row-centred, over admissible pairs.
        copied_mass: Mean mass of the induced prior on the two source keys; the ideal is one.
        total_variation: Mean total-variation distance of its rows to the ideal attention; the uniform prior has
            ``uniform_total_variation``.
        uniform_total_variation: The same for the uniform causal prior.
    """

    head: int
    top_key: int
    key_gap: float
    top_lag: int
    lag_gap: float
    deepest_trough: float
    negative_share: float
    correlation: float
    copied_mass: float
    total_variation: float
    uniform_total_variation: float

    @property
    def claim_held(self) -> bool:
        """Whether this head's key-only part peaks at the first token, its relative part at lag one, with troughs."""
        return self.top_key == 0 and self.top_lag == 1 and self.deepest_trough < 0


@dataclass(frozen=True, eq=False)
class CopyMixtureStudy:
    """A trained reader's log-prior and what it shows.

    Attributes:
        recipe: What was run.
        parts: The learned log-prior, in the gauge without key slope.
        ideal: (L, L) ideal log-prior, -inf above the diagonal, nats.
        heads: Findings, one a head.
        loss: Cross-entropy on fresh sequences, nats a token.
        best_loss: What the generator itself would reach on them.
        training: The loss curve, the time and the device.
    """

    recipe: CopyMixtureRecipe
    parts: PriorParts
    ideal: torch.Tensor
    heads: tuple[HeadFindings, ...]
    loss: float
    best_loss: float
    training: TrainingResult

    def rows(self) -> list[Row]:
        """The tidy table: every plotted value and every finding, one a row."""
        seed = self.recipe.training.seed
        rows: list[Row] = []

        def add(panel: str, quantity: str, unit: str, value: float | torch.Tensor, **where: int) -> None:
            place = {name: where.get(name, "") for name in ("head", "query", "key", "lag", "step")}
            rows.append({"figure": FIGURE, "panel": panel, "variant": "goat", "seed": seed} | place)
            rows[-1] |= {"quantity": quantity, "unit": unit, "value": float(value)}

        length = self.recipe.task.length
        centred, induced = centre_rows(self.parts.total), self.parts.total.softmax(-1)
        for h, findings in enumerate(self.heads):
            for j in range(length):
                add("a", "key_only_log_prior", "nats", self.parts.key_only[h, j], head=h, key=j)
            for t in range(length):
                add("b", "relative_log_prior", "nats", self.parts.relative[h, t], head=h, lag=t + 1)
            for i in range(length):
                for j in range(i + 1):
                    add("c", "row_centred_log_prior", "nats", centred[h, i, j], head=h, query=i, key=j)
                    add("d", "induced_prior", "probability", induced[h, i, j], head=h, query=i, key=j)
            for name, value in asdict(findings).items():
                if name != "head":
                    add("finding", name, _UNITS[name], value, head=h)
        for entry in self.training.rows:
            add("training", "training_loss", "nats per token", entry["loss"], step=entry["step"])
        add("finding", "loss", "nats per token", self.loss)
        add("finding", "best_loss", "nats per token", self.best_loss)
        return rows

    def save(self, folder: ResultFolder) -> None:
        """Write the table and its provenance."""
        folder.write_table(self.rows())
        folder.write_provenance(
            provenance(
                command=f"eotattn reproduce --figure 1 --scale {self.recipe.scale}",
                configuration=self.recipe,
                seeds=(self.recipe.training.seed,),
                device=self.training.device,
                wall_seconds=self.training.wall_seconds,
            )
        )

    def verdict(self) -> str:
        """The claim, the numbers and whether it held, in Markdown."""
        lines = []
        for found in self.heads:
            held = "held" if found.claim_held else "did NOT hold"
            lines.append(
                f"- **Head {found.head}: the claim {held}.** The key-only part is highest at position {found.top_key} "
                f"({found.key_gap:.2f} nats above the next), the relative part at lag {found.top_lag} "
                f"({found.lag_gap:.2f} nats above the next). The deepest trough of the row-centred sum is "
                f"{found.deepest_trough:.2f} nats, and {found.negative_share:.0%} of the pairs that are never copied "
                f"are negative. Correlation with the ideal log-prior: {found.correlation:.3f}. The induced prior puts "
                f"{found.copied_mass:.0%} of its mass on the two sources; its total-variation distance to the ideal "
                f"attention is {found.total_variation:.3f} (uniform prior: {found.uniform_total_variation:.3f})."
            )
        excess = self.loss - self.best_loss
        lines.append(
            f"- Loss on fresh sequences: {self.loss:.4f} nats a token, {excess:.4f} above the generator's own "
            f"{self.best_loss:.4f}. One seed, scale `{self.recipe.scale}`, trained for "
            f"{self.training.wall_seconds:.0f} s on {self.training.device}."
        )
        return "\n".join(lines)


_UNITS = {
    "top_key": "tokens",
    "key_gap": "nats",
    "top_lag": "tokens",
    "lag_gap": "nats",
    "deepest_trough": "nats",
    "negative_share": "fraction",
    "correlation": "dimensionless",
    "copied_mass": "probability",
    "total_variation": "probability",
    "uniform_total_variation": "probability",
}


def run(recipe: CopyMixtureRecipe) -> CopyMixtureStudy:
    """Train a reader on the copy mixture and read its log-prior.

    Args:
        recipe: From :func:`eotattn.experiments.recipes.copy_mixture`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        network = CopyReader(recipe.network)
    training = train(network, recipe.task, recipe.training, label="copy mixture")
    network.eval()
    device = next(network.parameters()).device
    # Training stops at step `steps`, so this batch is new to the network.
    fresh = recipe.task.batch(recipe.test_sequences, seed=recipe.training.seed, step=recipe.training.steps)
    with torch.no_grad():
        logits = network(fresh.inputs.to(device)).cpu()
    loss = float(functional.cross_entropy(logits.flatten(0, 1), fresh.targets.flatten()))
    parts = split_prior(network.prior, recipe.task.length).without_key_slope()
    ideal = recipe.task.ideal_log_prior()
    heads = tuple(measure_head(parts, ideal, head) for head in range(recipe.network.num_heads))
    return CopyMixtureStudy(recipe, parts, ideal, heads, loss, recipe.task.best_loss(fresh), training)


def measure_head(parts: PriorParts, ideal: torch.Tensor, head: int) -> HeadFindings:
    """Compare one head's log-prior with the ideal one.

    Args:
        parts: Learned log-prior, see :class:`PriorParts`.
        ideal: (L, L) ideal log-prior, -inf above the diagonal, nats; rows 0 and 1 have no key that is never copied.
        head: Index.
    """
    total = parts.total[head]
    length = total.shape[-1]
    admissible = torch.ones(length, length, dtype=torch.bool).tril()
    unused = admissible & ~torch.eye(length, dtype=torch.bool)
    unused[:, 0] = False
    centred, centred_ideal = centre_rows(total), centre_rows(ideal)
    induced, target = total.softmax(-1), ideal.softmax(-1)
    uniform = admissible / admissible.sum(-1, keepdim=True)
    top_keys, top_lags = parts.key_only[head].topk(2), parts.relative[head].topk(2)
    pair = torch.stack([centred[admissible], centred_ideal[admissible]])
    return HeadFindings(
        head=head,
        top_key=int(top_keys.indices[0]),
        key_gap=float(top_keys.values[0] - top_keys.values[1]),
        top_lag=int(top_lags.indices[0]) + 1,
        lag_gap=float(top_lags.values[0] - top_lags.values[1]),
        deepest_trough=float(centred[admissible].min()),
        negative_share=float((centred[unused] < 0).double().mean()),
        correlation=float(torch.corrcoef(pair)[0, 1]) if bool(pair.std(-1).min() > 0) else math.nan,
        copied_mass=float(induced.masked_fill(unused, 0.0).sum(-1).mean()),
        total_variation=float((induced - target).abs().sum(-1).mean() / 2),
        uniform_total_variation=float((uniform - target).abs().sum(-1).mean() / 2),
    )


def findings_table(study: CopyMixtureStudy) -> list[dict[str, Any]]:
    """Findings as rows, one a head, for display."""
    return [asdict(head) for head in study.heads]
