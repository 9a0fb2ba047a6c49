"""Where a decoder's sinks are and what they are made of: mass, margins, values, activations.

Weights are read from the dense path of the layer itself, so that whatever it adds to the scores (lanes, gates, explicit
sinks) is in them. The margin of the first token splits without asking a prior: log-weights are scores plus log-prior up
to a constant of the row, so the prior's part is the whole margin less that of the scores.

Legend: A blocks, H heads, N windows, L tokens, Q queries, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention import PriorAttention
from eotattn.diagnostics import SinkMassReport, score_range, sink_mass_by_score_range
from eotattn.experiments.evaluation import read_attention
from eotattn.experiments.networks import Decoder
from eotattn.experiments.prior_parts import key_only_part

__all__ = ["EPSILON", "SinkHeads", "activation_outliers", "mass_by_signal", "measure_sinks"]

#: Mean mass on the first token from which a head is a sink head (Gu et al. 2024, arXiv 2410.10781).
EPSILON = 0.3
#: Tokens of the windows of that definition, and the first query whose margin counts: earlier ones have few keys.
SHORT, FIRST_QUERY = 64, 16
#: Smallest weight that a logarithm is taken of.
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class SinkHeads:
    """What every head (A, H) does with the first token; margins in nats, means over windows and queries.

    Attributes:
        mass: Weight on the first token, queries from 1 on.
        margin: Log-weight of the first token less the mean log-weight of the other admissible keys, queries from 16.
        prior_margin: The part of it that is not in the content scores.
        value_norm: Norm of the first token's value over the mean norm of the others.
        key_only: u(0) less the mean of u over the other keys; NaN without u.
        outside: Weight on explicit sinks, which are no keys.
    """

    mass: NDArray[np.float64]
    margin: NDArray[np.float64]
    prior_margin: NDArray[np.float64]
    value_norm: NDArray[np.float64]
    key_only: NDArray[np.float64]
    outside: NDArray[np.float64]

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def summary(self) -> dict[str, float]:
        """Numbers of a whole network; means over its sink heads, NaN where it has none."""
        sinks = self.mass > EPSILON
        found = {"sink_rate": float(sinks.mean()), "sink_mass": float(self.mass.mean())}
        for name in ("margin", "prior_margin", "value_norm", "key_only"):
            of_sinks = getattr(self, name)[sinks]
            found[f"{name}_of_sinks"] = float(of_sinks.mean()) if sinks.any() else float("nan")
        found["prior_share"] = found["prior_margin_of_sinks"] / found["margin_of_sinks"]
        found |= {name: float(getattr(self, name).mean()) for name in ("value_norm", "key_only", "outside")}
        return found


@torch.no_grad()
def measure_sinks(network: Decoder, tokens: Tensor) -> SinkHeads:
    """Measure the sinks of the first 64 tokens of some windows, in full precision."""
    rows: list[dict[str, Tensor]] = []
    for attention, hidden in _attention_inputs(network, tokens[:, :SHORT]):
        scores, weights, value = read_attention(attention, hidden)
        length = weights.shape[-1]
        first = min(FIRST_QUERY, length // 2)
        whole, content = (_margin(x)[..., first:].mean((0, 2)) for x in (weights.clamp(min=TINY).log(), scores))
        norm = value.norm(dim=-1)
        u = key_only_part(attention.prior, length)
        nothing = torch.full_like(whole, torch.nan)
        row = {
            "mass": weights[..., 1:, 0].mean((0, 2)),
            "margin": whole,
            "prior_margin": whole - content,
            "value_norm": (norm[..., 0] / norm[..., 1:].mean(-1)).mean(0),
            "outside": 1 - weights[..., 1:, :].sum(-1).mean((0, 2)),
            "key_only": nothing if u is None else (u[:, 0] - u[:, 1:].mean(-1)).to(nothing),
        }
        rows.append(row)
    return SinkHeads(**{name: np.stack([row[name].double().cpu().numpy() for row in rows]) for name in rows[0]})


@torch.no_grad()
def mass_by_signal(network: Decoder, tokens: Tensor, *, num_bins: int) -> dict[str, SinkMassReport]:
    """Mass on the first token against the strength of the signal, by two protocols, averaged over heads.

    ``"last block, all queries"`` is what the paper's authors draw. ``"all blocks, late queries"`` leaves out the first
    half of the window, whose queries have so few keys that the first one gets mass for free.
    """
    omegas, masses = [], []
    for attention, hidden in _attention_inputs(network, tokens):
        scores, weights, _ = read_attention(attention, hidden)
        admissible = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
        omegas.append(score_range(scores, admissible).mean(1)[:, 1:].cpu())
        masses.append(weights[..., 0].mean(1)[:, 1:].cpu())
    late = slice(tokens.shape[1] // 2, None)
    omega, mass = torch.stack(omegas), torch.stack(masses)
    return {
        "last block, all queries": sink_mass_by_score_range(omega[-1], mass[-1], num_bins=num_bins),
        "all blocks, late queries": sink_mass_by_score_range(omega[..., late], mass[..., late], num_bins=num_bins),
    }


@torch.no_grad()
def activation_outliers(network: Decoder, tokens: Tensor) -> dict[str, float]:
    """How far the residual stream strays: the worst block's massive activations of the first token, and kurtosis.

    Returns:
        ``massive``: largest |x| of the first token over the median |x| of all tokens (Sun et al. 2024, arXiv
        2402.17762); ``kurtosis``: of a token's activations over the width, mean over all tokens, 3 for a Gaussian.
    """
    massive, kurtosis = [], []
    for hidden in _block_outputs(network, tokens):
        size = hidden.abs()
        massive.append(float((size[:, 0].amax(-1) / size.flatten(1).median(-1).values).mean()))
        centred = hidden - hidden.mean(-1, keepdim=True)
        fourth, second = centred.pow(4).mean(-1), centred.square().mean(-1)
        kurtosis.append(float((fourth / second.square()).mean()))
    return {"massive": max(massive), "kurtosis": max(kurtosis)}


def _margin(logits: Tensor) -> Tensor:
    """(N, H, Q): the first key's number less the mean of the other admissible keys', (N, H, Q, K); NaN for query 0."""
    others = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    others[:, 0] = False
    total = logits.masked_fill(~others, 0.0).sum(-1)
    return logits[..., 0] - total / others.sum(-1)


def _attention_inputs(network: Decoder, tokens: Tensor) -> Iterator[tuple[PriorAttention, Tensor]]:
    """Every block's attention with what it reads, in float32."""
    device = network.embedding.weight.device
    with torch.autocast(device.type, enabled=False):
        inputs = network.attention_inputs(tokens.to(device))
        yield from zip((block.attention for block in network.blocks), inputs, strict=True)


def _block_outputs(network: Decoder, tokens: Tensor) -> list[Tensor]:
    """(N, L, E) residual stream after every block, in float32."""
    device = network.embedding.weight.device
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in network.blocks]
    try:
        with torch.autocast(device.type, enabled=False):
            network(tokens.to(device), num_targets=1)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
