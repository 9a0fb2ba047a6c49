"""From a prior's expansions to the lanes of one fused call, multiplied out by a kernel.

Legend: H query heads, Hk key heads, Q queries, K keys, P lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.kernels import join, sdpa
from eotattn.priors.expansion import Expansion
from eotattn.priors.lanes import default_terms
from eotattn.priors.positions import may_remember, tabulated

__all__ = ["joined"]


class _Part(NamedTuple):
    """What of an expansion decides the layout; hashable."""

    name: object
    learns_query: bool
    sources: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    scale: tuple[float, ...]
    by_size: bool
    fixed_is_exact: bool
    has_residual: bool


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
    layout = _layout(tuple(map(_part, parts)), query.shape[1], key.shape[1], query.dtype)
    sides = (("query", queries), ("key", keys))
    features = [tabulated((side, *(part.name for part in parts)), at, _all_features(parts, side)) for side, at in sides]
    padding = call.masks.padding if call.masks.dense is None else None
    far = sdpa.far_lane(query.dtype, scale=call.scale)
    made = join.Join(layout, features[0], features[1], 1 / call.scale, padding, far)
    return join.join(query, key, made, coefficients)


def _part(part: Expansion) -> _Part:
    widths = tuple(1 if tensor.dim() == 1 else tensor.shape[1] for tensor in part.coefficients)
    learns_query = part.learned == "query"
    exact, residual = part.fixed_is_exact, part.has_residual
    return _Part(part.name, learns_query, part.sources, widths, part.scale, part.by_size, exact, residual)


def _all_features(parts: Sequence[Expansion], side: str) -> Callable[[Tensor], Tensor]:
    def compute(positions: Tensor) -> Tensor:
        each = [part.learned_features if part.learned == side else part.fixed_features for part in parts]
        return torch.cat([features(positions) for features in each], dim=-1)

    return compute


@lru_cache(maxsize=64)
def _layout(parts: tuple[_Part, ...], num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> join.Layout:
    """Lanes of all parts side by side: every product of terms that matters, once for each head that needs its own."""
    sides: tuple[list[join.Column], list[join.Column]] = ([], [])  # query, key
    first_feature, first_coefficient = [0, 0], 0
    for part in parts:
        terms = default_terms(dtype, one_side_is_exact=part.fixed_is_exact)
        learned_side = 0 if part.learns_query else 1
        fixed_side, slots = 1 - learned_side, len(part.sources[0])
        members = [join.NOTHING] if part.learns_query else list(range(num_heads // num_kv_heads))
        pairs = [(a, b) for a in range(terms) for b in range(1 if part.fixed_is_exact else terms) if a + b < terms]
        for member in members:
            for a, b in pairs:
                for f, sources in enumerate(part.sources):
                    at = first_feature[learned_side] + f * slots
                    is_residual = part.has_residual and f == len(part.sources) - 1
                    if is_residual and a > 0:
                        continue
                    centre = first_feature[learned_side] + len(part.sources) * slots + f if part.has_residual else -1
                    learned = tuple((at + s, first_coefficient + n) for s, n in enumerate(sources))
                    column = join.Column(learned, a, member, learned=True, centre=centre)
                    residual = join.Column(((at, join.NOTHING),), a, member, learned=False, centre=join.RESIDUAL)
                    sides[learned_side].append(residual if is_residual else column)
                    fixed = ((first_feature[fixed_side] + f, join.NOTHING),)
                    sides[fixed_side].append(join.Column(fixed, b, member, learned=False))
        first_feature[learned_side] += len(part.sources) * slots + (len(part.sources) - 1) * part.has_residual
        first_feature[fixed_side] += len(part.sources)
        first_coefficient += sum(part.widths)
    coefficients = tuple((width, part.scale, part.by_size) for part in parts for width in part.widths)
    return join.Layout(tuple(sides[0]), tuple(sides[1]), coefficients, num_heads, num_kv_heads)
