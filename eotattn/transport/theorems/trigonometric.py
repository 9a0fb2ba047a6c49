"""A bounded, translation-equivariant log-prior of finite rank is a finite trigonometric polynomial in the lag."""

# Legend: T lags, r rank.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive, check_shape, require
from eotattn.transport.theorems.comparison import Comparison

__all__ = ["TrigonometricFactors", "trigonometric_factors"]


@dataclass(frozen=True, eq=False)
class TrigonometricFactors(Comparison):
    """The frequencies of a lag function; the left side is the function, the right the sum of its exponentials.

    Args:
        rank: Rank of the table ``kappa(i - j)``, which is the number of exponentials.
        frequencies: Radians a token, ascending, shape (r,); they come in pairs of opposite sign, zero alone.
        amplitudes: Complex, shape (r,).
        moduli: Moduli of the nodes, shape (r,); one for a bounded function. Below or above one the function decays or
            grows like an exponential, and (nearly) equal nodes are polynomial factors: ALiBi is a double node at one.

    Example:
        >>> trigonometric_factors(torch.cos(0.5 * torch.arange(9).double())).frequencies
        tensor([-0.5000,  0.5000], dtype=torch.float64)

    Source: Litman and Guo 2026, arXiv 2601.15380, Appendix F, Theorem 2.
    """

    rank: int
    frequencies: Tensor
    amplitudes: Tensor
    moduli: Tensor


def trigonometric_factors(lag_function: Tensor, *, tolerance: float = 1e-9) -> TrigonometricFactors:
    """Find the frequencies of a translation-equivariant table of finite rank.

    If ``kappa(i - j) = <a_i, b_j>`` with r features, the Hankel matrix of kappa has rank r, shifting it acts on its
    range as one r x r matrix, and kappa is a sum of powers of that matrix's eigenvalues. Bounded on all integers, these
    lie on the unit circle: ``kappa(t) = sum_k amplitude_k exp(i frequency_k t)``, a trigonometric polynomial.

    Args:
        lag_function: kappa at consecutive lags, nats, shape (T,), T >= 3, float64.
        tolerance: Singular values below this share of the largest count as zero.

    Returns:
        The factors; as a comparison, kappa against its reconstruction, shape (T,).

    Raises:
        TypeError: If it is not floating.
        ValueError: If there are too few lags, or as many exponentials as they could show: no finite rank is visible.

    Example:
        >>> trigonometric_factors(torch.full((5,), 2.0).double()).rank
        1

    Source: Litman and Guo 2026, arXiv 2601.15380, Appendix F, Theorem 2; the shift method, Roy and Kailath 1989.
    """
    owner, argument = "trigonometric_factors", "lag_function"
    check_floating(owner, argument, lag_function)
    check_shape(owner, argument, lag_function, (None,), "Pass one number a lag")
    check_no_nan(owner, argument, lag_function)
    tolerance = check_positive(owner, "tolerance", tolerance)
    length = len(lag_function)
    require(length >= 3, owner, argument, "hold at least three lags", lag_function, "Pass more lags")
    kappa = lag_function.detach().double()
    hankel = kappa.unfold(0, (length + 1) // 2, 1)
    left, values, _ = torch.linalg.svd(hankel, full_matrices=False)
    rank = int((values > tolerance * values[0]).sum())
    visible = rank < min(hankel.shape) or rank == 0
    require(visible, owner, argument, "have a rank below half its lags", f"rank {rank}", "Pass more lags")
    basis = left[:, :rank]
    nodes = torch.linalg.eigvals(torch.linalg.pinv(basis[:-1]) @ basis[1:])
    nodes = nodes[nodes.angle().argsort()]
    powers = nodes[None] ** torch.arange(length, device=kappa.device)[:, None]
    amplitudes = torch.linalg.lstsq(powers, kappa.to(powers.dtype)[:, None]).solution[:, 0]
    return TrigonometricFactors(
        statement="kappa(t) = sum of amplitude exp(i frequency t)",
        left=kappa,
        right=(powers @ amplitudes).real,
        relation="==",
        rank=rank,
        frequencies=nodes.angle(),
        amplitudes=amplitudes,
        moduli=nodes.abs(),
    )
