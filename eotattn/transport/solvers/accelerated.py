"""Sinkhorn's iteration, extrapolated from its last steps, with the plain iteration as its safety net."""

# Legend: b problems, m keys.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.optimality.keys import KeyBalance
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.sinkhorn import sinkhorn_move

__all__ = ["AcceleratedStep"]

#: A change is a new direction if its new part exceeds this part of it plus so many roundings of the first image.
_NEW = 1e-4
_ROUNDINGS = 4
#: Changes that are remembered, and the factor by which a step may worsen the error.
_WINDOW = 5
_SLACK = 1.1


class AcceleratedStep:
    """A step that remembers: the combination of the last plain steps whose residuals cancel best.

    With residuals r = S(g) - g of Sinkhorn's map S, every change of the residual is kept orthogonal to the ones before
    and of length one, together with the change of S(g) that belongs to it. The next potential is S(g) less the changes
    of S(g) weighted by the components of r. A step that makes the marginal error a tenth larger is taken back: that
    problem goes on from the plain step it had, and forgets.

    What is remembered lies in tensors that are changed in place, and nothing is asked of the host, so that a GPU can
    record and repeat a step. Residual and image lie side by side, so that one operation serves both.

    Example:
        >>> from eotattn.transport.optimality.keys import balance
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> AcceleratedStep()(problem, torch.zeros(2), balance(problem, torch.zeros(2)), 1.0)
        tensor([0., 0.])

    Source: Anderson 1965, type II, by truncated orthogonal directions as in He et al. 2024 (nonlinear truncated
    generalised conjugate residuals); for Sinkhorn, Chizat et al. 2020; the safeguard is original.
    """

    def __init__(self) -> None:
        self._epsilon = float("nan")

    def _forget(self, problem: TransportProblem, key_potential: Tensor, state: KeyBalance) -> None:
        assert problem.key_marginal is not None
        b, m = state.error.numel(), key_potential.shape[-1]
        self._root = torch.where(key_potential.isfinite(), problem.key_marginal, 0.0).sqrt()
        self._point, self._last, self._change = (key_potential.new_empty(b, 1, 2 * m) for _ in range(3))
        self._history = key_potential.new_zeros(b, _WINDOW, 2 * m)
        # Views of these tensors, residuals in front and images behind, made once since each takes the host time.
        self._residual, self._image = (part.view(key_potential.shape) for part in self._point.split(m, dim=-1))
        self._last_residual, self._last_image = self._last.split(m, dim=-1)
        self._residuals, self._images = self._history.split(m, dim=-1)
        self._part = self._change[..., :m]
        self._bound, self._unbounded = (torch.full_like(state.error, math.inf) for _ in range(2))

    def __call__(self, problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
        """Return the next key potential, shape (..., m); see ``sinkhorn_step`` for the arguments."""
        fresh = epsilon != self._epsilon
        if fresh:
            self._epsilon = epsilon
            self._forget(problem, key_potential, state)
        move, length = sinkhorn_move(problem, state, epsilon)
        torch.mul(move, self._root, out=self._residual)
        torch.add(key_potential, move, alpha=length, out=self._image)
        if fresh:
            self._last.copy_(self._point)
            size = (self._image.nan_to_num(0.0, 0.0, 0.0) * self._root).norm(dim=-1) / length
            self._rounding = (_ROUNDINGS * torch.finfo(size.dtype).eps * size).view(-1, 1, 1)
        better = state.error <= self._bound
        torch.where(better, _SLACK * state.error, self._unbounded, out=self._bound)
        kept = better.view(-1, 1, 1)
        self._remember(kept)
        torch.where(kept, self._point, self._last, out=self._last)
        components = torch.bmm(self._last_residual, self._residuals.mT)
        return torch.baddbmm(self._last_image, components, self._images, alpha=-1.0).view(key_potential.shape)

    def _remember(self, kept: Tensor) -> None:
        """Put the change since the last step before the other directions; a problem that is taken back has none."""
        change = torch.sub(self._point, self._last, out=self._change).nan_to_num_(0.0, 0.0, 0.0)  # removed: -inf + inf
        whole = torch.linalg.vector_norm(self._part, dim=-1, keepdim=True)
        change.baddbmm_(torch.bmm(self._part, self._residuals.mT), self._history, alpha=-1.0)
        length = torch.linalg.vector_norm(self._part, dim=-1, keepdim=True)
        length = torch.where(length > torch.add(self._rounding, whole, alpha=_NEW), length, math.inf)
        torch.mul(torch.cat((change / length, self._history[:, :-1]), 1), kept, out=self._history)
