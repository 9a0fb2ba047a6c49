"""What 16 bits do to attention with a prior: rows at a million tokens, outputs, and gradients of slopes.

Legend: H heads, R rows, K keys, P lanes.
"""

import math

import pytest
import torch
from tolerances import relative_error
from torch.nn.functional import scaled_dot_product_attention

from eotattn.attention import prior_attention
from eotattn.priors import RecencyPrior, alibi_slopes, goat_prior

LOW = [torch.bfloat16, torch.float16]


def causal_weights(scores, queries, keys):
    """Softmax in float64 over the keys at or before each query."""
    return scores.double().masked_fill(keys > queries[:, None], -math.inf).softmax(-1)


def total_variation(actual, expected):
    return float(0.5 * (actual - expected).abs().sum(-1).max())


# Rows of the recency prior ------------------------------------------------------------------------------------------

#: Products that a matrix unit sums before it rounds to float32.
TILE = 16


def in_float32(scores, query, key):
    """Scores plus <query, key>, the way a kernel sums: float32 after each tile of lanes. (H, R, K)."""
    total = scores.float().expand(query.shape[0], -1, -1)
    for first in range(0, query.shape[-1], TILE):
        tile = slice(first, first + TILE)
        total = (total.double() + query[..., tile].double() @ key[..., tile].double().mT).float()
    return total


def recency_of(slopes):
    """A recency prior of given slopes; the mean lag of the slope m is 1 / (e^m - 1)."""
    return RecencyPrior(len(slopes), mean_lags=[1 / math.expm1(slope) for slope in slopes])


@pytest.mark.parametrize(("length", "bound"), [(131_072, 1.5e-3), (1_048_576, 1.5e-2)])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("slopes", "reach", "num_rows"),
    [((0.5, 0.7), 256, 120), (tuple(alibi_slopes(8)), 8192, 16)],  # keys out of reach have weights below e^-32
    ids=["steep", "alibi"],
)
def test_recency_attention_survives_16_bits_at_any_length(slopes, reach, num_rows, dtype, length, bound):
    """Worst row and head, with content, at both ends and in the middle of the keys."""
    starts = (0, reach, (length - num_rows) // 2, length - num_rows)
    rows = [torch.arange(start, start + num_rows) for start in starts]
    seen = [torch.arange(max(0, start - reach), start + num_rows) for start in starts]
    lanes = recency_of(slopes).lanes(torch.cat(rows), torch.cat(seen), dtype=dtype)  # the middle is that of all keys
    queries = lanes.query.detach().split([len(row) for row in rows], dim=-2)
    keys = lanes.key.split([len(some) for some in seen], dim=-2)
    generator = torch.Generator().manual_seed(0)
    for row, some, query, key in zip(rows, seen, queries, keys, strict=True):
        one, other = (torch.randn(len(at), 64, generator=generator).to(dtype).double() for at in (row, some))
        content = one @ other.mT / 8
        lag = (row[:, None] - some).double()
        exact = causal_weights(content - torch.tensor(slopes, dtype=torch.float64)[:, None, None] * lag, row, some)
        actual = causal_weights(in_float32(content, query, key), row, some)
        assert total_variation(actual, exact) <= bound


def test_one_16_bit_lane_would_not_survive():
    """The control: what the test above would see of a plain slope * position lane, at 2048 tokens already."""
    slopes = torch.tensor(alibi_slopes(12), dtype=torch.float64)[:, None, None]
    queries, keys = torch.arange(2040, 2048), torch.arange(2048)
    exact = causal_weights(-slopes * (queries[:, None] - keys), queries, keys)
    one_lane = (slopes * keys).bfloat16().expand(-1, len(queries), -1)
    assert total_variation(causal_weights(one_lane, queries, keys), exact) > 0.3


# Outputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("form", "amplitude"), [("split", 0.3), ("split", 1.0), ("paper", 0.3), ("paper", 1.0)])
@pytest.mark.parametrize(("tolerance", "bound"), [(None, 1.4), (1e-4, 1.05)], ids=["default", "tight"])
def test_the_output_is_as_exact_as_that_of_plain_attention(tolerance, bound, form, amplitude, dtype):
    """Error of 128 rows over 2048 keys, against the formula in float64, over the same of attention without a prior."""
    heads, length, width, num_rows = 8, 2048, 64, 128
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, width, generator=generator).to(dtype) for n in (num_rows, length, length)
    )
    prior = goat_prior(heads, form=form, num_frequencies=4, length_scale=length)
    waves, _, sink = prior.parts
    with torch.no_grad():
        for parameter in waves.parameters():
            parameter.normal_(0, amplitude, generator=generator)
        for parameter in (sink.first_token, sink.growth):
            parameter.normal_(generator=generator)
    queries, keys = torch.arange(length - num_rows, length), torch.arange(length)
    is_seen = keys <= queries[:, None]
    at = {"query_positions": queries, "key_positions": keys, "is_causal": True}
    with torch.no_grad():
        outputs = {
            "plain": scaled_dot_product_attention(query, key, value, attn_mask=is_seen),
            "prior": prior_attention(query, key, value, prior=prior, tolerance=tolerance, backend="sdpa", **at),
        }
        log_priors = {"plain": 0, "prior": prior.dense(queries, keys, dtype=torch.float64)}
    errors = {}
    for name, output in outputs.items():
        scores = query.double() @ key.double().mT / math.sqrt(width) + log_priors[name]
        exact = causal_weights(scores, queries, keys) @ value.double()
        errors[name] = float((output.double() - exact).norm() / exact.norm())
    assert errors["prior"] <= bound * errors["plain"]


# Gradients of slopes ------------------------------------------------------------------------------------------------

MEAN_LAGS = (2.0, 3.0)


class WithoutRest(RecencyPrior):
    """The recency prior without slope * query position, which softmax does not see."""

    def entries(self):
        return ((0, 0, 1, 1.0),)


def slope_gradients(make_prior, content, first):
    """(H,) gradient of <weight, output> with respect to the strengths, through lanes."""
    query, key, value, weight = content
    prior, at = make_prior(len(MEAN_LAGS), mean_lags=MEAN_LAGS), range(first, first + query.shape[2])
    output = prior_attention(
        query, key, value, prior=prior, query_positions=at, key_positions=at, is_causal=True, backend="sdpa"
    )
    return torch.autograd.grad(output, [prior.strength], weight)[0].double()


def exact_slope_gradients(content, reach=400, block=256):
    """The same by the formula: the sum of -slope * lag * weights * (d - <weights, d>), d = <weight, value>, float64.

    Keys further away than ``reach`` tokens have weights below e^-90.
    """
    query, key, value, weight = (tensor[0].detach().double() for tensor in content)
    slopes = torch.tensor([math.log(1 + 1 / lag) for lag in MEAN_LAGS], dtype=torch.float64)
    total = torch.zeros_like(slopes)
    for first in range(0, query.shape[1], block):
        rows = torch.arange(first, min(first + block, query.shape[1]))
        keys = torch.arange(max(0, first - reach), int(rows[-1]) + 1)
        lag = (rows[:, None] - keys).double()
        scores = query[:, rows] @ key[:, keys].mT / math.sqrt(query.shape[-1]) - slopes[:, None, None] * lag
        weights = causal_weights(scores, rows, keys)
        of_weights = weight[:, rows] @ value[:, keys].mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        total -= slopes * (of_scores * lag).sum((-2, -1))
    return total


def gradient_errors(length, first, dtype, *priors):
    """Error over signal of the gradients through the lanes of each prior."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(MEAN_LAGS), length, 32)
    content = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(4)]
    exact = exact_slope_gradients(content)
    return [float((slope_gradients(prior, content, first) - exact).norm() / exact.norm()) for prior in priors]


@pytest.mark.parametrize(
    ("length", "first"),
    [(256, 0), (256, 16_384), (256, 131_072), (256, 1_000_000), (4096, 0), (8192, 0), (8192, 1_000_000)],
)
def test_slope_gradients_in_float32_are_no_noise(length, first):
    """What is left of a row's score gradients, times a position, would be a tenth of the signal at 8192 tokens."""
    (error,) = gradient_errors(length, first, torch.float32, RecencyPrior)
    assert error <= 1e-3


def test_without_the_rest_of_rows_slope_gradients_are_noise():
    """The control: the same log-prior up to a constant of each row."""
    error, plain = gradient_errors(4096, 0, torch.float32, RecencyPrior, WithoutRest)
    assert plain > 20 * error
    error, plain = gradient_errors(1024, 0, torch.bfloat16, RecencyPrior, WithoutRest)
    assert plain > 10 * error


@pytest.mark.parametrize(("length", "first"), [(256, 0), (256, 30_000), (1024, 0), (1024, 1_000_000)])
@pytest.mark.parametrize("dtype", LOW)
def test_slope_gradients_in_16_bits_are_no_noise(length, first, dtype):
    (error,) = gradient_errors(length, first, dtype, RecencyPrior)
    assert error <= 0.1


def test_the_gradient_formula_is_that_of_autograd():
    generator = torch.Generator().manual_seed(1)
    content = [torch.randn(1, len(MEAN_LAGS), 40, 8, dtype=torch.float64, generator=generator) for _ in range(4)]
    at = torch.arange(40)
    slopes = torch.tensor([math.log(1 + 1 / lag) for lag in MEAN_LAGS], dtype=torch.float64)
    strength = torch.ones(len(MEAN_LAGS), dtype=torch.float64, requires_grad=True)
    scores = content[0] @ content[1].mT / math.sqrt(8) - (strength * slopes)[:, None, None] * (at[:, None] - at)
    output = causal_weights(scores, at, at) @ content[2]
    (expected,) = torch.autograd.grad((content[3] * output).sum(), strength)
    assert relative_error(exact_slope_gradients(content, block=7), expected) <= 1e-12
