"""The one table of tolerances, by dtype, and the one comparison that uses it."""

import torch

#: Largest admissible |a - b| / max(1, |b|max) of two computations that are equal in exact arithmetic.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(actual, expected):
    """Largest absolute difference, relative to the largest entry of ``expected`` where that exceeds one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.isfinite().all(), "actual is not finite"
    assert expected.isfinite().all(), "expected is not finite"
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / max(1.0, float(expected.abs().max())))


def assert_close(actual, expected, *, tolerance=None):
    """Fail unless ``actual`` equals ``expected`` within the table's tolerance for the dtype of ``actual``."""
    bound = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.1e}"


def centre_rows(log_prior):
    """Remove what softmax cannot see: the mean of every row."""
    return log_prior - log_prior.mean(dim=-1, keepdim=True)
