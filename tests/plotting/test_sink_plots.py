"""Heads as discs: area is mass, colour is what makes it."""

import numpy as np
import pytest

from eotattn.plotting import plot_sink_heads


def test_area_is_mass_and_colour_is_the_share_of_the_prior():
    mass = np.array([[0.1, 0.8, 0.4], [0.5, 0.2, 0.6]])
    share = np.array([[0.0, 1.0, 0.0], [np.nan, 1.0, 0.5]])
    axes = plot_sink_heads(mass, share, threshold=0.3, legend=True)
    (discs,) = axes.collections
    assert discs.get_offsets().tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert discs.get_sizes() / discs.get_sizes()[1] == pytest.approx(mass.ravel() / 0.8)
    red, _, blue, alpha = discs.get_facecolors().T
    assert (alpha == np.where(mass.ravel() > 0.3, 1.0, 0.4)).all()
    assert ((np.array(discs.get_linewidths()) > 0) == (mass.ravel() > 0.3)).all()
    is_prior, is_content = np.array([1, 4]), np.array([0, 2])
    assert (blue[is_prior] > red[is_prior]).all()
    assert (red[is_content] > blue[is_content]).all()
    assert red[3] == blue[3]
    assert len(axes.figure.axes) == 2


def test_heads_need_two_axes():
    with pytest.raises(ValueError, match="plot_sink_heads: mass must have 2 axes"):
        plot_sink_heads([0.1, 0.2], [[0.1, 0.2]], threshold=0.3)
