"""Every way to state a problem wrongly, and the words in which it is refused."""

import math
import re

import pytest
import torch

from eotattn.priors import LogPrior, RecencyPrior
from eotattn.transport import Anderson, Auto, Newton, Sinkhorn, TransportProblem, solve

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
    (SCORE, "auto", TypeError, "solve: problem must be a TransportProblem"),
    (
        FREE,
        "simplex",
        ValueError,
        "solve: solver must be one of 'auto', 'anderson', 'closed_form', 'newton', 'sinkhorn'",
    ),
    (FREE, Sinkhorn, TypeError, "solve: solver must be a Solver"),
    (FREE, "sinkhorn", NotImplementedError, "Sinkhorn: problem must have a key_marginal to iterate on"),
    (FREE, Newton(), NotImplementedError, "Newton: problem must have a key_marginal to iterate on"),
    (BOUND, "closed_form", NotImplementedError, "ClosedForm: problem must have no key_marginal"),
    (FREE, Auto(tolerance=1e-3), ValueError, "Auto: tolerance must be left out where the closed form applies"),
    (FREE, Auto(max_iterations=3), ValueError, "Auto: max_iterations must be left out where the closed form applies"),
]
BAD_OPTIONS = [
    (lambda: Sinkhorn(tolerance=0.0), ValueError, "Sinkhorn: tolerance must be positive and finite"),
    (lambda: Auto(tolerance=0.0), ValueError, "Auto: tolerance must be positive and finite"),
    (lambda: Newton(max_iterations=0), ValueError, "Newton: max_iterations must be at least 1"),
    (lambda: Anderson(max_iterations=1.5), TypeError, "Anderson: max_iterations must be an integer"),
    (lambda: Anderson(memory=0), ValueError, "Anderson: memory must be at least 1"),
]
HEADS = torch.ones(2, 1)
BAD_NUMBERS = [
    ({"epsilon": 0 * HEADS}, ValueError, "epsilon must be positive and finite in every entry"),
    ({"epsilon": HEADS[:, 0]}, ValueError, "epsilon must have shape (..., 1)"),
    ({"epsilon": HEADS.double()}, TypeError, "epsilon must have the dtype of score"),
    ({"query_penalty": INF * HEADS}, ValueError, "query_penalty must be positive and finite in every entry"),
    ({"key_penalty": HEADS}, ValueError, "key_penalty must be left out where there is no key_marginal"),
]


@pytest.mark.parametrize(("score", "options", "error", "message"), BAD_PROBLEMS)
def test_bad_problems_are_refused(score, options, error, message):
    with pytest.raises(error, match=re.escape(f"TransportProblem: {message}")):
        TransportProblem(score, **options)


@pytest.mark.parametrize(("problem", "solver", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused(problem, solver, error, message):
    with pytest.raises(error, match=re.escape(message)):
        solve(problem, solver)


@pytest.mark.parametrize(("make", "error", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(("options", "error", "message"), BAD_NUMBERS)
def test_bad_numbers_a_problem_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(f"TransportProblem: {message}")):
        TransportProblem(SCORE, **options)


def test_defaults():
    assert torch.equal(FREE.query_marginal, torch.tensor([0.5, 0.5]))
    assert (FREE.query_penalty, FREE.key_penalty, BOUND.key_penalty) == (INF, 0.0, INF)
    assert TransportProblem(SCORE, key_penalty=0.0).key_penalty == 0.0
    assert solve(FREE).solver == "ClosedForm"
    assert solve(BOUND).solver == "Sinkhorn"


def test_a_problem_is_frozen():
    with pytest.raises(AttributeError):
        FREE.epsilon = 2.0


def test_soft_marginals_may_carry_any_mass():
    soft = {"query_marginal": torch.ones(2), "query_penalty": 1.0, "key_marginal": torch.ones(3), "key_penalty": 2.0}
    assert 0 < float(solve(TransportProblem(SCORE, **soft)).coupling.sum()) < INF


# Factored problems --------------------------------------------------------------------------------------------------

QUERY, KEY = torch.zeros(2, 4), torch.zeros(3, 4)
ALL_PADDING = torch.ones(3, dtype=torch.bool)

BAD_FACTORS = [
    ([[0.0]], KEY, {}, TypeError, "query must be a tensor"),
    (QUERY.long(), KEY.long(), {}, TypeError, "query must have a floating dtype"),
    (QUERY, KEY.double(), {}, TypeError, "key must have the dtype of query"),
    (QUERY, KEY.to("meta"), {}, ValueError, "key must be on the device of query"),
    (torch.zeros(4), KEY, {}, ValueError, "query must have shape (..., length, width)"),
    (QUERY, torch.zeros(0, 4), {}, ValueError, "key must hold at least one row"),
    (QUERY, torch.zeros(3, 5), {}, ValueError, "key must have the width of query (4)"),
    (QUERY * NAN, KEY, {}, ValueError, "query must be finite"),
    (torch.zeros(2, 2, 4), torch.zeros(3, 3, 4), {}, ValueError, "key must have leading dimensions that broadcast"),
    (QUERY, KEY, {"epsilon": 0.0}, ValueError, "epsilon must be positive and finite"),
    (QUERY, KEY, {"is_causal": True}, ValueError, "query must have as many queries as keys under is_causal"),
    (QUERY, KEY, {"key_padding": torch.zeros(3)}, TypeError, "key_padding must be a boolean tensor"),
    (QUERY, KEY, {"key_padding": ALL_PADDING[:2]}, ValueError, "key_padding must have shape (..., 3)"),
    (QUERY, KEY, {"key_padding": ALL_PADDING}, ValueError, "key_padding must leave every query at least one"),
    (QUERY, KEY, {"prior": 3}, TypeError, "prior must be a LogPrior"),
    (QUERY, KEY, {"query_positions": torch.arange(2)}, ValueError, "query_positions must be left out without a prior"),
    (torch.zeros(3, 2, 4), KEY, {"prior": RecencyPrior(2)}, ValueError, "prior must fit query and key in heads"),
    (QUERY, KEY, {"prior": RecencyPrior(2), "key_positions": torch.arange(5)}, ValueError, "prior must fit query and"),
    (QUERY, KEY, {"key_marginal": torch.ones(3)}, ValueError, "key_marginal must sum to one under an infinite"),
    (QUERY, KEY, {"key_marginal": KEYS, "key_padding": ALL_PADDING}, ValueError, "key_marginal must give mass to"),
    (QUERY, KEY, {"key_marginal": KEYS * NAN}, ValueError, "key_marginal must be finite"),
]


@pytest.mark.parametrize(("query", "key", "options", "error", "message"), BAD_FACTORS)
def test_bad_factors_are_refused(query, key, options, error, message):
    with pytest.raises(error, match=re.escape(f"TransportProblem: {message}")):
        TransportProblem.from_factors(query, key, **{"epsilon": 1.0, **options})


def test_mass_that_no_query_may_use_is_refused():
    padding = torch.tensor([False, False, True])
    with pytest.raises(ValueError, match="key_marginal must be zero on keys that no query with mass may use"):
        TransportProblem.from_factors(QUERY, KEY, epsilon=1.0, key_marginal=KEYS, key_padding=padding)


def test_a_prior_without_lanes_is_refused_by_name():
    class Bend(LogPrior):
        def log_prior(self, head, query_position, key_position):
            return -(query_position - key_position).abs().sqrt()

    with pytest.raises(NotImplementedError, match=r"Bend.lanes: this prior is not a finite inner product"):
        TransportProblem.from_factors(QUERY, KEY, epsilon=1.0, prior=Bend(1))


BAD_STARTS = [
    (torch.zeros(2), ValueError, "start must have shape (3,)"),
    (torch.zeros(3).double(), TypeError, "start must be torch.float32"),
    (torch.full((3,), NAN), ValueError, "start must be finite on keys that carry mass"),
]


@pytest.mark.parametrize(("start", "error", "message"), BAD_STARTS)
def test_bad_starts_are_refused(start, error, message):
    with pytest.raises(error, match=re.escape(f"solve: {message}")):
        solve(BOUND, start=start)


BAD_OUTPUTS = [
    (lambda s: s.apply(torch.zeros(2, 1)), ValueError, r"apply: value must have shape \(..., 3, width\)"),
    (lambda s: s.apply(torch.zeros(3, 1).double()), TypeError, "apply: value must have dtype"),
    (lambda s: s.apply_transpose(torch.zeros(3, 1)), ValueError, "apply_transpose: value must have shape"),
    (lambda s: s.top_keys(torch.tensor([0.0]), 1), TypeError, "top_keys: queries must be an int64 vector"),
    (lambda s: s.top_keys(torch.tensor([2]), 1), ValueError, "top_keys: queries must lie in 0 to 1"),
    (lambda s: s.top_keys(torch.tensor([0]), 4), ValueError, "top_keys: k must be at most 3"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_OUTPUTS)
def test_bad_questions_are_refused(call, error, message):
    with pytest.raises(error, match=f"TransportSolution.{message}"):
        call(solve(FREE))
