"""Statistics of attention rows and columns, streamed: O(L d) memory, never an L x L tensor.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width, N chosen keys.

Two forms compute the same: blocks of rows, for every call and device, and on CUDA kernels that store no logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.attention.statistics.attention_statistics import AttentionStatistics
from eotattn.attention.statistics.block_statistics import block_statistics
from eotattn.attention.statistics.column_sums import ColumnSums
from eotattn.attention.statistics.score_rows import (
    LaneRows,
    RowSource,
    ScoreRows,
    ScoreSource,
    TensorRows,
    WeightRows,
    block_spans,
)
from eotattn.attention.statistics.tile_statistics import as_tiles, tile_statistics
from eotattn.attention.token_bias import check_biases
from eotattn.checks import (
    check_choice,
    check_floating,
    check_positive,
    check_positive_int,
    check_same_device,
    check_shape,
    require,
)
from eotattn.kernels.score_sums import refusal
from eotattn.kernels.score_tiles import ScoreTiles
from eotattn.priors.lanes import Lanes

__all__ = ["AttentionStatistics", "row_statistics", "weight_statistics"]

OWNER = "row_statistics"


@torch.no_grad()
def row_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    log_prior: Tensor | Lanes | RowSource | None = None,
    mask: Tensor | RowSource | None = None,
    is_causal: bool = False,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_start: int = 0,
    key_start: int = 0,
    sequence_start: Tensor | None = None,
    counted: Tensor | None = None,
    keys: tuple[int, ...] = (0,),
    backend: str = "auto",
    block_elements: int | None = None,
) -> AttentionStatistics:
    """Compute all statistics of softmax(softcap(scale * <query, key>) + log_prior) without storing a row of weights.

    16-bit inputs are computed in float32; columns and lags are summed in float64 or finer.

    Args:
        query: (B, H, Q, D), floating.
        key: (B, Hk, K, D); Hk divides H (grouped-query attention), no head is repeated in memory.
        value: (B, Hk, K, V); give it to get the output as well.
        scale: Factor on the inner products, default 1 / sqrt(D).
        softcap: c of c tanh(score / c), nats, positive; ``None`` for none.
        log_prior: Broadcastable to (B, H, Q, K), nats, or a function (start, stop) -> those rows, or the lanes of a
            prior; the prior part. Lanes state it up to a constant of each row, which moves both log-sum-exps alike and
            nothing else, and within their ``error_bound``, which every statistic inherits.
        mask: Likewise; boolean with true where a query may attend, or floating and added to the prior part, with -inf
            or the dtype's lowest number at inadmissible keys.
        is_causal: Keys at later positions than the query are inadmissible.
        window: Keys ``window`` or more tokens before the query are inadmissible.
        sink_logits: (H,), or (B or 1, H, Q or 1): logit of an explicit sink, nats; several by their log-sum-exp.
        key_bias: (B, H, K), or (B, Hk, K) or (B, 1, K) where heads share it, nats, finite: a log-prior of keys that the
            tokens decide, added to the prior part.
        query_start: Position of the first query, tokens; with a cache, the number of earlier tokens.
        key_start: Position of the first key, tokens.
        sequence_start: (B,) position of the first token that is not padding; chosen keys and columns count from it.
        counted: (B, Q) boolean, false where a query is padding; all by default.
        keys: Chosen keys, counted from the start of the sequence; the first one is j* of the margin.
        backend: ``"kernel"`` for the kernel, ``"blocks"`` for blocks of rows; ``"auto"`` takes the kernel where it
            serves: on CUDA with Triton, in 16 or 32 bits, heads and lanes up to 128 wide, masks that all queries and
            heads share, priors as lanes, no output wanted. The result says which it was.
        block_elements: Entries of a block of logits, default 2^19 on a CPU and 2^25 on a GPU; memory is about ten such
            blocks. Asks for blocks.

    Returns:
        :class:`AttentionStatistics`.

    Raises:
        ValueError: For shapes, devices or values that do not fit.
        TypeError: For dtypes that do not fit.
        NotImplementedError: If the kernel is asked for and does not serve the call; it says why.

    Source:
        Definitions: Litman and Guo 2026 (arXiv 2601.15380), theorem 5.1 and definitions 5.2 and 5.3; Gu et al. 2024
        (arXiv 2410.10781) for the sink mass.

    Example:
        >>> query = key = torch.zeros(1, 2, 4, 8)
        >>> row_statistics(query, key, is_causal=True).key_mass[0, 0, :, 0]
        tensor([1.0000, 0.5000, 0.3333, 0.2500])
    """
    _check_content(query, key, value, sink_logits)
    check_biases(OWNER, query, key, key_bias, None, 1.0)
    check_choice(OWNER, "backend", backend, ("auto", "kernel", "blocks"))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else check_positive(OWNER, "scale", scale)
    softcap = None if softcap is None else check_positive(OWNER, "softcap", softcap)
    window = None if window is None else check_positive_int(OWNER, "window", window)
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    rows = ScoreRows(
        query,
        key,
        scale,
        softcap=softcap,
        log_prior=_as_rows("log_prior", log_prior, shape),
        mask=_as_rows("mask", mask, shape),
        is_causal=is_causal,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_bias=key_bias,
    )
    tiles = "blocks are asked for" if backend == "blocks" else _tiles(rows, value, block_elements)
    if backend == "kernel" and isinstance(tiles, str):
        raise NotImplementedError(f"{OWNER}: backend 'kernel' does not serve this call: {tiles}. Use 'blocks'.")
    sink = None if sink_logits is None else sink_logits.to(rows.dtype)
    places = _places(rows, sequence_start, counted, keys)
    if isinstance(tiles, str):
        wide = None if value is None else value.to(rows.dtype)
        return _statistics(rows, places, "blocks", *_by_blocks(rows.widened(), places, wide, sink, block_elements))
    found = tile_statistics(rows, tiles, places.chosen, sink, places.counted)
    return _statistics(rows, places, "kernel", *found)


@torch.no_grad()
def weight_statistics(
    weights: Tensor,
    *,
    admissible: Tensor | None = None,
    has_sink: bool = False,
    query_start: int = 0,
    key_start: int = 0,
    sequence_start: Tensor | None = None,
    counted: Tensor | None = None,
    keys: tuple[int, ...] = (0,),
) -> AttentionStatistics:
    """Compute the same statistics from stored attention maps: logits are ln p, so that lse is zero.

    Entropy, masses, profiles and margins are those of the model. A map does not tell content from prior: omega and the
    content margin are those of the whole logit, against a uniform prior. Where an admissible key has weight zero, omega
    is no more than a lower bound, by the smallest number that the dtype of the map can hold.

    Args:
        weights: (B, H, Q, K), rows sum to one, or to zero where no key is admissible.
        admissible: Boolean, broadcastable to the weights, true where a query may attend; by default, where it does.
        has_sink: Whether rows sum to less than one, because an explicit sink has the rest.
        query_start: Position of the first query, tokens.
        key_start: Position of the first key, tokens.
        sequence_start: (B,) position of the first token that is not padding.
        counted: (B, Q) boolean, false where a query is padding.
        keys: Chosen keys, counted from the start of the sequence.

    Returns:
        :class:`AttentionStatistics`.

    Example:
        >>> weight_statistics(torch.full((1, 1, 2, 2), 0.5)).entropy
        tensor([[[0.6931, 0.6931]]])
    """
    check_floating("weight_statistics", "weights", weights)
    remedy = "Add batch and head axes"
    require(weights.dim() == 4, "weight_statistics", "weights", "have shape (B, H, Q, K)", weights, remedy)
    source = WeightRows(weights, query_start, key_start, admissible, has_sink)
    places = _places(source, sequence_start, counted, keys)
    sink = torch.zeros(weights.shape[1], dtype=source.dtype, device=source.device) if has_sink else None
    return _statistics(source, places, "blocks", *_by_blocks(source, places, None, sink))


@dataclass(frozen=True, eq=False)
class _Places:
    """Where to look: sequence starts (B,), whether they were given, queries that count (B, Q), chosen keys (B, N)."""

    starts: Tensor
    given: bool
    counted: Tensor
    chosen: Tensor


def _places(
    source: ScoreSource, sequence_start: Tensor | None, counted: Tensor | None, keys: tuple[int, ...]
) -> _Places:
    batch, _, queries, _ = source.shape
    device = source.device
    starts = torch.zeros(batch, dtype=torch.int64, device=device) if sequence_start is None else sequence_start
    counted = torch.ones(batch, queries, dtype=torch.bool, device=device) if counted is None else counted
    check_shape(OWNER, "sequence_start", starts, (batch,), "One index a sequence")
    check_shape(OWNER, "counted", counted, (batch, queries), "One entry a query")
    known = len(keys) > 0 and all(isinstance(key, int) and key >= 0 for key in keys)
    require(known, OWNER, "keys", "name at least one key, from 0 up", keys, "Count from the first token")
    starts, counted = starts.to(device), counted.to(device)
    chosen = starts[:, None] + torch.tensor(keys, device=device) - source.key_start
    return _Places(starts, sequence_start is not None, counted, chosen)


def _by_blocks(
    source: ScoreSource,
    places: _Places,
    value: Tensor | None = None,
    sink_logits: Tensor | None = None,
    block_elements: int | None = None,
) -> tuple[dict[str, Tensor], ColumnSums]:
    """Fields of rows and sums of columns of any source of blocks of logits."""
    columns, parts = ColumnSums.empty(source), []
    for start, stop in block_spans(source, block_elements):
        block = source.block(start, stop)
        weights, rows = block_statistics(block, places.chosen, sink_logits, value)
        columns.add(weights, block, places.counted[:, start:stop])
        parts.append(rows)
    return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}, columns


def _statistics(
    source: ScoreSource, places: _Places, backend: str, rows: dict[str, Tensor], columns: ColumnSums
) -> AttentionStatistics:
    statistics = AttentionStatistics(
        **rows,
        column_mass=columns.mass,
        column_count=columns.count,
        lag_mass=columns.lags,
        first_lag=source.query_start - source.key_start - source.shape[3] + 1,
        counted=places.counted & (rows["num_keys"][:, 0] > 0),
        backend=backend,
    )
    moved = places.given or source.key_start > 0
    return statistics.counted_from(places.starts, source.key_start) if moved else statistics


def _tiles(rows: ScoreRows, value: Tensor | None, block_elements: int | None) -> ScoreTiles | str:
    """The call in the kernel's terms, or why the kernel does not serve it."""
    if value is not None:
        return "an output is wanted, and the kernel multiplies no values"
    if block_elements is not None:
        return "block_elements asks for blocks"
    tiles = as_tiles(rows)
    return tiles if isinstance(tiles, str) else refusal(tiles) or tiles


def _as_rows(name: str, table: Tensor | Lanes | RowSource | None, shape: tuple[int, ...]) -> RowSource | None:
    if isinstance(table, Lanes):
        heads, queries, keys = shape[1:]
        sides = (table.query.shape[-3:-1], table.key.shape[-2:-1]) == ((heads, queries), (keys,))
        rule = f"have lanes of {heads} heads, {queries} queries and {keys} keys"
        remedy = "Take the lanes at the positions of this call"
        require(sides, OWNER, name, rule, (tuple(table.query.shape), tuple(table.key.shape)), remedy)
        return LaneRows(table)
    if not isinstance(table, Tensor):
        return table
    padded = (1,) * (4 - table.dim()) + tuple(table.shape)
    fits = table.dim() <= 4 and all(have in (1, want) for have, want in zip(padded, shape, strict=True))
    require(fits, OWNER, name, f"broadcast to {shape}", table, "Add or drop axes")
    return TensorRows(table)


def _check_content(query: Tensor, key: Tensor, value: Tensor | None, sink: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is not None:
            check_floating(OWNER, name, tensor)
            remedy = "Split the heads first"
            require(tensor.dim() == 4, OWNER, name, "have shape (B, heads, length, width)", tensor, remedy)
            require(tensor.numel() > 0, OWNER, name, "not be empty", tensor, "Pass at least one token")
    batch, heads, _, width = query.shape
    check_shape(OWNER, "key", key, (batch, None, None, width), "Match the query's batch and width")
    rule = f"have a number of heads that divides the query's {heads}"
    require(heads % key.shape[1] == 0, OWNER, "key", rule, key, "Choose num_kv_heads so")
    if value is not None:
        check_shape(
            OWNER, "value", value, (batch, key.shape[1], key.shape[2], None), "Match the key's heads and length"
        )
    if sink is not None:
        wanted, have = (batch, heads, query.shape[2]), tuple(sink.shape)
        fits = have == (heads,) or (
            len(have) == 3
            and have[1] == heads
            and all(size in (1, want) for size, want in zip(have, wanted, strict=True))
        )
        require(fits, OWNER, "sink_logits", f"have shape ({heads},) or broadcast to {wanted}", sink, "One logit a head")
    check_same_device(OWNER, ("query", query), key=key, value=value, sink_logits=sink)
