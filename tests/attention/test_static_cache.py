"""A static cache: one recorded graph is every step, and gives what a call without a cache gives."""

import copy
import sys

import pytest
import torch
import torch._dynamo.testing
from attention.oracles import normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch._inductor.utils import run_and_get_code

from eotattn.attention import AttentionSinks, KeyValueCache, PriorAttention, Rotary, StaticCache, prior_attention
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


def test_a_step_in_bfloat16_is_as_exact_as_the_full_pass():
    layer, x = layer_of("goat"), normal(B, 120, E)
    exact = full(layer, x)
    layer = layer.to(torch.bfloat16)
    exact = full(copy.deepcopy(layer).double(), x.to(torch.bfloat16).double())
    found, graphs, _ = decoded(layer, x.to(torch.bfloat16), backend="eager")
    error, usual = ((y.double() - exact).norm() / exact.norm() for y in (found, full(layer, x.to(torch.bfloat16))))
    assert error <= 1.3 * usual < 0.1
    assert graphs == 1


@pytest.mark.parametrize("heads", [1, HK, H])
def test_a_bias_of_keys(heads):
    layer, x = layer_of("goat"), normal(B, L, E)
    key_bias = normal(B, heads, L, seed=5)
    found, graphs, _ = decoded(layer, x, key_bias=key_bias, backend="eager")
    assert_close(found, full(layer, x, key_bias=key_bias))
    assert graphs == 1


@pytest.mark.parametrize("name", ["goat", "rotary", "window", "no lanes"])
@pytest.mark.parametrize("real", [slice(4, PROMPT), slice(0, 5)])
def test_padded_prompts(name, real):
    layer, x = layer_of(name), normal(B, L, E)
    padding = torch.ones(B, PROMPT, dtype=torch.bool)
    padding[0], padding[1, real] = False, False
    cache = layer.make_cache(B, L, is_static=True)

    def step(x, padding=None):
        return layer(x, is_causal=True, need_weights=False, cache=cache, key_padding_mask=padding)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        step(x[:, :PROMPT], padding)
        found = torch.cat([compiled(x[:, t : t + 1]) for t in range(PROMPT, L)], dim=1)
    assert_close(found[:1], full(layer, x[:1])[:, PROMPT:])
    alone = torch.cat([x[1:, real], x[1:, PROMPT:]], dim=1)
    assert_close(found[1:], full(layer, alone)[:, 5:])


@pytest.mark.parametrize("name", ["goat", "forgetting", "window"])
def test_drafts_that_are_rolled_back(name):
    """Several tokens in one step, some of which are forgotten: as if they had never been."""
    layer, x = layer_of(name), normal(B, L, E)
    wrong, expected = normal(B, L, E, seed=7), full(layer, x)
    cache = layer.make_cache(B, L, is_static=True)
    attend = lambda x: layer(x, is_causal=True, need_weights=False, cache=cache)[0]  # noqa: E731
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    verify = torch.compile(attend, fullgraph=True, backend=graphs)
    with torch.no_grad():
        attend(x[:, :PROMPT])
        for start in range(PROMPT, L - 4, 3):
            draft = torch.cat([x[:, start : start + 2], wrong[:, start + 2 : start + 4]], dim=1)
            assert_close(verify(draft)[:, :2], expected[:, start : start + 2])
            cache.crop(start + 2)
            assert_close(verify(x[:, start + 2 : start + 3]), expected[:, start + 2 : start + 3])
        assert_close(attend(x[:, start + 3 :]), expected[:, start + 3 :])
    assert graphs.frame_count == 2


def test_beams():
    layer, x = layer_of("goat"), normal(B, L, E)
    cache = layer.make_cache(B, L, is_static=True)
    attend = lambda x: layer(x, is_causal=True, need_weights=False, cache=cache)[0]  # noqa: E731
    torch._dynamo.reset()
    step = torch.compile(attend, fullgraph=True, backend="eager")
    with torch.no_grad():
        attend(x[:, :PROMPT])
        cache.reorder(torch.tensor([1, 1]))
        found = torch.cat([step(x[:, t : t + 1]) for t in range(PROMPT, L)], dim=1)
    both = torch.cat([x[[1, 1], :PROMPT], x[:, PROMPT:]], dim=1)
    assert_close(found, full(layer, both)[:, PROMPT:])


def test_what_is_learned_may_change_between_steps():
    layer, x = layer_of("goat"), normal(B, L, E)
    cache = layer.make_cache(B, L, is_static=True)
    attend = lambda x: layer(x, is_causal=True, need_weights=False, cache=cache)[0]  # noqa: E731
    torch._dynamo.reset()
    step = torch.compile(attend, fullgraph=True, backend="eager")
    with torch.no_grad():
        attend(x[:, :PROMPT])
        step(x[:, PROMPT : PROMPT + 1])
        before = full(layer, x[:, : PROMPT + 2])[:, -1:]
        for parameter in layer.prior.parameters():
            parameter.mul_(1.5).add_(0.1)
        found = step(x[:, PROMPT + 1 : PROMPT + 2])
    assert_close(found, full(layer, x[:, : PROMPT + 2])[:, -1:])
    assert (found - before).abs().max() > 1e-3, "the change must matter, or this test says nothing"


def test_another_call_than_the_cache_was_made_for():
    prior, other, sides = goat_prior(H), RecencyPrior(H), [normal(B, n, L, D, seed=n) for n in (H, HK, HK + 1)]
    sides[2] = sides[2][:, :HK]
    cache = StaticCache(B, HK, L, D, D, prior=prior, dtype=torch.float64)
    call = {"prior": other, "scale": 0.7, "is_causal": True}
    torch._dynamo.reset()
    step = torch.compile(lambda *new: prior_attention(*new, cache=cache, **call), fullgraph=True, backend="eager")
    with torch.no_grad():
        prior_attention(*(side[:, :, :PROMPT] for side in sides), cache=cache, **call)
        found = [step(*(side[:, :, t : t + 1] for side in sides)) for t in range(PROMPT, L)]
    assert_close(torch.cat(found, dim=2), prior_attention(*sides, **call)[:, :, PROMPT:])


REFUSED = {
    "padding": (
        "goat",
        lambda layer, x, cache: layer(x, key_padding_mask=torch.ones(B, 1, dtype=torch.bool), cache=cache),
        "StaticCache: key_padding_mask must be left out in graphs",
    ),
    "crop": ("goat", lambda layer, x, cache: cache.crop(0), "StaticCache: length must be read or changed outside of"),
    "gates without a prompt": (
        "forgetting",
        lambda layer, x, cache: layer(x, cache=cache),
        "must be given for every token or for none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_refused(name):
    of_layer, call, message = REFUSED[name]
    layer, x = layer_of(of_layer), normal(B, 1, E)
    cache = layer.make_cache(B, L, is_static=True)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(lambda: call(layer, x, cache), fullgraph=True, backend="eager")()
    assert cache.length == 0


def test_a_graph_writes_one_row_and_copies_no_cache():
    """What the compiler makes: no buffer is as long as the cache, and no matrix is multiplied for the lanes."""
    prior, length = off_neutral(goat_prior(H)), 1024
    cache = StaticCache(1, HK, length, D, D, prior=prior)
    new = [normal(1, n, 1, D, seed=n, dtype=torch.float32) for n in (H, HK, HK)]
    torch._dynamo.reset()
    step = torch.compile(lambda *new: prior_attention(*new, prior=prior, cache=cache, is_causal=True), fullgraph=True)
    with torch.no_grad():
        prior_attention(*new, prior=prior, cache=cache, is_causal=True)
        _, (code,) = run_and_get_code(step, *new)
    body = code[code.index("def call(") : code.index("def get_args")]
    made = [line for line in body.splitlines() if "empty_strided" in line]
    assert made
    assert not [line for line in made if str(length) in line]
    assert "extern_kernels" not in body


@pytest.mark.parametrize("prior", [None, "goat"])
def test_a_step_beyond_the_slots_raises_and_writes_nothing(prior):
    prior = prior and goat_prior(H)
    cache = StaticCache(1, HK, 2, D, D, prior=prior)
    new = [normal(1, n, 1, D, seed=n, dtype=torch.float32) for n in (H, HK, HK)]
    torch._dynamo.reset()
    step = torch.compile(lambda *new: prior_attention(*new, prior=prior, cache=cache, is_causal=True), fullgraph=True)
    with torch.no_grad():
        step(*new), step(*new)
        rows = cache.keys.clone()
        with pytest.raises(RuntimeError, match="index out of bounds"):
            step(*(2 * side for side in new))
    assert cache.length == 2
    assert torch.equal(cache.keys, rows)


def test_a_call_by_call_step_asks_little():
    """Functions of Python that a step runs; 254 and 302 before checks were made once."""
    prior = goat_prior(H)
    cache = KeyValueCache(1, HK, L, D, D, prior=prior)
    new = [normal(1, n, 1, D, seed=n, dtype=torch.float32) for n in (H, HK, HK)]
    count = 0

    def counting(frame, event, argument):
        nonlocal count
        count += event == "call"

    with torch.inference_mode():
        for _ in range(3):
            prior_attention(*new, prior=prior, cache=cache, is_causal=True)
        sys.setprofile(counting)
        try:
            prior_attention(*new, prior=prior, cache=cache, is_causal=True)
        finally:
            sys.setprofile(None)
    assert count <= 240
