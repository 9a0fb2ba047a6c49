"""A query-independent default is a rank-one log-prior: it needs one lane, and no fewer."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive_int, check_shape
from eotattn.transport.theorems.comparison import Comparison

__all__ = ["key_only_minimality"]


def key_only_minimality(default: Tensor, num_queries: int) -> Comparison:
    """Compare the rank that a key-only log-prior has with the number of lanes that carry it.

    ``K_ij = u_j`` is the inner product of the query lane 1 and the key lane u_j. Up to row constants, which attention
    ignores, its rank is that of the table with centred rows: one, unless u is constant, when no lane is needed.

    Args:
        default: The u, nats, shape (m,), finite.
        num_queries: Rows of the table.

    Returns:
        The numerical rank (left) and the lanes needed (right), both 0-d.

    Raises:
        TypeError: If ``default`` is not floating or ``num_queries`` no whole number.
        ValueError: If a shape or value is out of range.

    Example:
        >>> key_only_minimality(torch.tensor([0.0, 1.0, 5.0]), 4).left
        tensor(1.)

    Source: Litman and Guo 2026, arXiv 2601.15380, Appendix F, Theorem 4.
    """
    owner = "key_only_minimality"
    check_floating(owner, "default", default)
    check_shape(owner, "default", default, (None,), "Pass one number a key")
    check_no_nan(owner, "default", default)
    num_queries = check_positive_int(owner, "num_queries", num_queries)
    table = default.double().expand(num_queries, -1)
    scale = default.abs().amax().clamp(min=1)
    centred = table - table.mean(-1, keepdim=True)
    tolerance = float(8 * torch.finfo(default.dtype).eps * scale * (num_queries * len(default)) ** 0.5)
    rank = torch.linalg.matrix_rank(centred, atol=tolerance, rtol=0.0)
    needed = centred[0].norm() * num_queries**0.5 > tolerance
    return Comparison("rank = lanes needed", rank.to(default.dtype), needed.to(default.dtype), "==")
