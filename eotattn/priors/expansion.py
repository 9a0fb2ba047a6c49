"""Expansions: the one statement of a log-prior that is linear in its learned numbers.

Legend: H heads, L positions, Q queries, K keys, F factors, S slots, N coefficients.

A prior names its learned numbers, and what each of them multiplies at a position. Everything that fused kernels need
follows: multiplied out here they are :class:`~eotattn.priors.lanes.LaneFactors`; a GPU kernel multiplies them out on
the way to the attention kernel, and sums their gradients on the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eotattn.priors.lanes import LaneFactors, computing_dtype, is_low_precision
from eotattn.priors.positions import constants

__all__ = ["Expansion", "Form", "remembered"]

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Form:
    """What is fixed in an expansion: the features that its learned numbers multiply.

    Forms are told apart by identity, so that looking one up costs nothing; priors make each of theirs once (see
    :func:`remembered`). Features are pure functions of positions, (..., L) -> (..., L, columns) in float64.

    Args:
        learned: The side whose factors are learned; those of the other side are the same for all heads.
        sources: (F, S) indices of coefficients: factor f of the learned side is the sum over its slots s of
            coefficient[sources[f][s]] times learned feature f * S + s.
        learned_features: F * S columns.
        fixed_features: F columns: the factors of the other side.
        row_features: One column times which the first coefficient is a constant of each row, which softmax does not
            see; ``None`` for no such constant. Needs a learned query.
        by_size: The size of a coefficient counts, not its sign.
        fixed_is_exact: Whether any kernel dtype represents the fixed side exactly.
        is_relative: Whether positions may count from anywhere: a shift of both sides alters constants of rows alone.
    """

    learned: Literal["query", "key"]
    sources: tuple[tuple[int, ...], ...]
    learned_features: Features
    fixed_features: Features
    row_features: Features | None = None
    by_size: bool = False
    fixed_is_exact: bool = False
    is_relative: bool = False


@dataclass(frozen=True)
class Expansion:
    """Part of a log-prior: log_prior_ij = <query_i, key_j> + row_i, one side linear in learned numbers.

    Args:
        form: What is fixed.
        coefficients: Learned numbers, each (H,) or (H, n), whose columns are counted on from tensor to tensor.
        scale: One factor a head on all coefficients.
    """

    form: Form
    coefficients: tuple[Tensor, ...]
    scale: tuple[float, ...]

    def learned(self, positions: Tensor) -> Tensor:
        """The learned side's factors at (..., L) positions: (..., H, L, F) float64, where large terms may cancel."""
        sources, weights = self.form.sources, self._weights()
        features = self.form.learned_features(positions).unflatten(-1, (len(sources), -1))[..., None, :, :, :]
        slots = zip(zip(*sources, strict=True), features.unbind(-1), strict=True)
        at = [(constants(indices, positions.device, torch.int64), feature) for indices, feature in slots]
        products = [weights[:, indices].unsqueeze(-2) * feature for indices, feature in at]
        return functools.reduce(torch.add, products)  # slot by slot: the same bits for any number of positions

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The expansion multiplied out, for a kernel of ``dtype``.

        The derivative of a coefficient is a sum of score gradients times features. Score gradients of a row sum to zero
        only in exact arithmetic; in 16 bits what is left of them, times a large position, is noise. So the row constant
        gets a lane of its own in 16-bit dtypes: zero, with the derivative of the row constant, against one. Its
        gradient takes the rest off, and lags are summed instead of positions.
        """
        form, computing = self.form, computing_dtype(dtype)
        learns_query = form.learned == "query"
        learned_at, fixed_at = (query_positions, key_positions) if learns_query else (key_positions, query_positions)
        learned = self.learned(learned_at).to(computing)
        fixed = form.fixed_features(fixed_at).to(computing)[..., None, :, :]
        if not learns_query:
            query = fixed.expand(*fixed.shape[:-3], learned.shape[-3], *fixed.shape[-2:])
            return (LaneFactors(query, learned, exact="query" if form.fixed_is_exact else None),)
        row = None
        if form.row_features is not None:
            row = (self._weights()[:, :1] * form.row_features(query_positions).unsqueeze(-2)).to(computing)
        parts = [LaneFactors(learned, fixed, row=row, exact="key" if form.fixed_is_exact else None)]
        if row is not None and is_low_precision(dtype):
            idle = (row - row.detach()).unsqueeze(-1)
            parts.append(LaneFactors(idle, torch.ones_like(fixed[..., :1]), exact="both"))
        return tuple(parts)

    def _weights(self) -> Tensor:
        """(H, N) float64: the coefficients as they count."""
        columns = [
            tensor.double() if tensor.dim() == 2 else tensor.double().unsqueeze(-1) for tensor in self.coefficients
        ]
        weights = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        if self.form.by_size:
            weights = torch.where(weights >= 0, weights, -weights)  # unlike abs, has a gradient at zero
        return weights * constants(self.scale, weights.device).unsqueeze(-1)


def remembered(make: Callable[..., Form]) -> Callable[..., Form]:
    """``make`` with one result for equal arguments; compiled graphs make their own."""
    once = functools.lru_cache(maxsize=256)(make)

    @functools.wraps(make)
    def look_up(*arguments: Hashable) -> Form:
        return make(*arguments) if torch.compiler.is_compiling() else once(*arguments)

    return look_up
