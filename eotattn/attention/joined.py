"""From a prior's expansions to the lanes of one fused call, multiplied out by a kernel.

Legend: H query heads, Hk key heads, Q queries, K keys, P lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.kernels import join, sdpa
from eotattn.priors.expansion import Form
from eotattn.priors.lanes import default_terms, is_low_precision
from eotattn.priors.positions import may_remember, tabulated

__all__ = ["joined"]


def joined(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """Query and key with the prior's lanes (and a padding lane) beside them.

    ``None`` where a kernel cannot do it and lanes come from factors: that is the definition, this is faster.
    """
    query, key, prior = call.query, call.key, call.prior
    queries, keys = call.query_positions.tensor, call.key_positions.tensor
    if prior is None or queries.dim() != 1 or keys.dim() != 1 or not may_remember(query.device):
        return None
    if join.refusal(query, key) is not None:
        return None
    parts = prior.expansions(query.dtype)
    if parts is None:
        return None
    coefficients = [tensor for part in parts for tensor in part.coefficients]
    if any(type(tensor) is not torch.nn.Parameter or tensor.dtype != torch.float32 for tensor in coefficients):
        return None
    prior.check_positions(queries, keys)
    forms = tuple(part.form for part in parts)
    widths = tuple(tuple(tensor.numel() // tensor.shape[0] for tensor in part.coefficients) for part in parts)
    scales = tuple(part.scale for part in parts)
    layout = _layout(forms, widths, scales, query.shape[1], key.shape[1], query.dtype)
    query_features = tabulated(("query", forms), queries, partial(_features, forms, "query"))
    key_features = tabulated(("key", forms), keys, partial(_features, forms, "key"))
    padding = call.masks.padding if call.masks.dense is None else None
    far = sdpa.far_lane(query.dtype, scale=call.scale)
    made = join.Join(layout, query_features, key_features, 1 / call.scale, padding, far)
    return join.join(query, key, made, coefficients)


def _features(forms: Sequence[Form], side: str, positions: Tensor) -> Tensor:
    """(L, columns) float32: what the forms need to know of the positions of one side, form by form."""
    each: list[Tensor] = []
    for form in forms:
        each.append(form.learned_features(positions) if form.learned == side else form.fixed_features(positions))
        if form.row_features is not None:
            row = form.row_features(positions)
            each.append((row if form.learned == side else torch.ones_like(row)).unsqueeze(-1))
    return torch.cat(each, dim=-1).float()


@lru_cache(maxsize=64)
def _layout(
    forms: tuple[Form, ...],
    widths: tuple[tuple[int, ...], ...],
    scales: tuple[tuple[float, ...], ...],
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> join.Layout:
    """Lanes of all forms side by side: every product of terms that matters, once for each head that needs its own."""
    sides: dict[str, list[join.Column]] = {"query": [], "key": []}
    first_feature, first_coefficient = {"query": 0, "key": 0}, 0
    for form, columns in zip(forms, widths, strict=True):
        terms = default_terms(dtype, one_side_is_exact=form.fixed_is_exact)
        fixed = "key" if form.learned == "query" else "query"
        factors, slots = len(form.sources), len(form.sources[0])
        at, other = first_feature[form.learned], first_feature[fixed]
        pairs = [(a, b) for a in range(terms) for b in range(1 if form.fixed_is_exact else terms) if a + b < terms]
        members = [join.NOTHING] if form.learned == "query" else list(range(num_heads // num_kv_heads))
        for member in members:
            for a, b in pairs:
                for f, sources in enumerate(form.sources):
                    learned = tuple((at + f * slots + s, first_coefficient + n) for s, n in enumerate(sources))
                    sides[form.learned].append(join.Column(learned, a, member, learned=True))
                    sides[fixed].append(join.Column(((other + f, join.NOTHING),), b, member, learned=False))
        first_feature[form.learned] += factors * slots
        first_feature[fixed] += factors
        if form.row_features is not None:
            if is_low_precision(dtype):
                row, one = (first_feature["query"], first_coefficient), (first_feature["key"], join.NOTHING)
                sides["query"].append(join.Column((row,), join.IDLE, join.NOTHING, learned=True))
                sides["key"].append(join.Column((one,), 0, join.NOTHING, learned=False))
            for side in first_feature:
                first_feature[side] += 1
        first_coefficient += sum(columns)
    coefficients = tuple(
        (width, scale, form.by_size)
        for form, columns, scale in zip(forms, widths, scales, strict=True)
        for width in columns
    )
    return join.Layout(tuple(sides["query"]), tuple(sides["key"]), coefficients, num_heads, num_kv_heads)
