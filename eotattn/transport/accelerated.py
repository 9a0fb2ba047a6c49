"""Sinkhorn's iteration, extrapolated from its last steps (Anderson), with the plain iteration as its safety net."""

# Legend: m keys, w remembered steps; the leading dimensions are a batch.

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.transport.keys import KeyBalance
from eotattn.transport.problem import TransportProblem
from eotattn.transport.sinkhorn import sinkhorn_step

__all__ = ["AcceleratedStep"]

#: Steps that are remembered, and the changes that must be known before the first extrapolation.
_WINDOW = 10
_WARM_UP = 2
#: Ridge of the least squares, relative to its trace.
_RIDGE = 1e-10


class AcceleratedStep:
    """A step that remembers: the combination of the last plain steps whose residuals cancel best.

    With residuals r_k = S(g_k) - g_k of Sinkhorn's map S, the next potential is ``S(g) - sum_k gamma_k (S(g_k+1) -
    S(g_k))`` with gamma minimising ``|r - sum_k gamma_k (r_k+1 - r_k)|``. A step after which the marginal
    error exceeds the best one is taken back: that problem goes on from the plain step it had, and forgets.

    Example:
        >>> from eotattn.transport.keys import balance
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> AcceleratedStep()(problem, torch.zeros(2), balance(problem, torch.zeros(2)), 1.0)
        tensor([0., 0.])

    Source: Anderson 1965, type II; for Sinkhorn, Chizat et al. 2020, as a safeguarded variant (original).
    """

    def __init__(self) -> None:
        self._epsilon = float("nan")

    def _forget(self, state: KeyBalance, epsilon: float) -> None:
        self._epsilon = epsilon
        self._history: list[tuple[Tensor, Tensor, Tensor]] = []
        self._best = torch.full_like(state.error, float("inf"))
        self._fallback = torch.zeros_like(state.mass)
        self._extrapolating = torch.zeros_like(state.error, dtype=torch.bool)

    def __call__(self, problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
        """Return the next key potential, shape (..., m); see ``sinkhorn_step`` for the arguments."""
        if epsilon != self._epsilon:
            self._forget(state, epsilon)
        image = sinkhorn_step(problem, key_potential, state, epsilon)
        residual = torch.where(image.isfinite(), image - key_potential, 0.0)
        taken_back = self._extrapolating & ~(state.error <= self._best)
        kept = [(old, rest, valid & ~taken_back) for old, rest, valid in self._history[-_WINDOW:]]
        self._history = [*kept, (image, residual, ~taken_back)]
        correction, self._extrapolating = self._correction(state.mass + state.target)
        moved = torch.where(image.isfinite(), image - correction, image)
        self._best = torch.minimum(self._best, state.error)
        fallback, self._fallback = self._fallback, torch.where(taken_back[..., None], self._fallback, image)
        return torch.where(taken_back[..., None], fallback, moved)

    def _correction(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What to subtract from the plain step, and for which problems there is something to go by."""
        pairs = list(zip(self._history, self._history[1:], strict=False))
        valid = [before[2] & after[2] for before, after in pairs]
        known = torch.stack(valid).sum(0) >= _WARM_UP if pairs else torch.zeros_like(self._extrapolating)
        if len(pairs) < _WARM_UP:
            return torch.zeros_like(weight), torch.zeros_like(known)
        usable = torch.stack([one & known for one in valid], -1)[..., None]
        images, residuals = (
            torch.where(usable, torch.stack([_difference(a[k], b[k]) for a, b in pairs], -2), 0.0) for k in (0, 1)
        )
        weighted = (residuals * weight[..., None, :]).double()
        gram = weighted @ residuals.double().mT
        right = weighted @ self._history[-1][1][..., None].double()
        ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + torch.finfo(torch.float64).tiny
        eye = torch.eye(len(pairs), dtype=gram.dtype, device=gram.device)
        gamma = torch.linalg.solve_ex(gram + eye * torch.where(usable, ridge, 1.0), right)[0]
        gamma = torch.where(gamma.isfinite(), gamma, 0.0).to(weight.dtype)
        return (gamma * images).sum(-2), known


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """The change of what is finite."""
    return torch.where(after.isfinite() & before.isfinite(), after - before, 0.0)
