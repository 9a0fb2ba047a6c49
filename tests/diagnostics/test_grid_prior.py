"""The two-part prior on a grid: its statistics against loops, planted priors, a convex solver, a class token."""

import numpy as np
import pytest
import torch
from tolerances import assert_close, centre_rows

from eotattn import grid_positions, prior_attention
from eotattn.attention.statistics.score_rows import ScoreRows, WeightRows
from eotattn.diagnostics import GridStatistics, fit_grid_prior

HEIGHT, WIDTH, HEADS = 5, 4, 2


def planted(sequences, *, class_token, noise=0.7, seed=0):
    """Weights whose logits are a lag part in two axes, a key part and content noise; returns (weights, lag, key)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(1 - HEIGHT, HEIGHT, dtype=torch.float64)[:, None]
    columns = torch.arange(1 - WIDTH, WIDTH, dtype=torch.float64)
    rates = torch.tensor([0.3, 0.8], dtype=torch.float64)[:, None, None]
    lag = -rates * (rows.abs() + 0.5 * columns.square()) + 0.4 * torch.sin(rows * columns / 2)
    key = torch.randn(HEADS, HEIGHT * WIDTH + 1, generator=generator, dtype=torch.float64)
    cells = grid_positions(HEIGHT, WIDTH)
    table = torch.zeros(HEADS, HEIGHT * WIDTH + 1, HEIGHT * WIDTH + 1, dtype=torch.float64)
    for i, (r, c) in enumerate(cells.tolist()):
        for j, (s, d) in enumerate(cells.tolist()):
            table[:, i + 1, j + 1] = lag[:, r - s + HEIGHT - 1, c - d + WIDTH - 1]
    table = table + key[:, None]
    first = 0 if class_token else 1
    table = table[:, first:, first:]
    content = noise * torch.randn(sequences, *table.shape, generator=generator, dtype=torch.float64)
    return torch.softmax(table + content, -1), lag, key


def without_invisible(lag, key):
    """The same pair without the plane of the keys and the mean of the lags, by a least squares fit."""
    cells = grid_positions(HEIGHT, WIDTH).numpy()
    design = np.column_stack([np.ones(len(cells)), cells])
    rows, columns = np.meshgrid(np.arange(1 - HEIGHT, HEIGHT), np.arange(1 - WIDTH, WIDTH), indexing="ij")
    lags, keys = [], []
    for a, v in zip(lag, key, strict=True):
        fit = np.linalg.lstsq(design, v, rcond=None)[0]
        keys.append(v - design @ fit)
        tilted = a - fit[1] * rows - fit[2] * columns
        lags.append(tilted - tilted.mean())
    return np.stack(lags), np.stack(keys)


def statistics(weights):
    return GridStatistics.of(WeightRows(weights), HEIGHT, WIDTH)


@pytest.mark.parametrize("class_token", [True, False])
def test_statistics_are_those_of_loops(class_token):
    generator = torch.Generator().manual_seed(0)
    tokens = HEIGHT * WIDTH + class_token
    query, key = (torch.randn(2, HEADS, tokens, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.softmax(0.7 * query @ key.mT, -1)
    cells = grid_positions(HEIGHT, WIDTH, class_token=class_token).tolist()
    mass = torch.zeros(2, HEADS, 2 * HEIGHT - 1, 2 * WIDTH - 1, dtype=torch.float64)
    for i, (r, c) in enumerate(cells):
        for j, (s, d) in enumerate(cells):
            if r >= 0 and s >= 0:
                mass[..., r - s + HEIGHT - 1, c - d + WIDTH - 1] += weights[..., i, j]
    for source in (WeightRows(weights), ScoreRows(query, key, 0.7)):
        found = GridStatistics.of(source, HEIGHT, WIDTH)
        assert (found.height, found.width, found.num_free) == (HEIGHT, WIDTH, int(class_token))
        assert_close(found.lag_mass, mass, tolerance=1e-10)
        assert_close(found.column_mass, weights.sum(-2), tolerance=1e-10)
        assert_close(found.entropy, -torch.special.xlogy(weights, weights).sum((-1, -2)), tolerance=1e-10)
    both = found + found.heads([0, 1])
    assert both.num_sequences == 4


@pytest.mark.parametrize("class_token", [True, False])
def test_planted_priors_are_recovered(class_token):
    """Planes and the constant of the lags, which only the class token's one row sees, are left out of both sides."""
    weights, lag, key = planted(64, class_token=class_token)
    report = fit_grid_prior(statistics(weights))
    wanted = without_invisible(lag.numpy(), key[:, 1:].numpy())
    found = without_invisible(report.lag, report.key.reshape(HEADS, -1))
    near = (slice(1, -1), slice(1, -1))  # the corners of the lag table are single pairs
    for h in range(HEADS):
        assert np.corrcoef(found[1][h], wanted[1][h])[0, 1] > 0.99
        assert np.corrcoef(found[0][h][near].ravel(), wanted[0][h][near].ravel())[0, 1] > 0.99
    if not class_token:
        assert abs(found[0] - report.lag).max() < 1e-9
    assert report.has_class_token is class_token
    assert report.explained.min() > 0.5
    assert (report.interval[:, 0] < report.explained).all()
    assert (report.explained < report.interval[:, 1]).all()
    assert abs(report.key.sum((-1, -2))).max() < 1e-9


def test_the_whole_log_prior_is_recovered_as_softmax_sees_it():
    """The class token's column too: row-centred, against the planted table."""
    weights, _, _ = planted(64, class_token=True)
    planted_table = planted(1, class_token=True, noise=0.0)[0][0].log()
    positions = grid_positions(HEIGHT, WIDTH, class_token=True)
    table = fit_grid_prior(statistics(weights)).prior().dense(positions, positions, dtype=torch.float64).detach()
    for h in range(HEADS):
        pair = torch.stack([centre_rows(planted_table[h]).flatten(), centre_rows(table[h]).flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.99


@pytest.mark.parametrize("class_token", [True, False])
def test_without_noise_the_fit_is_the_planted_prior_and_attends_like_it(class_token):
    weights, _, _ = planted(2, class_token=class_token, noise=0.0)
    report = fit_grid_prior(statistics(weights), tolerance=1e-10)
    assert report.explained.min() > 1 - 1e-4
    prior = report.prior()
    positions = grid_positions(HEIGHT, WIDTH, class_token=class_token)
    rebuilt = torch.softmax(prior.dense(positions, positions, dtype=torch.float64), -1)
    assert_close(rebuilt, weights[0], tolerance=1e-4)
    generator = torch.Generator().manual_seed(0)
    tokens = len(positions)
    query, key, value = (torch.randn(1, HEADS, tokens, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    output = prior_attention(query, key, value, prior=prior, query_positions=positions, key_positions=positions)
    logits = 0.5 * query @ key.mT + weights[0].log()
    assert_close(output, torch.softmax(logits, -1) @ value, tolerance=1e-4)


def test_the_fit_agrees_with_a_convex_solver():
    weights, _, _ = planted(16, class_token=True)
    report = fit_grid_prior(statistics(weights), tolerance=1e-8)
    mean = weights.mean(0)
    lag = torch.zeros(HEADS, 2 * HEIGHT - 1, 2 * WIDTH - 1, dtype=torch.float64, requires_grad=True)
    key = torch.zeros(HEADS, HEIGHT * WIDTH + 1, dtype=torch.float64, requires_grad=True)
    cells = grid_positions(HEIGHT, WIDTH)
    r, c = (cells[:, None] - cells).unbind(-1)
    solver = torch.optim.LBFGS([lag, key], max_iter=1000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        table = torch.nn.functional.pad(lag[:, r + HEIGHT - 1, c + WIDTH - 1], (1, 0, 1, 0)) + key[:, None]
        loss = -(mean * torch.log_softmax(table, -1)).sum()
        loss.backward()
        return loss

    solver.step(objective)
    best = objective().detach()
    positions = grid_positions(HEIGHT, WIDTH, class_token=True)
    ours = torch.log_softmax(report.prior().dense(positions, positions, dtype=torch.float64).detach(), -1)
    cross = -(mean * ours).sum()
    assert abs(float(cross - best)) / (HEADS * len(positions)) < 2e-3 * float(report.divergence_to_uniform.min())


def test_bad_calls_are_named():
    weights, _, _ = planted(2, class_token=True)
    with pytest.raises(ValueError, match=r"GridStatistics: attention must be square with 5 x 5 tokens, or one more"):
        GridStatistics.of(WeightRows(weights), 5, 5)
    with pytest.raises(ValueError, match=r"GridStatistics: height must be at least 1"):
        GridStatistics.of(WeightRows(weights), 0, 4)
    causal = ScoreRows(torch.randn(1, 1, 21, 3), torch.randn(1, 1, 21, 3), 1.0, is_causal=True)
    with pytest.raises(ValueError, match=r"GridStatistics: attention must reach every token"):
        GridStatistics.of(causal, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"fit_prior: num_folds must be at least 2"):
        fit_grid_prior(statistics(weights), num_folds=1)
    other = GridStatistics.of(WeightRows(weights[:, :1]), HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"GridStatistics: the other must have heads and grid"):
        _ = statistics(weights) + other
