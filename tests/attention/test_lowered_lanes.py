"""What compiled graphs do for the lanes of a prior: tables of features are inputs, not made again."""

import pytest
from attention.oracles import normal
from lowered_graphs import graphs_of

from eotattn.attention import PriorAttention
from eotattn.priors import goat_prior

L = 7
#: Operators that only features of positions need.
OF_FEATURES = ("aten.cos.", "aten.sin.", "aten.log1p.", "aten.arange.")


@pytest.mark.parametrize("form", ["split", "paper"])
def test_layers_compute_no_features(form):
    layers = [
        PriorAttention(24, 2, prior=goat_prior(2, form=form, num_frequencies=2), batch_first=True) for _ in range(2)
    ]

    def decoder(x):
        for layer in layers:
            x = x + layer(x, is_causal=True, need_weights=False)[0]
        return x

    for graph in graphs_of(decoder, normal(2, L, 24).float()):
        assert not [target for target in graph if target.startswith(OF_FEATURES)]
