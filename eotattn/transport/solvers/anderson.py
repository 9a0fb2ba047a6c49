"""Sinkhorn's iteration, extrapolated from its last steps, with the plain iteration as its safety net."""

# Legend: b problems, m keys.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_positive_int
from eotattn.transport.optimality.residual import MarginalResidual, Residuals
from eotattn.transport.problems.affinity import plus
from eotattn.transport.solvers.iteration import IterativeSolver, Step
from eotattn.transport.solvers.sinkhorn import sinkhorn_move

__all__ = ["Anderson"]

#: A change is a new direction if its new part exceeds this part of it plus so many roundings of the first image.
_NEW = 1e-4
_ROUNDINGS = 4
#: The factor by which a step may worsen the error.
_SLACK = 1.1


@dataclass(frozen=True, kw_only=True)
class Anderson(IterativeSolver):
    """Sinkhorn's iteration with memory: the combination of the last steps whose residuals cancel best.

    With residuals r = S(g) - g of Sinkhorn's map S, every change of the residual is kept orthogonal to the ones before
    and of length one, together with the change of S(g) that belongs to it. The next potential is S(g) less the changes
    of S(g) weighted by the components of r. A step that makes the marginal error a tenth larger is taken back: that
    problem goes on from the plain step it had, and forgets.

    Args:
        tolerance: See ``IterativeSolver``.
        max_iterations: Steps a problem may take.
        memory: Changes that are remembered, each 2 m numbers a problem.

    Example:
        >>> Anderson().memory
        5

    Source: Anderson 1965, type II, by truncated orthogonal directions as in He et al. 2024 (nonlinear truncated
    generalised conjugate residuals); for Sinkhorn, Chizat et al. 2020.
    """

    memory: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int(self.name, "memory", self.memory)

    def step(self, residuals: Residuals) -> Step:
        """See ``IterativeSolver``."""
        return _Extrapolation(residuals, self.memory)


class _Extrapolation:
    """The step; what it remembers lies in tensors that are changed in place, and nothing is asked of the host.

    So a GPU can record and repeat it. Residual and image lie side by side, so that one operation serves both.
    """

    def __init__(self, residuals: Residuals, memory: int) -> None:
        self._residuals_of, self._memory = residuals, memory
        self._fresh = True

    def _prepare(self, key_potential: Tensor, state: MarginalResidual) -> None:
        marginal = self._residuals_of.problem.key_marginal
        assert marginal is not None
        b, m = state.error.numel(), key_potential.shape[-1]
        self._root = torch.where(key_potential.isfinite(), marginal, 0.0).sqrt()
        self._point, self._last, self._change = (key_potential.new_empty(b, 1, 2 * m) for _ in range(3))
        self._history = key_potential.new_zeros(b, self._memory, 2 * m)
        # Views of these tensors, residuals in front and images behind, made once since each takes the host time.
        self._residual, self._image = (part.view(key_potential.shape) for part in self._point.split(m, dim=-1))
        self._last_residual, self._last_image = self._last.split(m, dim=-1)
        self._residuals, self._images = self._history.split(m, dim=-1)
        self._part = self._change[..., :m]
        self._bound, self._unbounded = (torch.full_like(state.error, math.inf) for _ in range(2))

    def __call__(self, key_potential: Tensor, state: MarginalResidual) -> Tensor:
        """Return the next key potential, shape (..., m)."""
        fresh, self._fresh = self._fresh, False
        if fresh:
            self._prepare(key_potential, state)
        move, length = sinkhorn_move(self._residuals_of, state)
        torch.mul(move, self._root, out=self._residual)
        self._image.copy_(plus(key_potential, move, length))
        if fresh:
            self._last.copy_(self._point)
            size = ((self._image.nan_to_num(0.0, 0.0, 0.0) * self._root) / length).norm(dim=-1)
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
