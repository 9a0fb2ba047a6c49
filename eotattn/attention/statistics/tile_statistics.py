"""Statistics of a call whose logits a kernel makes tile by tile, without storing them.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, N chosen keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.attention.statistics.block_statistics import sink_of_rows
from eotattn.attention.statistics.column_sums import ColumnSums
from eotattn.attention.statistics.key_intervals import KeyIntervals
from eotattn.attention.statistics.score_rows import LaneRows, ScoreRows, TensorRows, split_table
from eotattn.kernels.score_sums import RowSums, column_sums, row_sums
from eotattn.kernels.score_tiles import ScoreTiles
from eotattn.priors.splitting import MOST_PIECES, split_numbers

__all__ = ["as_tiles", "tile_statistics"]

#: Queries whose logits at the chosen keys are computed at a time.
CHOSEN_ROWS = 2**13


def as_tiles(rows: ScoreRows) -> ScoreTiles | str:
    """State the call in the kernel's terms, or say why that cannot be done."""
    key_mask, lanes = _key_mask(rows), _lanes(rows)
    for found in (key_mask, lanes):
        if isinstance(found, str):
            return found
    return ScoreTiles(
        rows.query,
        rows.key,
        scale=rows.scale,
        softcap=rows.softcap,
        query_lanes=lanes[0] if isinstance(lanes, tuple) else None,
        key_lanes=lanes[1] if isinstance(lanes, tuple) else None,
        key_mask=key_mask if isinstance(key_mask, Tensor) else None,
        is_causal=rows.is_causal,
        window=rows.window,
        shift=rows.query_start - rows.key_start,
    )


def tile_statistics(
    rows: ScoreRows, tiles: ScoreTiles, chosen: Tensor, sink: Tensor | None, counted: Tensor
) -> tuple[dict[str, Tensor], ColumnSums]:
    """Compute column sums and, for all rows, what ``block_statistics`` computes by blocks.

    Args:
        rows: The call.
        tiles: The same call, as :func:`as_tiles` states it.
        chosen: (B, N) indices of the chosen keys; the first one is the margin's.
        sink: (H,), or broadcastable to (B, H, Q): logit of an explicit sink, nats, or ``None``.
        counted: (B, Q) queries whose weights columns and lags sum.
    """
    batch, heads, queries, keys = rows.shape
    mask = tiles.key_mask
    mask = torch.ones(batch, keys, dtype=torch.bool, device=rows.device) if mask is None else mask
    seen = KeyIntervals(mask, queries, tiles.shift, tiles.is_causal, tiles.window)
    num_keys = seen.num_keys().to(rows.dtype)[:, None, :].expand(batch, heads, queries)
    sums = row_sums(tiles, chosen[:, 0])
    fields = _row_fields(sums, num_keys, has_prior=tiles.query_lanes is not None)
    fields = fields if sink is None else _with_sink(fields, sink)
    admitted = seen.admit(chosen)[:, None]
    content, prior = _chosen_scores(rows, tiles, chosen)
    weight = torch.exp(content + prior - fields["log_sum_exp"].unsqueeze(-1))
    fields["key_mass"] = torch.where(admitted, weight, 0.0)
    defined = admitted[..., 0] & (num_keys > 1)
    margins = {
        "margin": content[..., 0] + prior[..., 0] - sums.rival,
        "content_margin": content[..., 0] - sums.rival_score,
        "prior_margin": prior[..., 0] - (sums.rival - sums.rival_score),
    }
    fields.update({name: torch.where(defined, value, math.nan) for name, value in margins.items()})
    mass, lags = column_sums(tiles, fields["log_sum_exp"], counted)
    count = seen.num_queries_of_keys(counted)[:, None, :].expand(batch, heads, keys).double()
    return fields, ColumnSums(mass, count, lags)


def _row_fields(sums: RowSums, num_keys: Tensor, *, has_prior: bool) -> dict[str, Tensor]:
    """Rows without an explicit sink; zeros, and a log-sum-exp of -inf, where there are no keys."""
    has = num_keys > 0
    lse = torch.where(has, sums.log_sum_exp, -math.inf)

    def held(values: Tensor) -> Tensor:
        return torch.where(has, values, 0.0)

    return {
        "log_sum_exp": lse,
        "key_log_sum_exp": lse,
        "entropy": held(sums.entropy.clamp(min=0)),
        "participation": held(sums.participation),
        "num_keys": num_keys,
        "score_min": held(sums.score_min),
        "score_max": held(sums.score_max),
        "expected_score": held(sums.expected_score),
        "prior_log_sum_exp": held(sums.prior_log_sum_exp) if has_prior else num_keys.clamp(min=1).log(),
        "explicit_sink_mass": torch.zeros_like(num_keys),
    }


def _with_sink(fields: dict[str, Tensor], sink: Tensor) -> dict[str, Tensor]:
    """The same rows with one more outcome: its mass is m, and the keys share the rest."""
    lse = fields["log_sum_exp"]
    sink = sink_of_rows(sink, 0)
    has = lse > -math.inf
    share, mass = (torch.where(has, torch.sigmoid(difference), 0.0) for difference in (lse - sink, sink - lse))
    mixing = -torch.special.xlogy(share, share) - torch.special.xlogy(mass, mass)
    return {
        **fields,
        "log_sum_exp": torch.where(has, torch.logaddexp(lse, sink), -math.inf),
        "entropy": share * fields["entropy"] + mixing,
        "participation": share.square() * fields["participation"] + mass.square(),
        "expected_score": share * fields["expected_score"],
        "explicit_sink_mass": mass,
    }


def _chosen_scores(rows: ScoreRows, tiles: ScoreTiles, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Content and prior (B, H, Q, N) at the chosen keys; those of the nearest key where one does not exist."""
    at = chosen.clamp(0, rows.shape[3] - 1)[:, None, :, None]
    key = tiles.key.gather(2, at.expand(-1, tiles.key.shape[1], -1, tiles.key.shape[-1])).to(rows.dtype)
    lanes = None
    if tiles.query_lanes is not None and tiles.key_lanes is not None:
        heads, width = tiles.key_lanes.shape[1], tiles.key_lanes.shape[-1]
        lanes = tiles.query_lanes, tiles.key_lanes.gather(2, at.expand(-1, heads, -1, width)).to(rows.dtype)
    content, prior = (rows.query.new_zeros(*rows.shape[:3], chosen.shape[1], dtype=rows.dtype) for _ in range(2))
    for start in range(0, rows.shape[2], CHOSEN_ROWS):
        span = slice(start, start + CHOSEN_ROWS)
        part = ScoreRows(rows.query[:, :, span].to(rows.dtype), key, rows.scale, softcap=rows.softcap)
        content[:, :, span] = part.content(0, part.shape[2])
        if lanes is not None:
            part = ScoreRows(lanes[0][:, :, span].to(rows.dtype), lanes[1], 1.0)
            prior[:, :, span] = part.content(0, part.shape[2])
    return content, prior


def _key_mask(rows: ScoreRows) -> Tensor | str | None:
    """The mask as (B, K) booleans, if all queries and heads share it."""
    if rows.mask is None:
        return None
    if not isinstance(rows.mask, TensorRows):
        return "the mask is a function of rows"
    table = rows.mask.table[(None,) * (4 - rows.mask.table.dim())]
    if table.shape[1] > 1 or table.shape[2] > 1:
        return "the mask differs from query to query or from head to head"
    added, seen = split_table(table, rows.dtype)
    if added is not None and bool(added.any()):
        return "the mask adds other numbers than 0 and -inf"
    return seen[:, 0, 0].expand(rows.shape[0], rows.shape[3])


def _lanes(rows: ScoreRows) -> tuple[Tensor, Tensor] | str | None:
    """Lanes of the log-prior and of a bias of keys as (B, H, Q, P) and (B, Hk, K, P)."""
    prior, bias = _lanes_of_prior(rows), _lanes_of_bias(rows)
    if prior is None or bias is None:
        return bias if prior is None else prior
    if isinstance(prior, str) or isinstance(bias, str):
        return prior if isinstance(prior, str) else bias
    return torch.cat([prior[0], bias[0]], dim=-1), torch.cat([prior[1], bias[1]], dim=-1)


def _lanes_of_bias(rows: ScoreRows) -> tuple[Tensor, Tensor] | str | None:
    """Ones, and the pieces of the bias."""
    bias, dtype = rows.key_bias, rows.query.dtype
    if bias is None:
        return None
    if bias.shape[1] not in (1, rows.key.shape[1]):
        return f"key_bias has {bias.shape[1]} heads and there are {rows.key.shape[1]} key heads"
    count = 1 if dtype == rows.dtype else MOST_PIECES
    key = torch.stack(split_numbers(bias.double(), dtype, count), dim=-1)
    return rows.query.new_ones(*rows.shape[:3], count), key.expand(-1, rows.key.shape[1], -1, -1)


def _lanes_of_prior(rows: ScoreRows) -> tuple[Tensor, Tensor] | str | None:
    """Those that the caller made."""
    if rows.log_prior is None:
        return None
    if not isinstance(rows.log_prior, LaneRows):
        return "the log-prior is a table or a function of rows; lanes would do"
    lanes = rows.log_prior.lanes
    if lanes.key.shape[-3] not in (1, rows.key.shape[1]):
        return (
            f"the lanes are those of {lanes.key.shape[-3]} key heads; make them with num_kv_heads={rows.key.shape[1]}"
        )
    if lanes.query.dtype != rows.query.dtype:
        return f"the lanes are {lanes.query.dtype} and the queries {rows.query.dtype}"
    batch, heads, queries, keys = rows.shape
    query = lanes.query.expand(batch, heads, queries, -1)
    return query, lanes.key.expand(batch, rows.key.shape[1], keys, -1)
