"""The table of equivalences holds, and it can fail."""

import math

import pytest
import torch

from eotattn.diagnostics.equivalence import Equivalence, EquivalenceReport, measure_equivalences
from eotattn.priors import SinkPrior
from eotattn.transport import TransportSolution


@pytest.fixture(scope="module")
def report():
    return measure_equivalences(seed=3)


def test_every_equivalence_holds(report):
    broken = [row for row in report.rows if not row.holds]
    assert not broken


def test_every_kind_of_statement_is_there(report):
    statements = " ".join(row.statement for row in report.rows)
    transport = ("POT", "closed form", "two-sided", "unbalanced", "certified gap", "sparsemax", "entmax 1.5")
    for kind in (*transport, "lanes = dense", "gradient = advantage", "sdpa", "dummy key"):
        assert kind in statements


def test_a_wrong_lane_is_noticed(monkeypatch):
    honest = SinkPrior.terms

    def wrong_by_a_thousandth(self):
        return tuple(term.weighted(lambda coefficients: 1.001 * coefficients) for term in honest(self))

    monkeypatch.setattr(SinkPrior, "terms", wrong_by_a_thousandth)
    wrong = {row.statement for row in measure_equivalences().rows if not row.holds}
    assert any("SinkPrior" in statement for statement in wrong)
    assert any("sdpa" in statement for statement in wrong)
    assert "certified gap of attention = 0: sdpa, float64" in wrong


@pytest.mark.parametrize(("error", "holds"), [(1e-13, True), (1e-11, False), (float("nan"), False)])
def test_an_error_must_be_a_number_within_the_bound(error, holds):
    report = EquivalenceReport((Equivalence("left = right", error, 1e-12),), "cpu")
    assert report.holds is holds
    assert ("NO" not in str(report)) is holds
    assert report.to_dict()["holds"] == [holds]


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match="device must be a device of this machine"):
        measure_equivalences(device=device)


def test_a_solver_that_returns_nan_is_noticed_and_another_seed_gives_other_errors(monkeypatch, report):
    honest = TransportSolution.coupling.fget

    def poisoned(self):
        return honest(self) * (1.0 if self.problem.key_marginal is None else math.nan)

    monkeypatch.setattr(TransportSolution, "coupling", property(poisoned))
    rows = measure_equivalences(seed=4).rows
    assert {"two-sided: Newton = POT", "two-sided: Sinkhorn = POT"} <= {row.statement for row in rows if not row.holds}
    pairs = [(row.error, other.error) for row, other in zip(rows, report.rows, strict=True) if row.holds]
    assert any(error != other for error, other in pairs)
    assert torch.get_default_dtype() == torch.float32
