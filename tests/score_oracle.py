"""What :mod:`eotattn.kernels.score_sums` computes, from dense float64 logits and the definitions."""

import math

import torch

from eotattn.kernels.score_sums import RowSums
from eotattn.kernels.score_tiles import ScoreTiles


def make_tiles(sizes, dtype=torch.float32, *, lanes=0, padded=False, seed=0, device="cpu", **options):
    """Random content (B, H, Hk, Q, K, D) with entries of size two, lanes and a key mask with a batch without start."""
    batch, heads, kv_heads, queries, keys, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key = 2 * normal(batch, heads, queries, width), normal(batch, kv_heads, keys, width)
    if lanes:
        key_lanes = normal(1, 1, keys, lanes).expand(batch, kv_heads, keys, lanes)
        options.update(query_lanes=normal(batch, heads, queries, lanes), key_lanes=key_lanes)
    if padded:
        mask = torch.rand(batch, keys, generator=generator) < 0.7
        mask[0, :5] = False
        options["key_mask"] = mask.to(device)
    return ScoreTiles(query, key, options.pop("scale", width**-0.5), **options)


def admissible(tiles):
    """(B, 1, Q, K)."""
    queries, keys = tiles.query.shape[2], tiles.key.shape[2]
    query_at = torch.arange(queries, device=tiles.query.device)[:, None] + tiles.shift
    key_at = torch.arange(keys, device=tiles.query.device)
    seen = torch.ones_like(key_at <= query_at)
    seen = seen & (key_at <= query_at) if tiles.is_causal else seen
    seen = seen if tiles.window is None else seen & (key_at > query_at - tiles.window)
    seen = seen.expand(tiles.query.shape[0], 1, queries, keys)
    return seen if tiles.key_mask is None else seen & tiles.key_mask[:, None, None, :]


def scores(tiles):
    """Content and prior (B, H, Q, K), float64."""
    groups = tiles.query.shape[1] // tiles.key.shape[1]

    def products(query, key):
        return torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double().repeat_interleave(groups, 1))

    content = tiles.scale * products(tiles.query, tiles.key)
    content = content if tiles.softcap is None else tiles.softcap * torch.tanh(content / tiles.softcap)
    prior = torch.zeros_like(content)
    return content, prior if tiles.query_lanes is None else products(tiles.query_lanes, tiles.key_lanes)


def dense_row_sums(tiles, chosen):
    """Row sums; rows without admissible keys or rivals hold whatever comes out."""
    content, prior = scores(tiles)
    seen = admissible(tiles).expand_as(content)
    logits = (content + prior).masked_fill(~seen, -math.inf)
    weights = torch.softmax(logits, -1)
    others = logits.clone()
    for sample, index in enumerate(chosen.tolist()):
        if 0 <= index < logits.shape[-1]:
            others[sample, :, :, index] = -math.inf
    rival, at = others.max(-1, keepdim=True)
    return RowSums(
        log_sum_exp=logits.logsumexp(-1),
        entropy=-torch.special.xlogy(weights, weights).sum(-1),
        participation=weights.square().sum(-1),
        score_min=content.masked_fill(~seen, math.inf).amin(-1),
        score_max=content.masked_fill(~seen, -math.inf).amax(-1),
        expected_score=(weights * content).sum(-1),
        rival=rival.squeeze(-1),
        rival_score=content.gather(-1, at).squeeze(-1),
        prior_log_sum_exp=prior.masked_fill(~seen, -math.inf).logsumexp(-1),
    )


def dense_column_sums(tiles, log_sum_exp, counted):
    """Mass by key and by lag."""
    content, prior = scores(tiles)
    logits = (content + prior).masked_fill(~admissible(tiles), -math.inf)
    weights = torch.nan_to_num((logits - log_sum_exp.double().unsqueeze(-1)).exp(), nan=0.0, posinf=0.0)
    weights = weights * counted[:, None, :, None]
    queries, keys = weights.shape[-2:]
    lags = [torch.diagonal(weights, offset=-lag, dim1=-2, dim2=-1).sum(-1) for lag in range(1 - keys, queries)]
    return weights.sum(-2), torch.stack(lags, dim=-1)
