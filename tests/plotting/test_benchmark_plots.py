"""Plots of benchmarks: points and curves carry the numbers, axes are named, bad arrays are refused."""

import matplotlib.pyplot as plt
import pytest

from eotattn.plotting.benchmark_plots import plot_errors_by_length, plot_time_ratios


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_points_are_the_ratios_and_ticks_are_plain_numbers():
    axes = plot_time_ratios(["bare", "eotattn, reserved", "peer"], [0.9, 1.25, 4.0], bound=1.15)
    assert not axes.patches  # the length of a bar means nothing on a logarithmic axis
    own, _, others, lines_of_others = axes.collections
    assert own.get_offsets().tolist() == [[1.25, 1]]
    assert others.get_offsets().tolist() == [[0.9, 2], [4.0, 0]]
    assert [segment[:, 0].tolist() for segment in lines_of_others.get_segments()] == [[1.0, 0.9], [1.0, 4.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["eotattn", "others"]
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [1.0, 1.15]
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert shown == ["1", "1.5", "2", "3", "5"]


def test_curves_are_the_errors_by_length():
    axes = plot_errors_by_length({"exact": ([2, 4], [1e-3, 1e-2])}, ylabel="relative error")
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2.0, 4.0], [1e-3, 1e-2])
    assert axes.get_ylabel() == "relative error"


@pytest.mark.parametrize(
    ("names", "ratios", "says"),
    [
        (["one"], [1.0, 2.0], "names must hold 2 names"),
        (["one"], [0.0], "ratios must be positive"),
        (["one"], [[1.0]], "ratios must have 1 axes"),
    ],
)
def test_bad_ratios_are_refused(names, ratios, says):
    with pytest.raises(ValueError, match=says):
        plot_time_ratios(names, ratios)
