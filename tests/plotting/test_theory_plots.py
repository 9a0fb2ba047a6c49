"""Plots of theorems carry the arrays unchanged, and refuse arrays that do not fit."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from eotattn.plotting import plot_identity, plot_measured_and_bound

LABELS = {"labels": ("x", "y")}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_lines_and_bounds_share_a_colour():
    x, y = np.arange(1.0, 5.0), np.array([3.0, 1.0, 2.0, 0.5])
    axes = plot_measured_and_bound(x, {"a": y}, {"a": y + 1}, labels=("x (tokens)", "y (nats)"), scales=("log", "log"))
    line, bound, _ = axes.lines
    assert np.array_equal(line.get_ydata(), y)
    assert np.array_equal(bound.get_ydata(), y + 1)
    assert line.get_color() == bound.get_color()
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "x (tokens)")


def test_unrelated_problems_are_points():
    axes = plot_measured_and_bound([1.0, 2.0], {"a": [3.0, 1.0]}, {"a": [4.0, 4.0]}, marks="points", **LABELS)
    points, bound, _ = axes.lines
    assert (points.get_linestyle(), points.get_marker()) == ("None", ".")
    assert bound.get_linestyle() == "--"


def test_an_identity_lies_on_the_diagonal():
    axes = plot_identity([1.0, 4.0], [1.0, 4.0], labels=("left", "right"))
    assert np.array_equal(axes.collections[0].get_offsets(), [[1.0, 1.0], [4.0, 4.0]])
    assert np.array_equal(axes.lines[0].get_xdata(), axes.lines[0].get_ydata())


BAD = [
    (lambda: plot_measured_and_bound([1.0], {}, **LABELS), "measured must hold at least one line"),
    (lambda: plot_measured_and_bound([1.0], {"a": [1.0, 2.0]}, **LABELS), "measured must have 1 points"),
    (lambda: plot_measured_and_bound([1.0], {"a": [1.0]}, {"b": [1.0]}, **LABELS), "bounds must belong to measured"),
    (lambda: plot_measured_and_bound([1.0], {"a": [1.0]}, marks="dots", **LABELS), "marks must be one of"),
    (lambda: plot_identity([1.0], [1.0, 2.0], **LABELS), "right must have 1 points"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arrays_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
