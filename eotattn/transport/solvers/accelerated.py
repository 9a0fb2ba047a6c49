"""Sinkhorn's iteration, extrapolated from its last steps, with the plain iteration as its safety net."""

# Legend: m keys, w remembered steps; the leading dimensions are a batch.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.optimality.keys import KeyBalance
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.sinkhorn import sinkhorn_step

__all__ = ["AcceleratedStep"]

#: A change is a new direction if this part of it is new, and exceeds so many roundings of the potential.
_NEW = 1e-4
_ROUNDINGS = 4
#: Steps that are remembered, and the changes that must be known before the first extrapolation.
_WINDOW = 10
_WARM_UP = 2


class AcceleratedStep:
    """A step that remembers: the combination of the last plain steps whose residuals cancel best.

    With residuals r = S(g) - g of Sinkhorn's map S, every change of the residual is kept orthogonal to the ones before
    and of length one, together with the change of S(g) that belongs to it. The next potential is S(g) less the changes
    of S(g) weighted by the components of r. A step after which the marginal error exceeds the best one is taken back:
    that problem goes on from the plain step it had, and forgets.

    What is remembered lies in tensors that are changed in place, and nothing is asked of the host, so that a GPU can
    record and repeat a step.

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

    def _forget(self, problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> None:
        assert problem.key_marginal is not None
        batch, m = state.error.shape, key_potential.shape[-1]
        self._epsilon, self._root = epsilon, problem.key_marginal.sqrt()
        self._residuals, self._images = (key_potential.new_zeros(*batch, _WINDOW, m) for _ in range(2))
        self._slot = torch.zeros(1, dtype=torch.int64, device=key_potential.device)
        self._last_image, self._last_residual, self._fallback = (key_potential.new_zeros(*batch, m) for _ in range(3))
        self._known, self._best = torch.zeros_like(state.error), torch.full_like(state.error, math.inf)
        self._usable, self._extrapolated = (torch.zeros_like(state.error, dtype=torch.bool) for _ in range(2))

    def __call__(self, problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
        """Return the next key potential, shape (..., m); see ``sinkhorn_step`` for the arguments."""
        if epsilon != self._epsilon:
            self._forget(problem, key_potential, state, epsilon)
        image = sinkhorn_step(problem, key_potential, state, epsilon)
        carried = image.nan_to_num(0.0, 0.0, 0.0)
        residual = (carried - key_potential.nan_to_num(0.0, 0.0, 0.0)) * self._root
        taken_back = self._extrapolated > (state.error <= self._best)
        self._remember(carried, residual, taken_back[..., None])
        torch.ge(self._known, _WARM_UP, out=self._extrapolated)
        components = (self._residuals @ residual[..., None]) * self._extrapolated[..., None, None]
        moved = image - (self._images.mT @ components).squeeze(-1)
        found = torch.where(taken_back[..., None], self._fallback, moved)
        torch.minimum(self._best, state.error, out=self._best)
        torch.where(taken_back[..., None], self._fallback, image, out=self._fallback)
        return found

    def _remember(self, image: Tensor, residual: Tensor, taken_back: Tensor) -> None:
        """Add the change since the last step as one more direction; a problem that was taken back starts anew."""
        usable = self._usable[..., None] > taken_back
        self._residuals.masked_fill_(taken_back[..., None], 0.0)
        change = (residual - self._last_residual) * usable
        components = self._residuals @ change[..., None]
        rest = change - (self._residuals.mT @ components).squeeze(-1)
        moved = image - self._last_image - (self._images.mT @ components).squeeze(-1)
        length, whole, size = (part.norm(dim=-1, keepdim=True) for part in (rest, change, image * self._root))
        rounding = _ROUNDINGS * torch.finfo(image.dtype).eps
        inverse = torch.where(length > torch.maximum(_NEW * whole, rounding * size), 1.0 / length, 0.0)
        self._residuals.index_copy_(-2, self._slot, (rest * inverse)[..., None, :])
        self._images.index_copy_(-2, self._slot, (moved * inverse)[..., None, :])
        self._slot.add_(1).remainder_(_WINDOW)
        self._known.mul_(~taken_back.squeeze(-1)).add_(usable.squeeze(-1))
        self._last_image.copy_(image)
        self._last_residual.copy_(residual)
        torch.logical_not(taken_back.squeeze(-1), out=self._usable)
