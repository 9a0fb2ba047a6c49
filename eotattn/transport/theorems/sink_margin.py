"""Attention sinks: what their margin is made of, and how it shields the output from its context."""

# Legend: n queries, m keys; z = score / epsilon + log_prior, nats.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_no_nan, check_positive_int, check_shape, require
from eotattn.transport.problems import TransportProblem
from eotattn.transport.theorems.comparison import Comparison, check_values, logit_size

__all__ = ["SinkMargin", "context_sensitivity", "sink_margin", "value_perturbation"]


@dataclass(frozen=True, eq=False)
class SinkMargin(Comparison):
    """A margin and its two parts; the left side is the margin, the right the sum of the parts.

    Args:
        content: What the scores contribute against the runner-up, nats, shape (..., n).
        prior: What the log-prior contributes, nats, shape (..., n).
        runner_up: The key that comes closest to the sink, shape (..., n).

    Example:
        >>> sink_margin(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]])).prior
        tensor([3.])

    Source: Litman and Guo 2026, arXiv 2601.15380, Definition 5.2.
    """

    content: Tensor
    prior: Tensor
    runner_up: Tensor


def _parts(score: Tensor, log_prior: Tensor | None, epsilon: float, sink: int) -> tuple[Tensor, Tensor]:
    """Content and prior of every pair in nats, after the checks of a problem."""
    problem = TransportProblem(score, epsilon=epsilon, log_prior=log_prior)
    require(problem.num_keys > 1, "sink_margin", "score", "have at least two keys", score, "Add a context")
    sink = check_positive_int("sink_margin", "sink", sink, minimum=0)
    require(sink < problem.num_keys, "sink_margin", "sink", f"be below {problem.num_keys}", sink, "Pass a key")
    prior = torch.zeros_like(score) if log_prior is None else log_prior
    open_sink = bool((prior[..., sink] > -math.inf).all())
    require(open_sink, "sink_margin", "sink", "be admissible for every query", sink, "Choose another key")
    shape = problem.affinity.shape
    return (score / epsilon).expand(shape), prior.expand(shape)


def sink_margin(score: Tensor, log_prior: Tensor | None = None, *, epsilon: float = 1.0, sink: int = 0) -> SinkMargin:
    """Split the margin of a sink over its runner-up into a content part and a prior part.

    ``margin_i = min_{k != sink} (z_i,sink - z_ik)``, attained at the runner-up k, is ``(s_i,sink - s_ik) / epsilon +
    (K_i,sink - K_ik)``. Plain attention has no second part: it must build its sink from content.

    Args:
        score: Shape (..., n, m), cost units, m > 1.
        log_prior: Shape (..., n, m), nats.
        epsilon: Temperature, cost units.
        sink: Index of the key.

    Returns:
        The margin (left), the sum of its parts (right), shape (..., n), nats; positive where the key is a sink, +inf
        where every other key is inadmissible.

    Raises:
        ValueError: If there is no other key, or the sink is inadmissible for a query.

    Example:
        >>> sink_margin(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]])).left
        tensor([2.])

    Source: Litman and Guo 2026, arXiv 2601.15380, Definition 5.2.
    """
    content, prior = _parts(score, log_prior, epsilon, sink)
    others = content + prior
    others = torch.where(torch.arange(others.shape[-1], device=others.device) == sink, -math.inf, others)
    best, runner_up = others.max(-1)
    # Where no other key is admissible any of them is the runner-up, at an infinite distance.
    runner_up = torch.where(runner_up == sink, (sink + 1) % others.shape[-1], runner_up)
    at_sink = (content[..., sink], prior[..., sink])
    at_other = (part.gather(-1, runner_up[..., None]).squeeze(-1) for part in (content, prior))
    from_content, from_prior = (here - there for here, there in zip(at_sink, at_other, strict=True))
    return SinkMargin(
        statement="the margin is a content part plus a prior part",
        left=at_sink[0] + at_sink[1] - best,
        right=from_content + from_prior,
        relation="==",
        magnitude=logit_size(score, log_prior, epsilon).squeeze(-1),
        content=from_content,
        prior=from_prior,
        runner_up=runner_up,
    )


def context_sensitivity(
    score: Tensor, log_prior: Tensor | None = None, *, epsilon: float = 1.0, sink: int = 0
) -> Comparison:
    """Bound the mass off the sink by the margin.

    ``Psi_i = 1 - p_i,sink <= (L - 1) / (exp(margin_i) + L - 1)`` with L the number of admissible keys; equality where
    all other keys are equal. A margin that grows like ln L keeps Psi bounded.

    Arguments and errors are those of ``sink_margin``; returns Psi and its bound, shape (..., n).

    Example:
        >>> context_sensitivity(torch.zeros(1, 4)).left
        tensor([0.7500])

    Source: Litman and Guo 2026, arXiv 2601.15380, Definition 5.3 and Theorem 5.4.
    """
    margin = sink_margin(score, log_prior, epsilon=epsilon, sink=sink).left
    content, prior = _parts(score, log_prior, epsilon, sink)
    weights = (content + prior).softmax(-1)
    context = torch.arange(weights.shape[-1], device=weights.device) != sink
    others = ((prior > -math.inf) & context).sum(-1).to(weights.dtype)
    bound = torch.where(others > 0, others * (-margin).exp() / (1 + others * (-margin).exp()), 0.0)
    # A key far below its competitors has an exponential beyond the dtype; then nothing is left for the sink.
    bound = torch.where(bound.isnan(), 1.0, bound)
    statement = "1 - p_sink <= (L - 1) / (exp(margin) + L - 1)"
    magnitude = logit_size(score, log_prior, epsilon).squeeze(-1)
    return Comparison(statement, (weights * context).sum(-1), bound, "<=", magnitude=magnitude)


def value_perturbation(
    score: Tensor,
    value: Tensor,
    perturbation: Tensor,
    log_prior: Tensor | None = None,
    *,
    epsilon: float = 1.0,
    sink: int = 0,
) -> Comparison:
    """Compare how far the output moves with the sensitivity, when values of the context are perturbed.

    ``|o_i(value + perturbation) - o_i(value)| <= Psi_i max_j |perturbation_j|`` for perturbations off the sink.

    Args:
        score: Shape (..., n, m), cost units.
        value: Shape (..., m, v).
        perturbation: Shape (..., m, v), zero at the sink.
        log_prior: Shape (..., n, m), nats.
        epsilon: Temperature, cost units.
        sink: Index of the key.

    Returns:
        Both sides in the Euclidean norm, shape (..., n).

    Raises:
        ValueError: If the perturbation touches the sink, a shape or value is out of range, or as ``sink_margin``.

    Example:
        >>> shift = torch.tensor([[0.0], [2.0]])
        >>> value_perturbation(torch.zeros(1, 2), torch.zeros(2, 1), shift).left
        tensor([1.])

    Source: Litman and Guo 2026, arXiv 2601.15380, Definition 5.3.
    """
    owner, (content, prior) = "value_perturbation", _parts(score, log_prior, epsilon, sink)
    check_values(owner, "value", value, score)
    check_shape(owner, "perturbation", perturbation, value.shape, "Pass one change a value")
    check_no_nan(owner, "perturbation", perturbation)
    untouched = bool((perturbation[..., sink, :] == 0).all())
    rule = "be zero at the sink"
    require(untouched, owner, "perturbation", rule, perturbation, "Set that row to zero")
    weights = (content + prior).softmax(-1)
    # Outputs are linear in values; their difference would lose the digits of a small change to a large value.
    change = (value + perturbation) - value
    moved = (weights @ change).norm(dim=-1)
    sensitivity = context_sensitivity(score, log_prior, epsilon=epsilon, sink=sink).left
    largest = change.norm(dim=-1).amax(-1, keepdim=True)
    statement = "the output moves by at most Psi times the perturbation"
    magnitude = logit_size(score, log_prior, epsilon).squeeze(-1) * largest
    return Comparison(statement, moved, sensitivity * largest, "<=", magnitude=magnitude)
