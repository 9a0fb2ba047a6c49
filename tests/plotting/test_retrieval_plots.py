"""Plots of retrieval and rankings show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from eotattn.plotting import OKABE_ITO, line_styles, mosaic, plot_depth_grid, plot_log_prior_by_lag, plot_ranking


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_depth_grids_have_lengths_across_and_depths_downwards():
    accuracy = np.array([[1.0, 0.5], [0.25, 0.0], [0.75, 1.0]])
    axes = plot_depth_grid(accuracy, lengths=(256, 512, 4096), depths=(0.1, 0.9), train_length=256)
    assert np.array_equal(axes.images[0].get_array(), accuracy.T)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512", "4k"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert (written[0, 0], written[0, 1], written[1, 0]) == ("1", ".50", ".25")
    assert axes.lines[0].get_xdata()[0] == 0.5


def test_log_priors_are_drawn_at_lag_plus_one_a_line_a_head():
    values = np.array([[0.0, -1.0, -2.0], [0.0, -0.1, -0.2]])
    axes = plot_log_prior_by_lag(values, lags=[0, 1, 5], train_length=4)
    assert np.array_equal(axes.lines[1].get_ydata(), values[1])
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 6]
    assert axes.lines[2].get_xdata()[0] == 4


def test_rankings_mark_the_mean_and_reach_to_the_extreme_seeds():
    rows = {"a": [1.0, 2.0, 6.0], "b": [1.0, 1.0, 4.0]}
    axes = plot_ranking(rows, labels={"a": "first"}, highlight=("b",), reference="b", logarithmic=True)
    first_bar, first, second_bar, second, line = axes.lines
    assert first_bar.get_xydata().tolist() == [[1.0, 0], [6.0, 0]]
    assert first.get_xydata().tolist() == [[3.0, 0]]
    assert second.get_xydata().tolist() == [[2.0, 1]]
    assert second_bar.get_xydata().tolist() == [[1.0, 1], [4.0, 1]]
    assert first.get_color() == first_bar.get_color() == OKABE_ITO["blue"]
    assert second.get_color() == second_bar.get_color() == OKABE_ITO["vermillion"]
    assert list(line.get_xdata()) == [2.0, 2.0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "b"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_major_formatter()(1.5) == "1.5"
    assert axes.xaxis.get_minor_formatter()(1.5) == ""


def test_lines_of_many_names_look_different():
    styles = line_styles([str(k) for k in range(36)])
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 36
    first = [styles[str(k)] for k in range(9)]
    assert len({style["color"] for style in first}) == len({style["marker"] for style in first}) == 9
    assert {style["linestyle"] for style in first} == {"-"}
    assert line_styles(["7"], order=[str(k) for k in range(36)])["7"] == styles["7"]


def test_mosaics_name_their_axes_and_span_repeated_names():
    figure, axes = mosaic([["wide", "wide"], ["left", "right"]], size=(4, 3), heights=(1, 1))
    assert set(axes) == {"wide", "left", "right"}
    figure.canvas.draw()
    assert axes["wide"].get_position().width > 1.5 * axes["left"].get_position().width


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plot_depth_grid([[1.0]], lengths=(1, 2), depths=(0.5,)), r"accuracy must have shape \(2, 1\)"),
        (lambda: plot_log_prior_by_lag([[1.0]], lags=[1, 2], train_length=2), "lags must number 1; got 2"),
        (lambda: plot_ranking({}), "values must hold at least one variant"),
        (lambda: plot_ranking({"a": [[1.0]]}), r"values\['a'\] must have 1 axes"),
        (lambda: plot_ranking({"a": [1.0]}, reference="b"), r"reference must be among \['a'\]; got 'b'"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()
