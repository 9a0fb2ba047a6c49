"""What a call costs the host, so that it cannot creep back: Python functions, operators, gradients of parameters."""

import sys

import pytest
import torch
from attention.oracles import normal
from lowered_graphs import graphs_of

from eotattn import PriorAttention, goat_prior, prior_attention
from eotattn.attention import GoatAttention

#: What was counted, and a tenth more; PyTorch's own functions count too, and differ between versions.
CALLS, LAYER_CALLS = 95, 132


def python_calls(function):
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    function(), function()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.skipif(sys.gettrace() is not None, reason="tracing adds calls")
@pytest.mark.parametrize("learns", [True, False])
def test_python_functions_of_a_second_call(learns):
    content, prior = normal(1, 4, 16, 8).float(), goat_prior(4)
    layer, tokens = PriorAttention(32, 4, prior=prior, batch_first=True), normal(1, 16, 32).float()
    with torch.set_grad_enabled(learns):
        calls = python_calls(lambda: prior_attention(content, content, content, prior=prior, is_causal=True))
        of_layer = python_calls(lambda: layer(tokens, is_causal=True, need_weights=False))
    assert calls <= CALLS
    assert of_layer <= LAYER_CALLS


def test_a_graph_makes_all_matrices_at_once_and_all_gradients_at_once():
    """A product a side, and its gradient; gradients of parameters are stretches of one tensor."""
    layer = GoatAttention(96, 2, num_frequencies=2, batch_first=True)
    forward, backward = graphs_of(lambda x: layer(x, is_causal=True, need_weights=False)[0], normal(2, 7, 96).float())
    assert forward["aten.mm.default"] <= 2
    assert forward["aten.cat.default"] <= 3  # numbers, query and key
    assert backward["aten.mm.default"] <= 2 + 3
    assert backward["aten.sum.dim_IntList"] <= 2 + 1 + 2  # lanes over samples, numbers, biases
    recency = layer.prior.parts[1].strength
    others = [one.grad for one in layer.prior.parameters() if one is not recency]
    assert all(grad.is_contiguous() for grad in others)
    assert len({grad.untyped_storage().data_ptr() for grad in others}) == 1
