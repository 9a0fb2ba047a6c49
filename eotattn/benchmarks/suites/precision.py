"""How exact the fused call is in low precision, against float64.

Legend: H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import prior_attention
from eotattn.attention.call import AttentionCall
from eotattn.attention.operands import operands
from eotattn.benchmarks import peers
from eotattn.benchmarks.oracle import causal_rows, relative_error
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, output_of, trained
from eotattn.benchmarks.timing import Row
from eotattn.kernels import log_sum_exp
from eotattn.priors import RecencyPrior, goat_prior

__all__ = ["output_errors", "precision", "total_variation"]

#: A tolerance below which the rounding of lanes does not show beside that of content, nats.
TIGHT = 1e-3


def precision(config: Configuration) -> Iterator[Row]:
    """How exact: total variation of the recency prior, and outputs with the GOAT prior, against float64."""
    lengths = config.pick([256], [2048, 8192, 32768, 131072, 1048576])
    for length in lengths:
        yield from total_variation(config, length)
    for length in config.pick([256], [2048, 8192, 32768, 131072]):
        yield from output_errors(config, length)


def total_variation(config: Configuration, length: int, heads: int = 12, num_rows: int = 256) -> list[Row]:
    """TV of the recency prior on the last rows to the exact one, by the scores that the fused kernel itself computes.

    A problem of one key has that key's score as its log-sum-exp, which kernels return in fp32. Scores of the last keys
    are read so; earlier keys come as one problem, and their exact mass is below 1e-9 for every ALiBi slope.
    """
    device, dtype = config.place["device"], config.place["dtype"]
    near, num_rows = min(length, 8192), min(num_rows, length)
    prior = RecencyPrior(heads).to(device)
    ends = range(length - num_rows, length), range(length)
    queries, keys = (torch.arange(end.start, end.stop, device=device) for end in ends)
    with torch.no_grad():
        future = keys[-near:] > queries[:, None]
        exact = prior.dense(queries, keys[-near:], dtype=torch.float64).masked_fill(future, float("-inf")).softmax(-1)
        single = prior.lanes(queries, keys, dtype=torch.float32)
        found = []
        for name, sides in (("digit lanes", _carried(prior, *ends, config)), ("one lane", (single.query, single.key))):
            query, key = (functional.pad(side.to(dtype), (64 - side.shape[-1], 0)) for side in sides)
            key = key.expand(heads, -1, -1)
            scores = torch.cat([_scores(query, part) for part in key[:, -near:].split(256, dim=1)], dim=-1)
            scores = scores.masked_fill(future, float("-inf"))
            if near < length:
                earlier = log_sum_exp.attend(query[None], key[None, :, : length - near], scale=1.0)[1][0]
                scores = torch.cat([scores, earlier.double().unsqueeze(-1)], dim=-1)
            weights = scores.softmax(-1)
            variation = 0.5 * ((weights[..., :near] - exact).abs().sum(-1) + weights[..., near:].sum(-1))
            row = {"quantity": "total variation", "length": length, "name": name, "value": float(variation.max())}
            found.append({**row, "mean": float(variation.mean())})
    return found


def _carried(prior: RecencyPrior, queries: range, keys: range, config: Configuration) -> tuple[Tensor, Tensor]:
    """What a fused call with content zero carries: (H, Q, W) and (1, K, W)."""
    query, key = (
        torch.zeros(1, heads, len(at), 8, **config.place) for heads, at in ((prior.num_heads, queries), (1, keys))
    )
    at: dict[str, Any] = {"query_positions": queries, "key_positions": keys}
    joint = operands(AttentionCall.from_arguments(query, key, key, prior=prior, scale=1.0, **at))
    return joint[0][0], joint[1][0]


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """<query, key> of every pair as a fused kernel computes it: (H, Q, K) float64 from (H, Q, D) and (H, K, D)."""
    alone = key.transpose(0, 1).unsqueeze(-2)
    return log_sum_exp.attend(query.expand(key.shape[1], *query.shape), alone, scale=1.0)[1].movedim(0, -1).double()


def output_errors(config: Configuration, length: int, heads: int = 12, width: int = 64) -> list[Row]:
    """Errors of outputs with the GOAT prior over those of plain attention in the same dtype, and lanes that it took."""
    with torch.no_grad():
        query, key, value = (content(replace(config, seed=config.seed + n), 1, heads, length, width) for n in range(3))
        rows = torch.linspace(0, length - 1, min(64, length), device=query.device).long()
        prior = trained(goat_prior(heads, num_frequencies=4), config)
        plain, with_prior = (causal_rows(query, key, value, rows, one, 1 / math.sqrt(width)) for one in (None, prior))
        bare = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        outputs = [("SDPA, no prior", bare, plain, 0)]
        for name, tolerance in (("eotattn, GOAT", None), ("eotattn, GOAT, tight tolerance", TIGHT)):
            asked: dict[str, Any] = {"prior": prior, "tolerance": tolerance, "is_causal": True, "backend": "sdpa"}
            ours = output_of(prior_attention(query, key, value, **asked))
            outputs.append((name, ours, with_prior, prior.num_lanes(query.dtype, tolerance=tolerance)))
        alone = prior.num_lanes(torch.float32)
        outputs.append(("FlashBias as SDPA, GOAT", peers.flashbias(query, key, value, prior), with_prior, alone))
        errors = {name: relative_error(found[0, :, rows], exact) for name, found, exact, _ in outputs}
    at = {"quantity": "output error", "length": length}
    baseline = errors["SDPA, no prior"]
    return [
        {**at, "name": name, "value": errors[name], "ratio": errors[name] / baseline, "lanes": lanes}
        for name, _, _, lanes in outputs
    ]
