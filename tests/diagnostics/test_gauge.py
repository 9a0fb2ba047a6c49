"""What softmax cannot see is taken off, and nothing else."""

import math

import pytest
import torch

from eotattn.diagnostics.gauge import centre_rows


def test_centred_rows_have_mean_zero_over_admissible_keys():
    log_prior = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_prior[torch.ones(5, 7, dtype=torch.bool).triu(3)] = -math.inf
    centred = centre_rows(log_prior)
    assert torch.equal(centred == -math.inf, log_prior == -math.inf)
    for row in centred:
        assert float(row[row > -math.inf].mean()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(centred.softmax(-1), log_prior.softmax(-1), rtol=0, atol=1e-14)
