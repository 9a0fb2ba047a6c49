"""The certificate of rows is a divergence, and refuses what does not fit."""

import math

import pytest
import torch
from tolerances import assert_close

from eotattn.integrations.certificates import row_certificate


def test_certificate_is_the_divergence_to_the_truth():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    logits[2, 3] = -math.inf
    truth = torch.softmax(logits, -1)
    assert row_certificate(truth, logits).abs().max() < 1e-14
    wrong = torch.softmax(torch.where(logits.isinf(), logits, 1.1 * logits), -1)
    ratio = torch.where(truth > 0, wrong / truth, 1.0)
    divergence = torch.special.xlogy(wrong, ratio).sum(-1)
    assert_close(row_certificate(wrong, logits), divergence)
    variation = (wrong - truth).abs().sum(-1) / 2
    assert (variation <= (row_certificate(wrong, logits) / 2).sqrt()).all()
    assert row_certificate(torch.full((6, 7), 1 / 7).double(), logits)[2] == math.inf
    with pytest.raises(ValueError, match=r"row_certificate: logits must have the shape"):
        row_certificate(truth, logits[0])
