"""A static cache: one recorded graph is every step, and gives what a call without a cache gives."""

import copy

import pytest
import torch
import torch._dynamo.testing
from attention.oracles import normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch._inductor.utils import run_and_get_code

from eotattn.attention import AttentionSinks, PriorAttention, Rotary, StaticCache, prior_attention
from eotattn.priors import (
    AlibiPrior,
    ForgettingPrior,
    QueryGainPrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    goat_prior,
)

B, E, H, HK, L, PROMPT = 2, 32, 4, 2, 24, 9
D = E // H
LAYERS = {
    "goat": lambda: {"prior": off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0))},
    "goat, reserved": lambda: {"prior": off_neutral(goat_prior(H, num_frequencies=1)), "lanes": "reserved"},
    "rotary": lambda: {"rotary": Rotary(D)},
    "rotary, recency and sink": lambda: {
        "rotary": Rotary(D),
        "prior": RecencyPrior(H) + off_neutral(SinkPrior(H, 2, length_scale=9.0)),
    },
    "ALiBi": lambda: {"prior": AlibiPrior(H)},
    "forgetting": lambda: {"prior": ForgettingPrior(E, H, num_kv_heads=HK, half_lives=(2.0, 50.0))},
    "forgetting and goat": lambda: {"prior": ForgettingPrior(E, H) + off_neutral(goat_prior(H, num_frequencies=1))},
    "gains": lambda: {"prior": QueryGainPrior(off_neutral(goat_prior(H, num_frequencies=1)), E)},
    "window": lambda: {"prior": off_neutral(goat_prior(H, num_frequencies=1)), "window": 5},
    "sinks": lambda: {"prior": RecencyPrior(H), "sinks": AttentionSinks.logit(H)},
    "no lanes": lambda: {"prior": off_neutral(RelativeBiasPrior(H, 3))},
    "plain": lambda: {},
}


def layer_of(name, dtype=torch.float64, heads=HK):
    torch.manual_seed(0)
    return PriorAttention(E, H, num_kv_heads=heads, **LAYERS[name]()).to(dtype).eval()


def decoded(layer, x, *, store=None, backend="aot_eager", **arguments):
    """The outputs of a prompt, read outside, and of compiled steps; and how many graphs there were."""
    torch._dynamo.reset()
    cache = layer.make_cache(x.shape[0], x.shape[1], dtype=x.dtype, is_static=True, store=store)
    biases = {name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], torch.Tensor)}

    def step(x, **new):
        return layer(x, is_causal=True, need_weights=False, cache=cache, **new, **arguments)[0]

    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    part = lambda start, stop: {name: bias[..., start:stop] for name, bias in biases.items()}  # noqa: E731
    with torch.no_grad():
        outputs = [step(x[:, :PROMPT], **part(0, PROMPT))]
        outputs += [compiled(x[:, t : t + 1], **part(t, t + 1)) for t in range(PROMPT, x.shape[1])]
    return torch.cat(outputs, dim=1), graphs.frame_count, cache


def full(layer, x, **arguments):
    with torch.no_grad():
        return layer(x, is_causal=True, need_weights=False, **arguments)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_is_every_step(name, dtype):
    layer, x = layer_of(name, dtype), normal(B, L, E, dtype=dtype)
    found, graphs, cache = decoded(layer, x)
    assert_close(found, full(layer, x))
    assert graphs == 1
    assert cache.length == L
