"""Plots of all heads: arrays arrive in the Axes, bad arrays are refused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from eotattn.plotting.head_plots import plot_head_grid, plot_lag_profile, plot_layer_curves, plot_margin_split


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_grid_holds_the_values_and_leaves_missing_heads_blank():
    values = np.array([[0.1, 0.5], [0.2, np.nan]])
    _, axes = plt.subplots()
    assert plot_head_grid(values, label="x", low=0, high=1, axes=axes) is axes
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown.filled(np.nan), values)
    assert axes.images[0].get_clim() == (0, 1)
    axes = plot_head_grid(values, label="x", numbers=((3, 5), (2, 11)))
    for axis, names in ((axes.xaxis, ["2", "11"]), (axes.yaxis, ["3", "5"])):
        assert [axis.get_major_formatter()(place, 0) for place in (0, 1, 2)] == [*names, ""]
    with pytest.raises(ValueError, match=r"plot_head_grid: values must hold a finite value"):
        plot_head_grid(np.full((1, 2), np.nan), label="x")


def test_curves_and_intervals():
    axes = plot_layer_curves({"a": [1, 2], "b": [3, 4]}, ylabel="y", intervals={"a": ([0, 1], [2, 3])})
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [3, 4])
    assert len(axes.collections) == 1
    with pytest.raises(ValueError, match=r"plot_layer_curves: curves must hold at least one curve"):
        plot_layer_curves({}, ylabel="y")


def test_profile_runs_over_lags_with_weight():
    profile = np.array([[0.0, 0.0, 0.7, 0.3, 0.0]])
    axes = plot_lag_profile(profile)
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0, 1])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.7, 0.3])
    assert axes.get_legend() is None
    many = plot_lag_profile(np.repeat(profile, 12, 0), labels=[f"head {h}" for h in range(12)])
    assert len(many.get_legend().get_texts()) == 12
    assert len({(line.get_color(), line.get_linestyle()) for line in many.lines}) == 12
    with pytest.raises(ValueError, match=r"plot_lag_profile: labels must number 1"):
        plot_lag_profile(profile, labels=["a", "b"])
    with pytest.raises(ValueError, match=r"plot_lag_profile: profile must have an odd number of lags"):
        plot_lag_profile(np.ones((1, 4)))


def test_margins_stack_and_sum():
    content, prior = np.array([[2.0, -1.0]]), np.array([[1.0, 3.0]])
    axes = plot_margin_split(content, prior)
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [2, -1, 1, 3])
    assert [bar.get_y() for bar in axes.patches] == [0, 0, 2, 0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [3, 2])
    assert axes.get_ylim()[1] > 3.1, "the highest bar has room above it"
    assert [label.get_text() for label in plot_margin_split(content, prior, layers=[4]).get_xticklabels()] == ["4"]
    with pytest.raises(ValueError, match=r"plot_margin_split: prior must have shape"):
        plot_margin_split(content, prior[:, :1])


def test_hatched_heads_are_not_read_as_numbers():
    values, hatched = np.array([[0.1, -9.0], [0.2, 0.3]]), np.array([[False, True], [False, False]])
    axes = plot_head_grid(values, label="x", hatched=hatched)
    np.testing.assert_array_equal(np.ma.getmaskarray(axes.images[0].get_array()), hatched)
    assert axes.images[0].get_clim() == (0.1, 0.3)
    (patch,) = (patch for patch in axes.patches if patch.get_hatch())
    assert patch.get_xy() == (0.5, -0.5)
    with pytest.raises(ValueError, match=r"plot_head_grid: hatched must have shape \(2, 2\)"):
        plot_head_grid(values, label="x", hatched=hatched[:1])


def test_one_long_bar_does_not_crush_the_others_and_says_where_it_ends():
    content = np.linspace(0.5, 1.5, 40).reshape(4, 10)
    content[1, 3] = -16.0
    axes = plot_margin_split(content, np.zeros_like(content))
    low, high = axes.get_ylim()
    assert -4 < low < -1
    assert high > 1.5
    assert [text.get_text() for text in axes.texts] == ["-16"]
    assert len(plot_margin_split(content.clip(min=0), np.zeros_like(content)).texts) == 0
