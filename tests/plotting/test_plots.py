"""Plots: the arrays arrive in the Axes unchanged, with labels and units; bad arrays are refused."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb

from eotattn.diagnostics import sink_mass_by_score_range
from eotattn.plotting import (
    OKABE_ITO,
    plot_causal_prior,
    plot_cell_map,
    plot_key_only,
    plot_lag_map,
    plot_length_curves,
    plot_relative,
    plot_row_centred,
    plot_sink_mass,
    shade_lines,
)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def curve_of(axes, label):
    return next(c for c in axes.containers if c.get_label() == label).lines[0]


@pytest.mark.parametrize(("plot", "unit"), [(plot_key_only, "u(j) (nats)"), (plot_relative, "κ(t) (nats)")])
def test_lines_carry_the_values_of_every_head(plot, unit):
    values = np.arange(15.0).reshape(3, 5)
    axes = plot(values, labels=["one", "two", "three"])
    drawn = [line for line in axes.lines if len(line.get_ydata()) == 5]
    assert np.array_equal([line.get_ydata() for line in drawn], values)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two", "three"]
    assert len({to_hex(line.get_color()) for line in drawn}) == 3
    assert axes.get_ylabel().endswith(unit)
    assert "tokens" in axes.get_xlabel()


def test_given_positions_are_the_abscissa():
    axes = plot_relative(np.zeros((1, 4)), lags=[1, 2, 4, 8])
    assert axes.lines[-1].get_xdata().tolist() == [1, 2, 4, 8]


def test_heat_map_is_centred_at_zero_and_blank_where_inadmissible():
    log_prior = np.array([[0.0, -math.inf], [-3.0, 1.0]])
    axes = plot_row_centred(log_prior)
    (image,) = axes.images
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (-3.0, 0.0, 3.0)
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]
    assert not any(isinstance(child, QuadMesh) for child in axes.get_children())


def test_induced_prior_keeps_probabilities_and_blanks_zeros():
    axes = plot_causal_prior(np.array([[1.0, 0.0], [0.25, 0.75]]))
    (image,) = axes.images
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]
    assert image.get_array()[1].tolist() == [0.25, 0.75]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key position j", "query position i")


def test_length_curves_are_logarithmic_with_marks_at_the_lengths():
    axes = plot_length_curves(
        [64, 128, 256], {"a": [3, 2, 1], "b": [1, 2, 3]}, train_length=64, errors={"a": [1, 1, 1]}
    )
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128", "256"]
    assert curve_of(axes, "b").get_ydata().tolist() == [1, 2, 3]
    assert any(line.get_xdata()[0] == 64 and line.get_linestyle() == "--" for line in axes.lines)


def test_sink_mass_skips_empty_bins_and_keeps_styles_across_panels():
    report = sink_mass_by_score_range(torch.arange(8.0), torch.linspace(1, 0, 8), num_bins=4)
    axes = plot_sink_mass({"GOAT": report}, uniform_mass=0.125, order=["RoPE", "ALiBi", "GOAT"])
    assert any(line.get_linestyle() == ":" and line.get_ydata()[0] == 0.125 for line in axes.lines)
    line = curve_of(axes, "GOAT")
    assert line.get_ydata() == pytest.approx(report.mean_sink_mass)
    assert to_hex(line.get_color()) == OKABE_ITO["green"].lower()
    assert "nats" in axes.get_xlabel()


def test_given_axes_are_used_and_returned():
    _, axes = plt.subplots()
    assert plot_key_only(np.zeros((1, 3)), axes=axes) is axes
    assert plot_row_centred(np.eye(3), axes=axes) is axes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plot_key_only(np.zeros(3)), r"key_only must have 2 axes; got 'shape \(3,\)'"),
        (lambda: plot_key_only(np.zeros((2, 3)), labels=["one"]), "labels must number 2"),
        (lambda: plot_relative(np.zeros((1, 3)), lags=[1, 2]), "the positions must number 3; got 2"),
        (lambda: plot_row_centred(np.zeros((0, 3))), "log_prior must not be empty"),
        (lambda: plot_row_centred(np.full((2, 2), -np.inf)), "log_prior must hold a finite value"),
        (lambda: plot_causal_prior(np.array([[0.5, -0.1]])), r"weights must lie in \[0, 1\]"),
        (lambda: plot_length_curves([2, 1], {"a": [1, 2]}, train_length=1), "lengths must be positive and increasing"),
        (lambda: plot_length_curves([1, 2], {"a": [1]}, train_length=1), r"curves\['a'\] must number 2; got 1"),
        (lambda: plot_length_curves([1, 2], {}, train_length=1), "curves must hold at least one curve"),
        (lambda: plot_sink_mass({}), "reports must hold at least one report"),
    ],
)
def test_bad_arrays_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_maps_of_grids_are_centred_with_lags_on_the_axes():
    relative = np.arange(15.0).reshape(3, 5)
    axes = plot_lag_map(relative)
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), relative - relative.mean())
    assert image.get_extent() == [-2.5, 2.5, 1.5, -1.5]
    assert image.norm.vcenter == 0
    assert axes.get_xlabel() == "column lag (cells)"
    axes = plot_cell_map([[1.0, np.nan], [3.0, 5.0]])
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown.compressed(), [-2.0, 0.0, 2.0])
    assert shown.mask.tolist() == [[False, True], [False, False]]
    with pytest.raises(ValueError, match=r"plot_lag_map: relative must have odd numbers of lags"):
        plot_lag_map(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"plot_cell_map: key_only must hold a finite value"):
        plot_cell_map(np.full((2, 2), np.nan))


def test_shades_show_the_order_of_lines():
    axes = plt.subplots()[1]
    lines = [axes.plot([0, 1], [k, k], linestyle="--")[0] for k in range(4)]
    shade_lines(lines)
    brightness = [sum(to_rgb(line.get_color())) for line in lines]
    assert brightness == sorted(set(brightness))
    assert {line.get_linestyle() for line in lines} == {"-"}
