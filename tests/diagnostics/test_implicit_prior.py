"""The two-part prior against a convex solver, planted priors, and its own promises."""

import math
import time

import numpy as np
import pytest
import torch
from tolerances import assert_close

from eotattn import prior_attention
from eotattn.attention.statistics import row_statistics, weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.diagnostics.implicit_prior import fit_prior
from eotattn.diagnostics.lag_key_model import LagKeyModel, RowGroup


def planted(length, sequences, *, is_causal, noise=1.0, heads=2, seed=0):
    """Weights whose logits are a lag part, a key part and content noise; returns (weights, lag, key)."""
    generator = torch.Generator().manual_seed(seed)
    lags = torch.arange(1 - length, length, dtype=torch.float64)
    rates = torch.tensor([0.05, 0.2], dtype=torch.float64)[:heads, None]
    lag = -rates * lags.abs() + torch.cos(lags / 5) + 0.3 * torch.sin(lags / 2)
    key = 0.5 * torch.randn(heads, length, generator=generator, dtype=torch.float64)
    key[:, 0] += 3
    position = torch.arange(length)
    table = lag[:, position[:, None] - position + length - 1] + key[:, None]
    content = noise * torch.randn(sequences, heads, length, length, generator=generator, dtype=torch.float64)
    logits = table + content
    if is_causal:
        logits = logits.masked_fill(position[:, None] < position, -math.inf)
    return torch.softmax(logits, -1), lag, key


def gauged(lag, key):
    """The same pair with sum_j j v_j = 0 after centring, by a straight line fit."""
    position = np.arange(key.shape[-1])
    slope = np.polyfit(position, key.T, 1)[0][:, None]
    centred = key - key.mean(-1, keepdims=True)
    return lag - slope * np.arange(1 - len(position), len(position)), centred - slope * (position - position.mean())


def convex_solution(weights, *, is_causal):
    """The same objective with dense tables and L-BFGS: a (H, 2 L - 1), v (H, L)."""
    length, heads = weights.shape[-1], weights.shape[1]
    position = torch.arange(length)
    index = position[:, None] - position + length - 1
    seen = position[:, None] >= position if is_causal else torch.ones(length, length, dtype=torch.bool)
    mean = weights.mean(0)
    lag = torch.zeros(heads, 2 * length - 1, dtype=torch.float64, requires_grad=True)
    key = torch.zeros(heads, length, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([lag, key], max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        logits = lag[:, index] + key[:, None]
        normaliser = torch.logsumexp(logits.masked_fill(~seen, -math.inf), -1)
        loss = (normaliser - (mean * logits).sum(-1)).sum(-1).mean()
        loss.backward()
        return loss

    solver.step(objective)
    return lag.detach(), key.detach()


def explained(weights, lag, key, *, is_causal):
    """Dense 1 - E KL(p || prior) / E KL(p || uniform)."""
    length = weights.shape[-1]
    position = torch.arange(length)
    seen = position[:, None] >= position if is_causal else torch.ones(length, length, dtype=torch.bool)
    logits = (lag[:, position[:, None] - position + length - 1] + key[:, None]).masked_fill(~seen, -math.inf)
    log_prior = torch.where(seen, torch.log_softmax(logits, -1), 0.0)
    negative_entropy = torch.special.xlogy(weights, weights).sum(-1)
    to_prior = (negative_entropy - (weights * log_prior).sum(-1)).sum((0, 2))
    to_uniform = (negative_entropy + seen.sum(-1).double().log()).sum((0, 2))
    return 1 - to_prior / to_uniform


def statistics(weights, **options):
    return SequenceStatistics.of(weight_statistics(weights, **options))


@pytest.mark.parametrize("is_causal", [True, False])
def test_held_out_explained_divergence_agrees_with_a_convex_solver(is_causal):
    weights, _, _ = planted(48, 24, is_causal=is_causal)
    report = fit_prior(statistics(weights[:16]))
    assert report.is_causal is is_causal
    solution = convex_solution(weights[:16], is_causal=is_causal)
    lag, key = (torch.from_numpy(np.nan_to_num(x)) for x in (report.lag, report.key))
    ours = explained(weights[16:], lag, key, is_causal=is_causal)
    theirs = explained(weights[16:], *solution, is_causal=is_causal)
    assert_close(ours, theirs, tolerance=2e-3)
    assert ours.min() > 0.3
    in_sample = explained(weights[:16], *solution, is_causal=is_causal)
    assert_close(torch.from_numpy(report.explained_in_sample), in_sample, tolerance=1e-4)
    assert (report.explained <= report.explained_in_sample).all()
    assert (report.explained > report.explained_in_sample - 0.1).all()
    assert (report.interval[:, 0] < report.explained).all()
    assert (report.explained < report.interval[:, 1]).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_planted_priors_are_recovered(is_causal):
    length = 64
    weights, lag, key = planted(length, 48, is_causal=is_causal)
    report = fit_prior(statistics(weights))
    wanted_lag, wanted_key = gauged(lag.numpy(), key.numpy())
    for h in range(2):
        assert np.corrcoef(report.key[h], wanted_key[h])[0, 1] > 0.99
        often = (report.lags >= 0) & (report.lags < length // 2) if is_causal else abs(report.lags) < length // 2
        assert np.corrcoef(report.lag[h, often], wanted_lag[h, often])[0, 1] > 0.99
    position = np.arange(length)
    assert abs(report.key.sum(-1)).max() < 1e-9
    assert abs((report.key * position).sum(-1)).max() < 1e-6


def test_without_noise_everything_is_explained():
    weights, _, _ = planted(32, 4, is_causal=True, noise=0.0)
    report = fit_prior(statistics(weights), tolerance=1e-8)
    assert report.explained.min() > 1 - 1e-4
    dense = report.prior().dense(torch.arange(32), torch.arange(32), dtype=torch.float64)
    future = torch.ones(32, 32, dtype=torch.bool).triu(1)
    rebuilt = torch.softmax(dense.masked_fill(future, -math.inf), -1)
    assert_close(rebuilt.detach(), weights[0], tolerance=1e-4)


def test_pure_content_is_not_explained():
    weights, _, _ = planted(32, 16, is_causal=False, noise=2.0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.softmax(2 * torch.randn(weights.shape, generator=generator, dtype=torch.float64), -1)
    report = fit_prior(statistics(noise))
    assert abs(report.explained).max() < 0.05
    assert (report.interval[:, 0] < 0.02).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_sequences_of_different_lengths(is_causal):
    """Short sequences are the first rows of long ones when causal, rows of their own otherwise."""
    parts, divergence = [], 0.0
    for length, count in ((20, 6), (13, 5)):
        weights, _, _ = planted(20, count, is_causal=is_causal, seed=count)
        logits = weights[:, :, :length, :length].log()
        weights = torch.softmax(logits, -1)
        parts.append((weights, statistics(weights)))
        position = torch.arange(length)
        seen = position[:, None] >= position if is_causal else torch.ones(length, length, dtype=torch.bool)
        divergence += (torch.special.xlogy(weights, weights).sum(-1) + seen.sum(-1).log()).sum((0, 2))
    report = fit_prior(parts[0][1] + parts[1][1], num_folds=11)
    assert_close(torch.from_numpy(report.divergence_to_uniform), divergence / (20 * 6 + 13 * 5), tolerance=1e-6)
    assert report.explained.min() > 0.3


def test_a_window_is_respected():
    weights, _, _ = planted(24, 8, is_causal=True, noise=0.0)
    position = torch.arange(24)
    far = position[:, None] - position >= 6
    weights = torch.softmax(weights.log().masked_fill(far, -math.inf), -1)
    report = fit_prior(statistics(weights), window=6)
    assert np.isfinite(report.lag[:, report.lags == 5]).all()
    assert np.isnan(report.lag[:, report.lags == 6]).all()
    assert report.explained.min() > 1 - 1e-3


@pytest.mark.parametrize(("back", "ahead"), [(6, 0), (3, 3), (2, 4)])
def test_windows_are_read_off_and_explain_nothing(back, ahead):
    """Content alone within a window: the mask is not a prior, whoever is told of it."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, 3, 40, 8, generator=generator, dtype=torch.float64)
    lag = torch.arange(40)[:, None] - torch.arange(40)
    seen = (lag <= back) & (lag >= -ahead)
    report = fit_prior(SequenceStatistics.of(row_statistics(2 * query, key, mask=seen)))
    assert report.is_causal == (ahead == 0)
    assert report.lags[np.isfinite(report.lag[0])].tolist() == list(range(-ahead, back + 1))
    assert (report.explained < 0.02).all()
    told = fit_prior(SequenceStatistics.of(row_statistics(2 * query, key, mask=seen)), window=back + 1)
    np.testing.assert_array_equal(report.explained, told.explained)


def test_stored_zeros_are_no_window():
    """The first key of this map is hidden from all queries but one, which look far back all the same."""
    weights = torch.full((1, 1, 8, 8), 1.0, dtype=torch.float64).tril()
    weights[..., 1:, 0] = 0.0
    report = fit_prior(statistics(weights / weights.sum(-1, keepdim=True)))
    assert report.lags[np.isfinite(report.lag[0])].tolist() == list(range(7))


def test_the_fit_is_a_prior_for_attention():
    """Planted through the library, read out of the model, put back: the fitted prior attends like the planted one."""
    generator = torch.Generator().manual_seed(0)
    length = 24
    weights, _, _ = planted(length, 1, is_causal=True, noise=0.0)
    prior = fit_prior(statistics(weights), tolerance=1e-8, num_folds=2).prior()
    query, key, value = (torch.randn(3, 2, length, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    log_prior = torch.where(weights[0] > 0, weights[0], 1.0).log()
    score = (0.5 * query @ key.mT + log_prior).masked_fill(weights[0] == 0, -math.inf)
    actual = prior_attention(query, key, value, prior=prior, is_causal=True)
    assert_close(actual.detach(), torch.softmax(score, -1) @ value, tolerance=1e-4)
    doubled = (prior + prior).dense(torch.arange(3), torch.arange(3))
    assert_close(doubled.detach(), 2 * prior.dense(torch.arange(3), torch.arange(3)).detach())


def test_streamed_and_stored_statistics_give_one_fit():
    generator = torch.Generator().manual_seed(0)
    query, key = (2 * torch.randn(6, 3, 16, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    score = (0.5 * query @ key.mT).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -math.inf)
    streamed = fit_prior(SequenceStatistics.of(row_statistics(query, key, is_causal=True)))
    stored = fit_prior(statistics(torch.softmax(score, -1)))
    np.testing.assert_allclose(streamed.explained, stored.explained, atol=1e-8)
    np.testing.assert_allclose(streamed.key, stored.key, atol=1e-6)


def test_speed_of_a_head():
    weights, _, _ = planted(128, 8, is_causal=True, heads=1)
    summed = statistics(weights)
    times = []
    for _ in range(5):
        start = time.process_time()  # of this process alone: others may share the cores
        fit_prior(summed, num_folds=2, num_bootstraps=10)  # three fits
        times.append(time.process_time() - start)
    assert min(times) / 3 < 0.15  # ten times what was measured


def test_margins_of_the_model_are_its_sums():
    generator = torch.Generator().manual_seed(0)
    lag, key = torch.rand(2, 9, generator=generator).double(), torch.rand(2, 5, generator=generator).double()
    weight, seen = torch.tensor([2.0, 2, 2, 1, 0]).double(), torch.tensor([1.0, 1, 1, 1, 0]).double()
    model, group = LagKeyModel(lag, key), RowGroup(weight, seen)
    position = torch.arange(5)
    index = position[:, None] - position + 4
    table = lag[:, index] * (key * seen)[:, None]
    assert_close(model.normaliser(group), table.sum(-1))
    mass = weight[:, None] * table / table.sum(-1, keepdim=True)
    assert_close(model.column_rates(group) * key, mass.sum(-2))
    by_lag = torch.zeros(2, 9).double().index_add(1, index.flatten(), mass.flatten(1))
    assert_close(model.lag_rates(group) * lag, by_lag)


def test_report_prints_and_converts():
    weights, _, _ = planted(16, 4, is_causal=True)
    report = fit_prior(statistics(weights))
    assert str(report).count("\n") == 2
    assert report.to_dict()["interval"].shape == (2, 2)
    single = fit_prior(statistics(weights[:1]))
    assert np.isnan(single.explained).all()
    assert np.isfinite(single.explained_in_sample).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_folds": 1}, r"fit_prior: num_folds must be at least 2"),
        ({"smoothing": 1.0}, r"fit_prior: smoothing must be below one"),
        ({"window": 0}, r"fit_prior: window must be at least 1"),
        ({"tolerance": 0.0}, r"fit_prior: tolerance must be positive"),
    ],
)
def test_bad_arguments_are_named(options, message):
    weights, _, _ = planted(8, 2, is_causal=True)
    with pytest.raises(ValueError, match=message):
        fit_prior(statistics(weights), **options)


def test_explicit_sinks_are_refused():
    query = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    rows = row_statistics(query, query, sink_logits=torch.zeros(2))
    with pytest.raises(ValueError, match=r"fit_prior: statistics must have no explicit sink"):
        fit_prior(SequenceStatistics.of(rows))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_fit_factors_into_lanes(is_causal):
    """Waves that a fused kernel carries attend as the free table does; more of them come closer."""
    length = 48
    weights, _, _ = planted(length, 16, is_causal=is_causal)
    report = fit_prior(statistics(weights))
    positions = torch.arange(length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1) & is_causal

    def rows(prior):
        dense = prior.dense(positions, positions, dtype=torch.float64).detach()
        return torch.softmax(dense.masked_fill(future, -math.inf), -1)

    table = rows(report.prior())
    distances = [(rows(report.factored(num_frequencies=n)) - table).abs().sum(-1).mean().item() / 2 for n in (2, 8, 32)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02
    prior = report.factored(num_frequencies=32)
    assert prior.has_lanes
    assert not report.prior().has_lanes
    query, key, value = (torch.randn(2, 2, length, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    arguments = {"prior": prior, "is_causal": is_causal}
    fused = prior_attention(query, key, value, backend="sdpa", **arguments)
    assert_close(fused, prior_attention(query, key, value, backend="reference", **arguments).detach(), tolerance=1e-4)
    with pytest.raises(ValueError, match=r"ImplicitPriorReport.factored: num_frequencies must be at least 1"):
        report.factored(num_frequencies=0)
