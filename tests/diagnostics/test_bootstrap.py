"""Intervals over sequences equal those of numpy on resampled rows."""

import numpy as np
import torch

from eotattn.diagnostics.bootstrap import mean_interval, resamples


def test_intervals_are_quantiles_of_resampled_means():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    values[2, 1] = torch.nan
    drawn = resamples(7, 400, generator)
    assert drawn.shape == (400, 7)
    assert set(drawn.flatten().tolist()) == set(range(7))
    expected = np.nanquantile(np.nanmean(values.numpy()[drawn.numpy()], axis=1), [0.025, 0.975], axis=0)
    mean, low, high = mean_interval(values, drawn)
    np.testing.assert_allclose(mean, np.nanmean(values.numpy(), axis=0), rtol=1e-13)
    np.testing.assert_allclose([low, high], expected, rtol=1e-11, atol=1e-13)


def test_one_sequence_has_no_interval():
    mean, low, high = mean_interval(torch.tensor([[2.0, 3.0]]), resamples(1, 5, torch.Generator().manual_seed(0)))
    assert mean.tolist() == [2.0, 3.0]
    assert np.isnan([low, high]).all()
