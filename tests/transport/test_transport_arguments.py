"""Every way to state a problem wrongly, and the words in which it is refused."""

import math
import re

import pytest
import torch

from eotattn.transport import TransportProblem, solve

SCORE = torch.zeros(2, 3)
NAN, INF = math.nan, math.inf
KEYS = torch.full((3,), 1 / 3)
MASKED_ROW = torch.tensor([[0.0, 0.0, 0.0], [-INF, -INF, -INF]])
MASKED_COLUMN = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, -INF]])
ONE_KEY_EACH = torch.tensor([[0.0, -INF, -INF], [0.0, 0.0, 0.0]])

BAD_PROBLEMS = [
    ([[0.0]], {}, TypeError, "score must be a tensor"),
    (torch.zeros(2, 3, dtype=torch.int64), {}, TypeError, "score must have a floating dtype"),
    (SCORE.half(), {}, TypeError, "score must have dtype float32 or float64"),
    (torch.zeros(3), {}, ValueError, "score must have shape (..., queries, keys)"),
    (torch.zeros(0, 3), {}, ValueError, "score must hold at least one query and one key"),
    (torch.zeros(2, 0), {}, ValueError, "score must hold at least one query and one key"),
    (SCORE + NAN, {}, ValueError, "score must be finite"),
    (SCORE - INF, {}, ValueError, "score must be finite"),
    (SCORE, {"epsilon": 0.0}, ValueError, "epsilon must be positive and finite"),
    (SCORE, {"epsilon": -1.0}, ValueError, "epsilon must be positive and finite"),
    (SCORE, {"epsilon": NAN}, ValueError, "epsilon must be positive and finite"),
    (SCORE, {"epsilon": INF}, ValueError, "epsilon must be positive and finite"),
    (SCORE, {"epsilon": "small"}, TypeError, "epsilon must be a number"),
    (SCORE, {"log_prior": torch.zeros(3, 2)}, ValueError, "log_prior must have shape (..., 2, 3)"),
    (SCORE, {"log_prior": torch.zeros(3)}, ValueError, "log_prior must have shape (..., 2, 3)"),
    (SCORE, {"log_prior": SCORE.double()}, TypeError, "log_prior must have the dtype of score"),
    (SCORE, {"log_prior": SCORE.to("meta")}, ValueError, "log_prior must be on the device of score"),
    (SCORE, {"log_prior": SCORE + NAN}, ValueError, "log_prior must hold no NaN and no +inf"),
    (SCORE, {"log_prior": SCORE + INF}, ValueError, "log_prior must hold no NaN and no +inf"),
    (SCORE, {"log_prior": MASKED_ROW}, ValueError, "log_prior must leave every query at least one admissible key"),
    (torch.zeros(2, 2, 3), {"log_prior": torch.zeros(5, 2, 3)}, ValueError, "log_prior must have leading dimensions"),
    (SCORE, {"query_marginal": torch.ones(3) / 3}, ValueError, "query_marginal must have shape (..., 2)"),
    (SCORE, {"query_marginal": torch.ones(2)}, ValueError, "query_marginal must sum to one under an infinite penalty"),
    (SCORE, {"query_marginal": torch.tensor([1.5, -0.5])}, ValueError, "query_marginal must be non-negative"),
    (SCORE, {"query_marginal": torch.tensor([NAN, 1.0])}, ValueError, "query_marginal must be finite"),
    (SCORE, {"query_marginal": torch.ones(2).double() / 2}, TypeError, "query_marginal must have the dtype of score"),
    (SCORE, {"query_marginal": torch.zeros(2), "query_penalty": 1.0}, ValueError, "query_marginal must have positive"),
    (SCORE, {"key_marginal": torch.ones(2) / 2}, ValueError, "key_marginal must have shape (..., 3)"),
    (SCORE, {"key_marginal": torch.ones(3)}, ValueError, "key_marginal must sum to one under an infinite penalty"),
    (SCORE, {"key_marginal": -KEYS}, ValueError, "key_marginal must be non-negative"),
    (SCORE, {"key_marginal": KEYS * NAN}, ValueError, "key_marginal must be finite"),
    (SCORE, {"query_penalty": -1.0}, ValueError, "query_penalty must be non-negative"),
    (SCORE, {"query_penalty": NAN}, ValueError, "query_penalty must be non-negative"),
    (SCORE, {"key_marginal": KEYS, "key_penalty": -1.0}, ValueError, "key_penalty must be non-negative"),
    (SCORE, {"key_marginal": KEYS, "key_penalty": 0.0}, ValueError, "key_penalty must be positive where there is"),
    (SCORE, {"key_penalty": 1.0}, ValueError, "key_penalty must be left out where there is no key_marginal"),
    (
        SCORE,
        {"log_prior": MASKED_COLUMN, "key_marginal": KEYS},
        ValueError,
        "key_marginal must be zero on keys that no query with mass may use",
    ),
    (
        SCORE,
        {"log_prior": ONE_KEY_EACH, "key_marginal": KEYS, "query_marginal": torch.tensor([1.0, 0.0])},
        ValueError,
        "key_marginal must be zero on keys that no query with mass may use",
    ),
    (
        SCORE,
        {"log_prior": ONE_KEY_EACH, "key_marginal": torch.tensor([0.0, 0.5, 0.5])},
        ValueError,
        "key_marginal must give mass to an admissible key of every query",
    ),
]

FREE = TransportProblem(SCORE)
BOUND = TransportProblem(SCORE, key_marginal=KEYS)
BAD_CALLS = [
    (SCORE, {}, TypeError, "problem must be a TransportProblem"),
    (FREE, {"method": "simplex"}, ValueError, "method must be one of 'auto', 'closed_form', 'newton', 'sinkhorn'"),
    (FREE, {"method": "sinkhorn"}, NotImplementedError, "method 'sinkhorn' iterates on a key_marginal"),
    (FREE, {"method": "newton"}, NotImplementedError, "method 'newton' iterates on a key_marginal"),
    (BOUND, {"method": "closed_form"}, NotImplementedError, "method 'closed_form' has no solution for a problem"),
    (FREE, {"tolerance": 1e-3}, ValueError, "tolerance must be left out where the closed form applies"),
    (FREE, {"max_iterations": 3}, ValueError, "max_iterations must be left out where the closed form applies"),
    (BOUND, {"tolerance": 0.0}, ValueError, "tolerance must be positive and finite"),
    (BOUND, {"max_iterations": 0}, ValueError, "max_iterations must be at least 1"),
    (BOUND, {"max_iterations": 1.5}, TypeError, "max_iterations must be an integer"),
]


@pytest.mark.parametrize(("score", "options", "error", "message"), BAD_PROBLEMS)
def test_bad_problems_are_refused(score, options, error, message):
    with pytest.raises(error, match=re.escape(f"TransportProblem: {message}")):
        TransportProblem(score, **options)


@pytest.mark.parametrize(("problem", "options", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused(problem, options, error, message):
    with pytest.raises(error, match=re.escape(f"solve: {message}")):
        solve(problem, **options)


def test_defaults():
    assert torch.equal(FREE.query_marginal, torch.tensor([0.5, 0.5]))
    assert (FREE.query_penalty, FREE.key_penalty, BOUND.key_penalty) == (INF, 0.0, INF)
    assert TransportProblem(SCORE, key_penalty=0.0).key_penalty == 0.0
    assert solve(FREE).method == "closed_form"
    assert solve(BOUND).method == "newton"


def test_a_problem_is_frozen():
    with pytest.raises(AttributeError):
        FREE.epsilon = 2.0


def test_soft_marginals_may_carry_any_mass():
    soft = {"query_marginal": torch.ones(2), "query_penalty": 1.0, "key_marginal": torch.ones(3), "key_penalty": 2.0}
    assert 0 < float(solve(TransportProblem(SCORE, **soft)).coupling.sum()) < INF
