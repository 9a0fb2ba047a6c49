"""From a call to the operands of one fused call: content with the lanes of the log-prior and of masks beside it.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, L tokens, C columns of a table, W kernel width.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall, static_size
from eotattn.attention.token_bias import bias_terms, gauge_lanes
from eotattn.compat import known_size
from eotattn.kernels import append, sdpa
from eotattn.priors.lane_plan import LanePlan, LaneRequest, plan_lanes
from eotattn.priors.lane_sides import Side
from eotattn.priors.lanes import Lanes, middle, span_of
from eotattn.priors.memory import kept, may_remember, remembered
from eotattn.priors.probing import Span, bits_of
from eotattn.priors.terms import KeyTerm, Term
from eotattn.priors.weight_map import WeightMap

__all__ = ["call_terms", "lanes_of", "operands", "plan_of"]

#: Shortest run of positions that a table is made for; longer ones are powers of two, so that tables last.
SHORTEST_RUN = 64


def call_terms(call: AttentionCall) -> tuple[Term | KeyTerm, ...]:
    """The terms of the log-prior, and of what depends on the key alone."""
    terms = () if call.prior is None else call.prior.terms()
    return terms if call.key_bias is None and call.masks.key_bias is None else (*terms, *bias_terms(call))


def operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, Q, W) and key (B, Hk, K, W) with lanes beside their content, and values as wide as V or wider."""
    if call.cache is not None:
        stored = call.cache.operands(call)
        if stored is not None:
            return stored
    terms = call_terms(call)
    padding = call.masks.padding if call.masks.dense is None else None
    gauge = None if call.query_bias is None else gauge_lanes(call)
    query, key = call.query, call.key
    if not terms and gauge is not None:
        query, key = (
            torch.cat([x, y.expand(*x.shape[:-1], 1)], dim=-1) for x, y in zip((query, key), gauge, strict=True)
        )
    if not terms and padding is None:
        return query, key, call.value
    far = None if padding is None else sdpa.padding_lane(padding, call.query.dtype, scale=call.scale)
    sides = _sides(call, terms) if terms else (None, None)
    if terms and gauge is not None:
        sides = _with_gauge(gauge, *sides)
    query, key = append.append(query, key, sides[0], sides[1], far)
    return query, key, call.value


def lanes_of(call: AttentionCall) -> Lanes | None:
    """The lanes of the call's log-prior and key masks, as a fused kernel would read them."""
    terms = call_terms(call)
    if not terms:
        return None
    plan, _ = plan_of(call, terms)
    query, key = _sides(call, terms)
    dtype, heads = call.query.dtype, call.query.shape[1]
    query_lanes = query.lanes(dtype)
    return Lanes(query_lanes.expand(*query_lanes.shape[:-3], heads, -1, -1), key.lanes(dtype), plan, (query, key))


def plan_of(call: AttentionCall, terms: tuple[Term | KeyTerm, ...]) -> tuple[LanePlan, Tensor | int]:
    """Which lane of the call holds what, and the origin that relative terms count from."""
    query_at, key_at = call.query_positions, call.key_positions
    origin: Tensor | int = 0
    if query_at.run is not None and key_at.run is not None:
        runs = _run(query_at.run), _run(key_at.run)
        after = query_at.run[0] >= sum(key_at.run)  # what is near the edge between them is then a small number
        origin = runs[0][0] if after else runs[0][0] + runs[0][1] // 2
        ends = [end for first, length in runs for end in (first, first + length)]
        span = Span(bits_of(max(map(abs, ends))), bits_of(max(abs(end - origin) for end in ends)))
    elif query_at.on_grid:
        span = span_of(query_at.tensor, key_at.tensor, 0)
    elif query_at.largest is not None and query_at is key_at:
        origin = query_at.largest // 2
        span = Span(bits_of(query_at.largest), bits_of(query_at.largest))
    else:
        origin = middle(query_at.tensor)
        span = span_of(query_at.tensor, key_at.tensor, origin)
    request = LaneRequest(
        num_heads=static_size(call.query.shape[1]),  # a graph is one of these heads, whatever the lengths
        num_kv_heads=static_size(call.key.shape[1]),
        dtype=call.query.dtype,
        num_coordinates=1 if call.prior is None else call.prior.num_coordinates,
        span=span,
        tolerance=call.tolerance,
        query_scale=1 / call.scale,
        gained=_gained(call),
    )
    return plan_lanes(terms, request), origin


def _sides(call: AttentionCall, terms: tuple[Term | KeyTerm, ...]) -> tuple[Side, Side]:
    """What the lanes of both sides are made of."""
    plan, tables, held = _planned(call, terms)
    more = plan.more_of_keys(terms, call.key_positions.tensor.double()) if plan.looked_up else None
    query, key = plan.sides(terms, tables, more, held)
    return plan.with_gains(query, call.query_gains) if call.query_gains else query, key


def _planned(
    call: AttentionCall, terms: tuple[Term | KeyTerm, ...]
) -> tuple[LanePlan, tuple[Tensor, Tensor], WeightMap]:
    """Plan, tables of both sides, how learned numbers enter; found at once for a call like an earlier one."""
    query_at, key_at, device = call.query_positions, call.key_positions, call.query.device

    def make() -> tuple[LanePlan, tuple[Tensor, Tensor], WeightMap]:
        plan, origin = plan_of(call, terms)
        query, key = (_table(plan, side, call, origin) for side in ("query", "key"))
        return plan, (query, key), plan.held(terms, device, query.dtype)

    is_run = (query_at.first is not None or query_at.shard) and (key_at.first is not None or key_at.shard)
    if not is_run or not may_remember(device):
        return make()
    key: list[Hashable] = [
        call.query.shape[1:3], call.key.shape[1:3], call.query.dtype, call.scale, call.tolerance,
        _gained(call) if call.query_gains else (), query_at.first, key_at.first, query_at.shard,
    ]  # fmt: skip
    for term in terms:
        key.append(term.features)
        if isinstance(term, KeyTerm):
            key.append(term.by_key_head)
        else:
            key.append(term.units)
            for one in term.numbers:
                key.append(one.shape)  # noqa: PERF401  # a comprehension is a call
    return kept(tuple(key), device, make)


def _gained(call: AttentionCall) -> tuple[int, ...]:
    """Terms on which queries have factors of their own."""
    return tuple([term for term, gain in enumerate(call.query_gains) if gain is not None])


def _with_gauge(gauge: tuple[Tensor, Tensor], query: Side, key: Side) -> tuple[Side, Side]:
    """Both sides with the lane that has the gradient of a bias of queries."""
    of_query, of_key = gauge
    if key.more is not None:
        of_key = torch.cat([key.more, of_key.expand(*key.more.shape[:-1], 1)], dim=-1)
    return query._replace(more=of_query), key._replace(more=of_key)


def _run(positions: tuple[int, int]) -> tuple[int, int]:
    """First position and length of a run that holds consecutive positions; a graph serves all lengths."""
    first, least = positions
    length = least if torch.compiler.is_compiling() else SHORTEST_RUN
    while length < least:
        length *= 2
    return first, length


def _table(plan: LanePlan, side: str, call: AttentionCall, origin: Tensor | int) -> Tensor:
    """Features of one side, (L, C) or (B, L, C): the head of the table of a run where positions are consecutive."""
    at = call.query_positions if side == "query" else call.key_positions
    device = call.query.device
    if torch.compiler.is_compiling() and at.first is not None and not isinstance(origin, Tensor):
        known = [known_size(number) for number in (at.first, at.length, origin)]
        if None not in known:
            table: Tensor = getattr(plan, plan.make_in_graph("run_table", side, *known, device))
            return table
    if at.first is None or isinstance(origin, Tensor) or not may_remember(device):
        make = lambda: plan.table(side, at.tensor, origin)  # noqa: E731
        documents = call.masks.documents
        return make() if documents is None else documents.remembered((plan, side), device, make)
    constants = (side, *_run((at.first, at.length)), origin)
    return remembered((plan, *constants), device, lambda: plan.run_table(*constants, device))[: at.length]
