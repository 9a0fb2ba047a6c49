"""Forgetting gates: the published sum over tokens in between, in training, caches, documents and padding."""

import copy
import itertools
import pickle

import pytest
import torch
from attention.oracles import attention, causal, normal
from lowered_graphs import graphs_of
from priors.cases import off_neutral
from tolerances import assert_close
from torch import nn

from eotattn.attention import KeyValueCache, PackedDocuments, PriorAttention, prior_attention
from eotattn.priors import (
    ForgettingPrior,
    FourierPrior,
    GridPrior,
    HeadsPrior,
    JoinedPrior,
    QueryGainPrior,
    RecencyPrior,
    T5Prior,
    Tokens,
    goat_prior,
    running_sums,
    split_parameters,
)

B, E, H, HK, L = 2, 24, 4, 2, 37
CHUNKS = [17, 16, 1, 1, 2]


def gates(num_heads=H, *, seed=0, **options):
    """Gates that depend on the token as training leaves them."""
    prior = ForgettingPrior(E, num_heads, **{"half_lives": (1.0, 60.0), **options})
    with torch.no_grad():
        prior.weight.copy_(0.3 * normal(*prior.weight.shape, seed=seed))
    return prior


def slopes():
    prior = QueryGainPrior(RecencyPrior(H), E)
    with torch.no_grad():
        prior.weight.copy_(0.3 * normal(H, E, seed=4))
    return prior


def goat():
    return off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0))


PRIORS = {
    "gates": gates,
    "goat and gates": lambda: goat() + gates(),
    "gates by key head": lambda: goat() + gates(num_kv_heads=HK),
    "twice": lambda: gates() + goat() + gates(seed=3, num_kv_heads=1),
    "multiple": lambda: gates(num_kv_heads=HK) * (0.5, 1.0, 2.0, 0.0),
    "some heads": lambda: HeadsPrior(gates(3), [2, 0, 0, 1]),
    "joined": lambda: JoinedPrior(off_neutral(FourierPrior(1, 2)), gates(2), RecencyPrior(1)),
    "slopes": slopes,
    "amplitudes, slopes and gates": lambda: QueryGainPrior(off_neutral(FourierPrior(H, 2)), E) + slopes() + gates(),
}


def layer_of(prior, *, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = PriorAttention(E, H, **{"num_kv_heads": HK, "prior": prior, **options}).to(dtype)
    return layer.eval()


def run(layer, x, **arguments):
    return layer(x, is_causal=True, need_weights=False, **arguments)[0]


def in_between(log_gates):
    """(B, G, L, L) sum of log f over the tokens after the key, up to and with the query, term by term."""
    length = log_gates.shape[-1]
    out = torch.zeros(*log_gates.shape, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i):
            out[..., i, j] = log_gates[..., j + 1 : i + 1].double().sum(-1)
    return out


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("num_kv_heads", [1, HK, H])
def test_gates_are_the_published_sum(num_kv_heads, backend):
    prior, x = gates(num_kv_heads=num_kv_heads), normal(B, L, E)
    gate = torch.sigmoid(torch.einsum("ble,ge->bgl", x, prior.weight.double()) + prior.bias.double()[:, None])
    log_prior = in_between(gate.log()).repeat_interleave(H // num_kv_heads, 1).detach()
    inputs = [normal(B, heads, L, 8, seed=heads) for heads in (H, HK, 5 * HK)]
    inputs[2] = inputs[2][:, :HK]
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=causal(torch.arange(L), torch.arange(L)))
    read = prior.read_tokens(Tokens(x, x))
    biases = {"key_bias": read.key_bias, "query_bias": read.query_bias}
    output = prior_attention(*inputs, prior=prior, is_causal=True, backend=backend, **biases)
    assert_close(output, expected, tolerance=1e-12)
    dense = (read.query_bias[..., None] + read.key_bias.repeat_interleave(H // num_kv_heads, 1)[:, :, None]).tril()
    assert_close(dense, log_prior, tolerance=1e-12)  # the natural form, not up to constants


def test_half_lives_are_where_gates_start():
    prior = ForgettingPrior(E, 5, half_lives=(2.0, 65536.0))
    x = normal(1, 3, E).float()
    times = -torch.log(torch.tensor(2.0)) / prior.log_gates(x)
    assert_close(times[0, :, 0].double() / torch.tensor(prior.half_lives), torch.ones(5).double(), tolerance=1e-5)
    assert prior.half_lives[0] == 2.0
    assert abs(prior.half_lives[-1] / 65536.0 - 1) < 1e-12
    assert ForgettingPrior(E, 3, half_lives=(3.0, 1.0, 2.0)).half_lives == (3.0, 1.0, 2.0)


@pytest.mark.parametrize("name", PRIORS)
def test_chunks_with_a_cache_are_the_full_pass(name):
    layer, x = layer_of(PRIORS[name]()), normal(B, L, E, dtype=torch.float32)
    cache = layer.make_cache(B, L + 3)
    with torch.no_grad():
        ends = itertools.accumulate(CHUNKS, initial=0)
        parts = [run(layer, x[:, a:b], cache=cache) for a, b in itertools.pairwise(ends)]
    assert_close(torch.cat(parts, 1), run(layer, x).detach(), tolerance=1e-5)


@pytest.mark.parametrize("name", PRIORS)
def test_fused_calls_are_the_reference_with_gradients(name):
    layer, x = layer_of(PRIORS[name](), dtype=torch.float64), normal(B, L, E).requires_grad_()
    upstream, wanted = normal(B, L, E, seed=5), [x, *layer.parameters()]
    fused, dense = run(layer, x), layer(x, is_causal=True, need_weights=True)[0]
    assert_close(fused, dense.detach())
    pairs = zip(*(torch.autograd.grad(y, wanted, upstream) for y in (fused, dense)), strict=True)
    for actual, expected in pairs:
        assert_close(actual, expected, tolerance=1e-6)  # parameters of priors stay float32


@pytest.mark.parametrize("name", PRIORS)
def test_documents_are_alone(name):
    layer, x = layer_of(PRIORS[name]()), normal(B, L, E, dtype=torch.float32)
    packed = run(layer, x, documents=PackedDocuments([10, L - 10, L]))
    for sample, start, stop in ((0, 0, 10), (0, 10, L), (1, 0, L)):
        alone = run(layer, x[sample : sample + 1, start:stop])
        assert_close(packed[sample : sample + 1, start:stop], alone.detach(), tolerance=1e-5)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("has_cache", [False, True])
def test_left_padding_is_alone(has_cache, name):
    layer, x = layer_of(PRIORS[name]()), normal(B, L, E, dtype=torch.float32)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :13] = True
    if has_cache:
        cache = layer.make_cache(B, L)
        with torch.no_grad():
            spans = ((0, 20), (20, 21), (21, L))
            parts = [run(layer, x[:, a:b], cache=cache, key_padding_mask=padding[:, a:b]) for a, b in spans]
        output = torch.cat(parts, 1)
    else:
        at = ((~padding).cumsum(1) - 1).clamp(min=0)
        output = run(layer, x, key_padding_mask=padding, query_positions=at, key_positions=at)
    assert_close(output[1:, 13:], run(layer, x[1:, 13:]).detach(), tolerance=1e-5)
    assert_close(output[:1], run(layer, x[:1]).detach(), tolerance=1e-5)


def test_padding_between_tokens_neither_counts_nor_forgets():
    layer, x = layer_of(gates()), normal(1, L, E, dtype=torch.float32)
    padding = torch.zeros(1, L, dtype=torch.bool)
    padding[:, 10:20] = True
    kept = run(layer, x[:, ~padding[0]])
    assert_close(run(layer, x, key_padding_mask=padding)[:, ~padding[0]], kept.detach(), tolerance=1e-5)


def test_a_cache_crops_and_reorders_the_sums():
    layer, x = layer_of(PRIORS["goat and gates"]()), normal(B, L, E, dtype=torch.float32)
    cache = layer.make_cache(B, L)
    with torch.no_grad():
        run(layer, x[:, :30], cache=cache)
        cache.crop(12)
        cache.reorder(torch.tensor([1, 1]))
        found = run(layer, x[[1, 1], 12:], cache=cache)
        cache.crop(0)
        assert_close(run(layer, x, cache=cache), run(layer, x), tolerance=1e-5)
    assert_close(found, run(layer, x)[[1, 1], 12:].detach(), tolerance=1e-5)


def test_sums_in_a_cache_stay_exact_however_long():
    """Steps of a long half-life are below the last digit of a float32 sum."""
    prior = ForgettingPrior(E, 1, half_lives=(1e6, 1e6))
    layer = PriorAttention(E, 1, prior=prior + gates(1))
    cache = layer.make_cache(1, 200)
    cache.append(*(torch.zeros(1, 1, 1, E) for _ in range(2)), key_bias=torch.full((1, 1, 1), 1000.0))
    cache.keep(torch.full((1, 2, 1), -1000.0).double())
    with torch.no_grad():
        for _ in range(100):
            run(layer, torch.zeros(1, 1, E), cache=cache)
    assert abs(float(-cache.kept[0, 0]) - 1000 - 100 * 0.6931471805599453e-6) < 1e-9


@pytest.mark.parametrize("name", ["goat and gates", "gates by key head", "amplitudes, slopes and gates"])
def test_one_graph_trains(name):
    torch._dynamo.reset()
    layer, x = layer_of(PRIORS[name]()), normal(B, L, E, dtype=torch.float32)
    compiled, upstream = torch.compile(layer, fullgraph=True, backend="aot_eager"), normal(B, L, E, dtype=torch.float32)
    expected = torch.autograd.grad(run(layer, x), list(layer.parameters()), upstream)
    found = torch.autograd.grad(run(compiled, x), list(layer.parameters()), upstream)
    for actual, exact in zip(found, expected, strict=True):
        assert_close(actual, exact, tolerance=1e-4)


@pytest.mark.parametrize("name", ["alone", "documents", "padding"])
def test_graphs_leave_running_sums_to_one_operator(name):
    """Inductor's scans failed on them in PyTorch 2.11, forward and backward."""
    layer, x = layer_of(PRIORS["goat and gates"]()), normal(B, L, E, dtype=torch.float32).requires_grad_()
    padding = torch.arange(L).expand(B, L) < 9
    options = {"documents": {"documents": PackedDocuments([10, L - 10, L])}, "padding": {"key_padding_mask": padding}}
    for graph in graphs_of(lambda tokens: run(layer, tokens, **options.get(name, {})), x):
        assert graph["eotattn.running_sums.default"] >= 1
        assert not [target for target in graph if "cum" in target or "scan" in target]


def test_one_graph_serves_decoding_steps_and_documents():
    torch._dynamo.reset()
    layer, x = layer_of(PRIORS["goat and gates"]()), normal(B, L, E, dtype=torch.float32)
    compiled, cache = torch.compile(layer, fullgraph=True, backend="aot_eager"), layer.make_cache(B, L)
    with torch.no_grad():
        run(layer, x[:, :30], cache=cache)
        parts = [run(compiled, x[:, t : t + 1], cache=cache) for t in range(30, L)]
        assert_close(torch.cat(parts, 1), run(layer, x)[:, 30:], tolerance=1e-5)
        documents = PackedDocuments([10, L - 10, L])
        assert_close(run(compiled, x, documents=documents), run(layer, x, documents=documents), tolerance=1e-5)


def test_reserved_lanes_hold_the_gates():
    for dtype, lanes in ((torch.float32, 1), (torch.bfloat16, 3)):
        assert (goat() + gates()).num_lanes(dtype) == goat().num_lanes(dtype) + lanes
    prior = goat_prior(2, num_frequencies=2) + ForgettingPrior(64, 2)
    layer = PriorAttention(64, 2, prior=prior, lanes="reserved")
    assert layer.content_dim == 32 - layer.prior.num_lanes() - 1  # the lane of gradients
    assert run(layer, torch.ones(1, 3, 64)).shape == (1, 3, 64)


def test_training_starts_everywhere_and_gates_are_parameters_of_the_prior():
    layer = PriorAttention(E, H, prior=goat_prior(H, num_frequencies=2) + ForgettingPrior(E, H))
    run(layer, normal(B, L, E, dtype=torch.float32)).square().sum().backward()
    parameters = dict(layer.prior.named_parameters())
    assert all(bool(p.grad.any()) for name, p in parameters.items())
    assert {id(p) for p in split_parameters(layer)[1]} == {id(p) for p in parameters.values()}


def test_casts_copies_and_resets():
    prior = gates()
    layer = layer_of(prior, dtype=torch.bfloat16)
    assert prior.weight.dtype == torch.float32
    x = normal(B, L, E, dtype=torch.bfloat16)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in twins:
        assert bool((run(twin, x) == run(layer, x)).all())
    prior.reset_parameters()
    assert not prior.weight.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(layer_of(gates()), x.float()).dtype == torch.bfloat16


def test_cross_attention_forgets_by_the_keys_alone():
    layer, x, memory = layer_of(gates()), normal(B, 5, E, dtype=torch.float32), normal(B, L, E, dtype=torch.float32)
    bias = layer.prior.read_tokens(Tokens(memory, memory)).key_bias
    plain = layer_of(None)
    expected, _ = plain(x, memory, need_weights=False, key_bias=bias)
    assert_close(layer(x, memory, need_weights=False)[0], expected.detach())


def test_a_bias_of_the_caller_adds_to_what_the_prior_reads():
    layer, x = layer_of(gates()), normal(B, L, E, dtype=torch.float32)
    bias = normal(B, 1, L)
    read = layer.prior.read_tokens(Tokens(x, x))
    expected = run(layer_of(None), x, key_bias=read.key_bias + bias)
    assert_close(run(layer, x, key_bias=bias), expected.detach())


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("has_cache", [False, True])
def test_sinks_see_the_natural_form(has_cache, backend):
    """A sink competes with score + log f summed over what lies in between, whatever constants lanes leave out."""
    prior, x, logits = goat() + slopes() + gates(), normal(B, L, E), normal(H, seed=8)
    inputs = [normal(B, heads, L, 8, seed=seed) for seed, heads in enumerate((H, HK, HK))]
    read, at = prior.read_tokens(Tokens(x, x)), torch.arange(L)
    slope = prior.parts[-2].prior.dense(at, at, dtype=torch.float64)
    log_prior = goat().dense(at, at, dtype=torch.float64) + read.query_gains[-1][..., None] * slope
    log_prior = log_prior + (read.query_bias[..., None] + read.key_bias[:, :, None])
    score = inputs[0] @ inputs[1].repeat_interleave(H // HK, 1).mT / 8**0.5 + log_prior
    score = score.masked_fill(~causal(at, at), -torch.inf)
    with_sink = torch.cat([score, logits[None, :, None, None].expand(B, H, L, 1)], -1).softmax(-1)
    expected = with_sink[..., :-1] @ inputs[2].repeat_interleave(H // HK, 1)
    cache = KeyValueCache(B, HK, L, 8, 8, prior=prior, dtype=torch.float64) if has_cache else None
    with torch.no_grad():
        of_tokens = {name: getattr(read, name) for name in ("key_bias", "query_bias", "query_gains")}
        options = {"is_causal": True, "sinks": logits, "cache": cache, "backend": backend}
        output = prior_attention(*inputs, prior=prior, **of_tokens, **options)
    assert_close(output, expected.detach(), tolerance=1e-6 if has_cache else 1e-11)


BAD = {
    "gates above one": (lambda: running_sums(torch.tensor([[[0.1]]])), "log_gates must be at most zero"),
    "NaN gates": (lambda: running_sums(torch.tensor([[[float("nan")]]])), "log_gates must be finite"),
    "gates of two axes": (lambda: running_sums(torch.zeros(2, 3)), r"log_gates must have shape \(any, any, any\)"),
    "three half-lives": (lambda: ForgettingPrior(E, 4, half_lives=(1.0, 2.0, 3.0)), "half_lives must be two positive"),
    "negative half-life": (lambda: ForgettingPrior(E, 4, half_lives=(-1.0, 2.0)), "half_lives must be two positive"),
    "key heads": (lambda: ForgettingPrior(E, 4, num_kv_heads=3), "num_kv_heads must divide 4"),
    "no width": (lambda: ForgettingPrior(0, 4), "embed_dim must be"),
    "another width": (lambda: run(layer_of(ForgettingPrior(E + 1, H)), torch.ones(1, 3, E)), "tokens must have shape"),
    "not read": (
        lambda: prior_attention(*(torch.ones(1, H, 3, 8),) * 3, prior=gates()),
        "prior_attention: key_bias must be given with ForgettingPrior",
    ),
    "gain of gates": (lambda: QueryGainPrior(gates(), E), "prior must have bilinear terms"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_combinations_without_meaning_are_refused():
    x = torch.ones(1, 3, E)
    with pytest.raises(ValueError, match="GridPrior: axes must read positions alone"):
        GridPrior(gates(), gates())
    for parts in (slopes() + T5Prior(H), JoinedPrior(T5Prior(2), slopes())):
        with pytest.raises(NotImplementedError, match="QueryGainPrior: priors beside it must have lanes; got T5Prior"):
            parts.read_tokens(Tokens(x, x))


def test_a_failed_call_leaves_the_cache_as_it_was():
    layer, x = layer_of(gates()), normal(B, 4, E, dtype=torch.float32)
    cache = layer.make_cache(B, 5)
    with torch.no_grad():
        run(layer, x, cache=cache)
        kept = cache.kept.clone()
        with pytest.raises(ValueError, match="leave room in 5 slots"):
            run(layer, x, cache=cache)
    assert cache.length == 4
    assert bool((cache.kept == kept).all())


def test_modules_of_a_stack_each_keep_their_own_sums():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layer_of(gates(seed=n)) for n in range(2))

        def forward(self, x, caches=(None, None)):
            for layer, cache in zip(self.layers, caches, strict=True):
                x = x + run(layer, x, cache=cache)
            return x

    stack, x = Stack(), normal(B, L, E, dtype=torch.float32)
    caches = [layer.make_cache(B, L) for layer in stack.layers]
    with torch.no_grad():
        parts = [stack(x[:, a:b], caches) for a, b in ((0, 20), (20, L))]
        assert_close(torch.cat(parts, 1), stack(x), tolerance=1e-5)
