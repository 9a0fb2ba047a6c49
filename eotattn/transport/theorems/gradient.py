"""The backward pass of attention is a policy gradient, and its Jacobian the Fisher information."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_shape, require
from eotattn.transport.optimality.response import respond
from eotattn.transport.problems import TransportProblem
from eotattn.transport.theorems.comparison import Comparison, check_values, logit_size

__all__ = ["advantage_identity", "fisher_identity"]


def advantage_identity(
    score: Tensor, value: Tensor, upstream: Tensor, log_prior: Tensor | None = None, *, epsilon: float = 1.0
) -> Comparison:
    """Compare the gradient of a loss in the scores with attention times advantage.

    With rewards ``u_ij = <upstream_i, value_j>``, ``dLoss/ds_ij = p_ij (u_ij - sum_k p_ik u_ik) / epsilon``: the
    expected reward is the baseline.

    Args:
        score: Shape (..., n, m), cost units.
        value: Shape (..., m, v).
        upstream: Gradient of the loss in the output, shape (..., n, v).
        log_prior: Shape (..., n, m), nats.
        epsilon: Temperature, cost units.

    Returns:
        Automatic differentiation (left) and the formula (right), shape (..., n, m).

    Raises:
        TypeError: If dtypes differ.
        ValueError: If the problem is not well stated, or a shape or value is out of range.

    Example:
        >>> one = torch.ones(1, 1)
        >>> advantage_identity(torch.zeros(1, 2), torch.tensor([[0.0], [1.0]]), one).right
        tensor([[-0.2500,  0.2500]])

    Source: Litman 2025, arXiv 2508.08369.
    """
    owner, log_prior = "advantage_identity", None if log_prior is None else log_prior.detach()
    shape = TransportProblem(score, epsilon=epsilon, log_prior=log_prior).affinity.shape
    check_values(owner, "value", value, score)
    check_values(owner, "upstream", upstream, score, axis=-2)
    rule = f"have the width of value ({value.shape[-1]})"
    require(upstream.shape[-1] == value.shape[-1], owner, "upstream", rule, upstream, "Match them")
    leaf = score.detach().expand(shape).clone().requires_grad_()
    problem = TransportProblem(leaf, epsilon=epsilon, log_prior=log_prior)
    with torch.enable_grad():
        output = problem.affinity.average(torch.zeros_like(leaf[..., 0, :]), value, problem.epsilon)
        (left,) = torch.autograd.grad(output, leaf, upstream.expand_as(output))
    with torch.no_grad():
        weights = (score / epsilon if log_prior is None else score / epsilon + log_prior).softmax(-1)
        reward = upstream @ value.mT
        right = weights * (reward - (weights * reward).sum(-1, keepdim=True)) / epsilon
        magnitude = logit_size(score, log_prior, epsilon) * reward.abs().amax(-1, keepdim=True) / epsilon
    return Comparison("gradient = attention x advantage / epsilon", left, right, "==", magnitude=magnitude)


def fisher_identity(score: Tensor, log_prior: Tensor | None = None, *, epsilon: float = 1.0) -> Comparison:
    """Compare the Hessian of the potential with the Fisher information of the attention weights.

    The soft maximum ``epsilon log sum_j exp(s_ij / epsilon + log_prior_ij)`` has gradient p_i and Hessian
    ``(diag(p_i) - p_i p_i^T) / epsilon``: the covariance of the score function of the categorical family, its Fisher
    information in the natural parameter, over epsilon. It is also the Jacobian of softmax.

    Args:
        score: Shape (n, m), cost units.
        log_prior: Shape (n, m), nats.
        epsilon: Temperature, cost units.

    Returns:
        The Hessian by automatic differentiation (left) and the formula (right), shape (n, m, m), 1 / cost units.

    Raises:
        ValueError: If the problem is not well stated, or a batch.

    Example:
        >>> fisher_identity(torch.zeros(1, 2)).right
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]])

    Source: Litman 2025, arXiv 2508.08369.
    """

    def total(leaf: Tensor) -> Tensor:
        problem = TransportProblem(leaf, epsilon=epsilon, log_prior=log_prior)
        return -respond(problem, torch.zeros_like(leaf[0])).transform.sum()

    owner, remedy = "fisher_identity", "Pass one problem, no batch"
    check_shape(owner, "score", score, (None, None), remedy)
    if log_prior is not None:
        check_shape(owner, "log_prior", log_prior, score.shape, remedy)
    rows = torch.arange(score.shape[0])
    left = torch.autograd.functional.hessian(total, score)[rows, :, rows, :]
    weights = (score / epsilon if log_prior is None else score / epsilon + log_prior).softmax(-1)
    right = (torch.diag_embed(weights) - weights[..., :, None] * weights[..., None, :]) / epsilon
    magnitude = logit_size(score, log_prior, epsilon)[..., None] / epsilon
    statement = "Hessian of the potential = Fisher information / epsilon"
    return Comparison(statement, left, right, "==", magnitude=magnitude)
