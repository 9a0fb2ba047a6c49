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
        self._changes: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
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
        changes = [(left, right, valid & ~taken_back) for left, right, valid in self._changes]
        if self._last is not None:
            before, rest, usable = self._last
            change = _difference(before, image), residual - rest, usable & ~taken_back
            changes = [*changes, change][-_WINDOW:]
        self._changes, self._last = changes, (image, residual, ~taken_back)
        correction, self._extrapolating = self._correction(residual, state.mass + state.target)
        moved = torch.where(image.isfinite(), image - correction, image)
        self._best = torch.minimum(self._best, state.error)
        fallback, self._fallback = self._fallback, torch.where(taken_back[..., None], self._fallback, image)
        return torch.where(taken_back[..., None], fallback, moved)

    def _correction(self, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What to subtract from the plain step, and for which problems there is something to go by."""
        if len(self._changes) < _WARM_UP:
            return torch.zeros_like(weight), torch.zeros_like(self._extrapolating)
        valid = torch.stack([usable for *_, usable in self._changes], -1)
        known = valid.sum(-1) >= _WARM_UP
        usable = (valid & known[..., None])[..., None]
        images, residuals = (torch.stack([change[side] for change in self._changes], -2) for side in (0, 1))
        residuals = torch.where(usable, residuals, 0.0)
        weighted = (residuals * weight[..., None, :]).double()
        system = weighted @ torch.cat([residuals, residual[..., None, :]], -2).double().mT
        # A handful of unknowns a problem: the CPU solves them sooner than a GPU starts to.
        gamma = _least_squares(system.cpu(), usable.cpu()).to(residual)
        return (gamma * torch.where(usable, images, 0.0)).sum(-2), known


def _least_squares(system: Tensor, usable: Tensor) -> Tensor:
    """Solve the normal equations, (..., w, w + 1), for the usable of the unknowns, shape (..., w, 1)."""
    gram, right = system[..., :-1], system[..., -1:]
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + torch.finfo(gram.dtype).tiny
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    gamma = torch.linalg.solve_ex(gram + eye * torch.where(usable, ridge, 1.0), right)[0]
    return torch.where(gamma.isfinite(), gamma, 0.0)


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """The change of what is finite."""
    return torch.where(after.isfinite() & before.isfinite(), after - before, 0.0)
