"""From learned numbers to matrices and back: one product each way, against sums written out term by term."""

import pytest
import torch
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn.priors import goat_prior
from eotattn.priors.lane_plan import LaneRequest, plan_lanes
from eotattn.priors.weight_map import _matrices, _Product

HEADS = 6
PRIORS = {
    "split": lambda: goat_prior(HEADS, num_frequencies=3),
    "paper": lambda: goat_prior(HEADS, num_frequencies=2, form="paper"),
    "scaled": lambda: 0.5 * (goat_prior(HEADS, num_frequencies=2) * (1.0, -1.0, 2.0, 0.0, 3.0, 1.0)),
    "some heads": lambda: goat_prior(4, num_frequencies=2, form="paper").heads([3, 0, 0, 1, 2, 3]),
}


def written_out(plan, terms, group):
    """What both matrices are, and a tensor of the same gradient that keeps constants of each row."""
    coefficients = torch.cat([term.coefficients.double() for term in terms], dim=1).squeeze(-1)
    values, learned = [], []
    for side, rows in ((plan.query, coefficients), (plan.key, coefficients.view(HEADS // group, -1))):
        start = side.fixed
        if side.selection is None:
            values.append(start)
            continue
        whole = sum(rows[:, n, None] * side.selection[n] for n in range(rows.shape[1])).view(-1, *start.shape[1:])
        hidden = torch.zeros_like(side.selection) if side.constant is None else side.constant
        lost = sum(rows[:, n, None] * hidden[n] for n in range(rows.shape[1])).view(-1, *start.shape[1:])
        values.append((start + whole - lost).detach())
        learned.append(whole)
    return values, learned


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS)
def test_matrices_and_gradients(make, kv_heads, in_graph):
    prior = off_neutral(make())
    terms = [term for term in prior.terms() if hasattr(term, "numbers")]
    plan = plan_lanes(tuple(terms), LaneRequest(HEADS, kv_heads, torch.bfloat16, query_scale=5.0))
    held = plan._held([(term.widths, term.units) for term in terms], torch.device("cpu"), torch.float64, in_graph)
    shapes = tuple(side.fixed.shape for side in (plan.query, plan.key) if side.selection is not None)
    values, learned = written_out(plan, terms, HEADS // kv_heads)
    numbers = [one for term in terms for one in term.numbers]
    parameters = list(prior.parameters())
    weights = [torch.randn(one.shape, dtype=torch.float64) for one in learned]
    expected = torch.autograd.grad(
        sum((w * one).sum() for w, one in zip(weights, learned, strict=True)), parameters, retain_graph=True
    )
    ways = [_Product.apply(held, shapes, torch.float64, *numbers)]
    if not in_graph:
        ways.append(_matrices(held, shapes, torch.float64, numbers, differentiably=True))
    for made in ways:
        of_sides = [
            value for value, side in zip(values, (plan.query, plan.key), strict=True) if side.selection is not None
        ]
        for found, value in zip(made, of_sides, strict=True):
            assert_close(found, value)
        total = sum((w * one).sum() for w, one in zip(weights, made, strict=True))
        for found, right in zip(torch.autograd.grad(total, parameters, retain_graph=True), expected, strict=True):
            assert_close(found, right)


def test_a_gradient_of_a_gradient():
    prior = off_neutral(goat_prior(HEADS, num_frequencies=2))
    terms = prior.terms()
    plan = plan_lanes(terms, LaneRequest(HEADS, HEADS, torch.float32))
    held = plan._held([(term.widths, term.units) for term in terms], torch.device("cpu"), torch.float64, False)
    shapes = (plan.query.fixed.shape, plan.key.fixed.shape)

    def penalty(make):
        numbers = [one for term in prior.terms() for one in term.numbers]
        total = sum((made**3).sum() for made in make(numbers))
        first = torch.autograd.grad(total, list(prior.parameters()), create_graph=True)
        return torch.autograd.grad(sum((one**2).sum() for one in first), list(prior.parameters()))

    one_way = penalty(lambda numbers: _Product.apply(held, shapes, torch.float64, *numbers))
    other = penalty(lambda numbers: _matrices(held, shapes, torch.float64, numbers, differentiably=True))
    for found, right in zip(one_way, other, strict=True):
        assert_close(found, right)
