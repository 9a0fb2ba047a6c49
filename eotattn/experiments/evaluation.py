"""What is measured on a trained decoder: losses, and the statistics of its sinks.

Legend: B batch, H heads, L tokens, T target tokens, W window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.attention import PriorAttention
from eotattn.checks import check_positive_int, require
from eotattn.diagnostics import score_range, sink_mass
from eotattn.experiments.networks import Decoder
from eotattn.experiments.training import Evaluate, Row
from eotattn.integrations import TrainingProbe

__all__ = ["SinkObservations", "read_attention", "sink_observations", "sliding_pieces", "target_bits", "watch_sinks"]


@torch.no_grad()
def target_bits(
    network: Decoder, windows: Tensor, *, length: int, num_targets: int, batch_tokens: int = 16_384
) -> Tensor:
    """Bits per byte of the *last* tokens of every window, read with a context of ``length`` tokens.

    ``windows`` are (N, W + 1). The scored bytes are the same whatever the length, and positions always start at zero,
    so lengths compare.

    Returns:
        (N,) float64, mean bits per byte of each window's T targets.
    """
    check_positive_int("target_bits", "num_targets", num_targets)
    longest = windows.shape[1] - 1
    rule = f"lie between num_targets = {num_targets} and the window's {longest} tokens"
    require(num_targets <= length <= longest, "target_bits", "length", rule, length, "Use longer windows")
    device = next(network.parameters()).device
    bits = []
    for rows in windows.split(max(1, batch_tokens // length)):
        tokens = rows[:, -(length + 1) :].to(device)
        logits = network(tokens[:, :-1], num_targets=num_targets).float()
        losses = functional.cross_entropy(logits.transpose(1, 2), tokens[:, -num_targets:], reduction="none")
        bits.append(losses.double().mean(-1).cpu() / math.log(2))
    return torch.cat(bits)


def sliding_pieces(windows: Tensor, *, num_targets: int, length: int, stride: int, keep_first: int = 0) -> Tensor:
    """What a reader sees that looks back ``length`` tokens at most, whatever stands before them.

    Every ``stride`` of the last ``num_targets`` tokens of (N, W + 1) windows are read anew in a piece of their own,
    whose positions start at zero: a sliding window with recomputation. With ``keep_first`` the first tokens of the
    whole window stand before the recent ones, as in StreamingLLM (Xiao et al. 2023, arXiv 2309.17453).

    Returns:
        (N * T / stride, length + 1) tokens, the last ``stride`` of which are to be scored.

    Example:
        >>> sliding_pieces(torch.arange(10)[None], num_targets=4, length=4, stride=2, keep_first=1).tolist()
        [[0, 4, 5, 6, 7], [0, 6, 7, 8, 9]]
    """
    whole = num_targets % stride == 0 and stride <= length - keep_first
    rule = f"divide num_targets = {num_targets} and be at most {length - keep_first}"
    require(whole, "sliding_pieces", "stride", rule, stride, "Use e.g. half of the length")
    reach, longest = length + num_targets - stride, windows.shape[1] - 1
    require(reach <= longest, "sliding_pieces", "length", f"leave {reach} <= {longest}", length, "Use longer windows")
    ends = range(windows.shape[1] - num_targets + stride, windows.shape[1] + 1, stride)
    recent = length + 1 - keep_first
    pieces = [torch.cat([windows[:, :keep_first], windows[:, end - recent : end]], dim=1) for end in ends]
    return torch.stack(pieces, dim=1).flatten(0, 1)


def watch_sinks(network: nn.Module, inputs: Tensor) -> Evaluate:
    """An evaluation hook for training that records the mass on the first token, while sinks form; in full precision.

    Returns:
        A hook whose rows have ``sink_mass``: a list over layers of lists over heads, means over the queries.
    """
    probe = TrainingProbe(network, every=1)

    def watch(_: nn.Module, step: int) -> list[Row]:
        device = next(network.parameters()).device
        with probe.step(step), torch.autocast(device.type, enabled=False):
            network(inputs.to(device))
        return [{"sink_mass": probe.reports[step].mean["sink mass of key 0"].tolist()}]

    return watch


@dataclass(frozen=True, eq=False)
class SinkObservations:
    """One block's signal strength and mass on the first token, head by head.

    Attributes:
        score_range: (B, H, Q) omega, nats.
        sink_mass: (B, H, Q), in [0, 1].
    """

    score_range: Tensor
    sink_mass: Tensor


@torch.no_grad()
def sink_observations(network: Decoder, tokens: Tensor, *, first_query: int = 1) -> Iterator[SinkObservations]:
    """Signal strength and first-token mass of every query of every block.

    Yields:
        One :class:`SinkObservations` a block.
    """
    length = tokens.shape[1]
    rule = f"lie between 1 and the last position {length - 1}"
    require(1 <= first_query < length, "sink_observations", "first_query", rule, first_query, "Use longer windows")
    tokens = tokens.to(next(network.parameters()).device)
    admissible = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    for block, hidden in zip(network.blocks, network.attention_inputs(tokens), strict=True):
        scores, weights, _ = read_attention(block.attention, hidden, network.positions(length, tokens.device))
        yield SinkObservations(
            score_range(scores, admissible)[..., first_query:].cpu(), sink_mass(weights)[..., first_query:].cpu()
        )


def read_attention(
    attention: PriorAttention, hidden: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Content scores (B, H, L, L), nats, the layer's own weights, likewise, and values (B, H, L, D)."""
    heads = attention.project(hidden, query_positions=positions, key_positions=positions)
    scores = attention.scale * heads.query @ heads.key.transpose(-2, -1)
    asked = {"need_weights": True, "average_attn_weights": False, "is_causal": True}
    _, weights = attention(hidden, query_positions=positions, **asked)
    return scores, weights, heads.value
