"""KeyValueCache: keys stored with their lanes give what a call without a cache gives, whatever happens in between."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from attention.oracles import normal
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn.attention import KeyValueCache, PriorAttention, Rotary, prior_attention
from eotattn.attention.observers import observe
from eotattn.kernels import sdpa
from eotattn.priors import RecencyPrior, RelativeBiasPrior, SinkPrior, goat_prior

B, H, HK, D, V, LENGTH = 2, 4, 2, 8, 5, 40
PRIORS = {
    "goat": lambda: off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0)),
    "recency and sink": lambda: RecencyPrior(H) + off_neutral(SinkPrior(H, 2, length_scale=9.0)),
    "multiple": lambda: -0.5 * off_neutral(goat_prior(H, num_frequencies=1)),
    "no lanes": lambda: off_neutral(RelativeBiasPrior(H, 3)),
    "none": lambda: None,
}
#: 16-bit outputs differ by the rounding of the same kernel on other shapes: two units of 2^-9 at size one.
TOLERANCES = {torch.float64: None, torch.float32: None, torch.bfloat16: 1e-2}


def content(length=LENGTH, dtype=torch.float64, batch=B):
    shapes = ((batch, H, length, D), (batch, HK, length, D), (batch, HK, length, V))
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def part(inputs, start, stop):
    return [side[:, :, start:stop] for side in inputs]


def steps(inputs, prior, cache, chunks, *, start=0, **arguments):
    """The outputs of consecutive chunks with the cache, in one tensor."""
    ends = list(itertools.accumulate(chunks, initial=start))
    with torch.no_grad():
        outputs = [
            prior_attention(*part(inputs, *span), prior=prior, is_causal=True, cache=cache, **arguments)
            for span in itertools.pairwise(ends)
        ]
    return torch.cat(outputs, dim=2)


def cache_for(prior, dtype=torch.float64, length=LENGTH, batch=B):
    return KeyValueCache(batch, HK, length, D, V, prior=prior, dtype=dtype)


@pytest.fixture
def lanes_made(monkeypatch):
    """Counts the calls in which lanes are made from positions."""
    from eotattn.priors import LogPrior

    calls, lanes = [], LogPrior.lanes

    def counted(self, *arguments, **named):
        calls.append(arguments[1].shape[-1])
        return lanes(self, *arguments, **named)

    monkeypatch.setattr(LogPrior, "lanes", counted)
    return calls


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [25, 1, 1, 13], [7, 33]])
@pytest.mark.parametrize("name", PRIORS)
def test_steps_are_the_full_pass(name, chunks, dtype):
    prior, inputs = PRIORS[name](), content(dtype=dtype)
    with torch.no_grad():
        expected = prior_attention(*inputs, prior=prior, is_causal=True)
    assert_close(steps(inputs, prior, cache_for(prior, dtype), chunks), expected, tolerance=TOLERANCES[dtype])


def test_a_step_makes_no_lanes(lanes_made):
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [8])
    lanes_made.clear()
    steps(inputs, prior, cache, [1] * 20, start=8)
    assert lanes_made == []


def test_lanes_beyond_those_made_ahead():
    length, prior = 2 * 256 + 9, PRIORS["goat"]()
    inputs = content(length, batch=1)
    expected = prior_attention(*inputs, prior=prior, is_causal=True)
    chunks = [5, *[1] * (256 + 30), 2, 256 - 28]
    assert sum(chunks) == length
    assert_close(steps(inputs, prior, cache_for(prior, length=length, batch=1), chunks), expected)


@pytest.mark.parametrize("name", ["goat", "none", "no lanes"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_samples_continue_as_if_alone(name, side):
    prior, inputs = PRIORS[name](), content()
    real = {"left": slice(4, 10), "right": slice(0, 6), "middle": slice(0, 6)}[side]
    padding = torch.zeros(B, 10, dtype=torch.bool)
    padding[1] = True
    padding[1, real] = False
    cache, lead = cache_for(prior), 3 if side == "middle" else 0
    first = [steps(inputs, prior, cache, [lead])] if lead else []
    inner = padding[:, lead:]
    first.append(steps(inputs, prior, cache, [10 - lead], start=lead, key_padding_mask=inner))
    later = steps(inputs, prior, cache, [1] * 10 + [5], start=10)
    kept = [torch.cat([x[1:, :, real], x[1:, :, 10:25]], dim=2) for x in inputs]
    expected = prior_attention(*kept, prior=prior, is_causal=True, backend="reference")
    assert_close(torch.cat(first, dim=2)[1:, :, real], expected[:, :, :6])
    assert_close(later[1:], expected[:, :, 6:])
    whole = prior_attention(*part(inputs, 0, 25), prior=prior, is_causal=True, backend="reference")
    assert_close(torch.cat([*first, later], dim=2)[:1], whole[:1])
    assert cache.lengths.tolist() == [25, 21]


@pytest.mark.parametrize("padded", [False, True])
def test_crop_and_go_on_differently(padded):
    prior, inputs, other = PRIORS["goat"](), content(), [side.flip(2) for side in content()]
    padding = torch.zeros(B, 10, dtype=torch.bool)
    padding[1, 6:] = padded
    cache = cache_for(prior)
    steps(inputs, prior, cache, [10], **({"key_padding_mask": padding} if padded else {}))
    steps(inputs, prior, cache, [1, 1, 4], start=10)
    cache.crop(8)
    output = steps(other, prior, cache, [1] * 6, start=20)
    real = slice(0, 6 if padded else 8)
    kept = [torch.cat([x[1:, :, real], y[1:, :, 20:26]], dim=2) for x, y in zip(inputs, other, strict=True)]
    expected = prior_attention(*kept, prior=prior, is_causal=True, backend="reference")
    assert_close(output[1:], expected[:, :, real.stop :])


@pytest.mark.parametrize("padded", [False, True])
def test_reorder_follows_the_beams(padded):
    prior, inputs = PRIORS["goat"](), content()
    padding = torch.zeros(B, 10, dtype=torch.bool)
    padding[1, :4] = padded
    cache, samples = cache_for(prior), torch.tensor([1, 1])
    steps(inputs, prior, cache, [10], **({"key_padding_mask": padding} if padded else {}))
    steps(inputs, prior, cache, [1], start=10)
    cache.reorder(samples)
    output = steps(inputs, prior, cache, [1] * 5, start=11)
    real = slice(4 if padded else 0, 11)
    for sample in range(B):
        kept = [
            torch.cat([x[1:, :, real], x[sample : sample + 1, :, 11:16]], dim=2) for x in inputs
        ]  # the past of sample 1, the present of its own
        expected = prior_attention(*kept, prior=prior, is_causal=True, backend="reference")
        assert_close(output[sample : sample + 1], expected[:, :, -5:])


def change(prior):
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1.5).add_(0.1)


@pytest.mark.parametrize("how", ["written", "loaded", "replaced"])
def test_lanes_follow_the_parameters(how):
    """Every step attends with the prior as it is then, to old keys too: u(j) is stored and would be stale."""
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [10, 1])
    if how == "written":
        change(prior)
    else:
        other = copy.deepcopy(prior)
        change(other)
        prior.load_state_dict(other.state_dict(), assign=how == "replaced")
    output = steps(inputs, prior, cache, [1, 3], start=11)
    expected = prior_attention(*part(inputs, 0, 15), prior=prior, is_causal=True, backend="reference")
    assert_close(output, expected[:, :, 11:])
    stale = prior_attention(*part(inputs, 0, 15), prior=PRIORS["goat"](), is_causal=True, backend="reference")
    assert (stale[:, :, 11:] - output).abs().max() > 1e-2, "the change must matter, or this test says nothing"


def test_another_prior_or_scale_is_served_without_the_stored_lanes():
    prior, other, inputs = PRIORS["goat"](), PRIORS["recency and sink"](), content()
    expected = prior_attention(*inputs, prior=other, is_causal=True, backend="reference")
    assert_close(steps(inputs, other, cache_for(prior), [30, 1, 9]), expected)
    expected = prior_attention(*inputs, prior=prior, is_causal=True, scale=0.7, backend="reference")
    assert_close(steps(inputs, prior, cache_for(prior), [30, 1, 9], scale=0.7), expected)
    expected = prior_attention(*inputs, is_causal=True, backend="reference")
    assert_close(steps(inputs, None, cache_for(prior), [30, 1, 9]), expected)


def test_gradients_of_the_prior_reach_it_through_a_step():
    """Stored lanes are constants, so a step that records gradients makes its own."""
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [30])
    output = prior_attention(*part(inputs, 30, LENGTH), prior=prior, is_causal=True, cache=cache)
    whole = prior_attention(*inputs, prior=prior, is_causal=True, backend="reference")[:, :, 30:]
    found, exact = (torch.autograd.grad(result.sum(), list(prior.parameters())) for result in (output, whole))
    for actual, truth in zip(found, exact, strict=True):
        assert_close(actual, truth)


def test_weights_from_a_cache():
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [30])
    with torch.no_grad():
        output, weights = prior_attention(
            *part(inputs, 30, LENGTH), prior=prior, is_causal=True, cache=cache, return_weights=True
        )
    expected, all_weights = prior_attention(*inputs, prior=prior, is_causal=True, return_weights=True)
    assert_close(output, expected[:, :, 30:])
    assert_close(weights, all_weights[:, :, 30:])


def test_a_layer_in_bfloat16():
    """The stored path is as exact as the call without a cache: the same lanes, another order of sums."""
    layer = PriorAttention(
        32, H, num_kv_heads=HK, prior=PRIORS["goat"](), rotary=Rotary(8), dtype=torch.bfloat16, batch_first=True
    )
    x = normal(B, 200, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        full, _ = layer(x, is_causal=True, need_weights=False)
        exact, _ = copy.deepcopy(layer).double()(x.double(), is_causal=True, need_weights=False)
        cache = layer.make_cache(B, 200)
        chunks = x.split([150, *[1] * 50], dim=1)
        parts = [layer(chunk, is_causal=True, need_weights=False, cache=cache)[0] for chunk in chunks]
    stored = torch.cat(parts, dim=1)
    error, usual = ((output.double() - exact).norm() / exact.norm() for output in (stored, full))
    assert error <= 1.2 * usual < 0.1


def test_copies_are_apart():
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [10])
    twin = copy.deepcopy(cache)
    steps([side.flip(2) for side in inputs], prior, twin, [1] * 3, start=10)
    output = steps(inputs, prior, cache, [1] * 3, start=10)
    expected = prior_attention(*part(inputs, 0, 13), prior=prior, is_causal=True, backend="reference")
    assert_close(output, expected[:, :, 10:])


def test_a_copy_still_has_its_lanes(lanes_made):
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [10])
    twin = copy.deepcopy(cache)
    lanes_made.clear()
    steps(inputs, prior, twin, [1] * 3, start=10)
    assert lanes_made == []


def test_a_step_unlike_the_one_before_is_checked_again():
    """What one step was let through with says nothing about a step of other shapes, dtypes or options."""
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [8, 1, 1])
    query, key, value = part(inputs, 10, 11)
    with torch.no_grad():
        for wrong, error in (
            ((query.float(), key, value), "key must have the query's dtype"),
            ((query[:1], key, value), "key must have shape"),
            ((query, key[..., :4], value), "key must have shape"),
            ((query, key, value[:, :1]), "value must have shape"),
        ):
            with pytest.raises(ValueError, match=error):
                prior_attention(*wrong, prior=prior, is_causal=True, cache=cache)
            assert cache.length == 10
        output = prior_attention(query, key, value, prior=prior, is_causal=True, cache=cache, backend="reference")
    expected = prior_attention(*part(inputs, 0, 11), prior=prior, is_causal=True, backend="reference")
    assert_close(output, expected[:, :, 10:])
    assert_close(
        steps(inputs, prior, cache, [1, 1], start=11),
        prior_attention(*part(inputs, 0, 13), prior=prior, is_causal=True, backend="reference")[:, :, 11:],
    )


def test_a_full_cache_takes_no_more_steps():
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior, length=10)
    steps(inputs, prior, cache, [8, 1, 1])
    with pytest.raises(ValueError, match="leave room in 10 slots; got '11 tokens'"):
        steps(inputs, prior, cache, [1], start=10)
    assert cache.length == 10


def test_who_listens_sees_every_step():
    prior, inputs, seen = PRIORS["goat"](), content(), []
    cache = cache_for(prior)
    steps(inputs, prior, cache, [8, 1, 1])
    with observe(lambda call, backend, serve: seen.append(call.key.shape[2]) or serve()):
        steps(inputs, prior, cache, [1, 1, 1], start=10)
    assert seen == [11, 12, 13]
    steps(inputs, prior, cache, [1], start=13)
    assert seen == [11, 12, 13]


def test_a_padded_prompt_needs_no_square_mask(monkeypatch):
    """Slots are in the order of positions, so the kernel's own triangle says all, and padding is a lane."""
    prior, inputs, masks = PRIORS["goat"](), content(), []
    padding = torch.zeros(B, LENGTH, dtype=torch.bool)
    padding[1, :7] = True
    attend = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda *a, **named: masks.append(named["mask"]) or attend(*a, **named))
    output = steps(inputs, prior, cache_for(prior), [LENGTH], key_padding_mask=padding)
    assert masks == [None]
    alone = [side[1:, :, 7:] for side in inputs]
    expected = prior_attention(*alone, prior=prior, is_causal=True, backend="reference")
    assert_close(output[1:, :, 7:], expected)
    assert not output[1, :, :7].any()


WRONG_CALLS = {
    "prior of other heads": ({"prior": RecencyPrior(3)}, ValueError),
    "mask of the new keys alone": ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError),
    "scale": ({"scale": -1.0}, ValueError),
    "window": ({"window": 0}, ValueError),
    "dropout": ({"dropout_p": 1.0}, ValueError),
    "backend without lanes": ({"prior": RelativeBiasPrior(H, 3), "backend": "sdpa"}, NotImplementedError),
    "backend of a GPU": ({"backend": "flex"}, NotImplementedError),
    "padding in numbers": ({"key_padding_mask": torch.zeros(B, 3, dtype=torch.int64)}, TypeError),
    "padding of all keys": ({"key_padding_mask": torch.zeros(B, 13, dtype=torch.bool)}, ValueError),
    "padding elsewhere": ({"key_padding_mask": torch.zeros(B, 3, dtype=torch.bool, device="meta")}, ValueError),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_call_that_fails_leaves_the_cache_as_it_was(name):
    arguments, error = WRONG_CALLS[name]
    prior, inputs = PRIORS["goat"](), content()
    cache = cache_for(prior)
    steps(inputs, prior, cache, [10])
    with pytest.raises(error, match=r"must|cannot serve"):
        prior_attention(*part(inputs, 10, 13), **{"prior": prior, "is_causal": True, "cache": cache, **arguments})
    assert cache.length == 10
    assert isinstance(cache.positions, range)
    expected = prior_attention(*part(inputs, 0, 13), prior=prior, is_causal=True, backend="reference")
    assert_close(steps(inputs, prior, cache, [3], start=10), expected[:, :, 10:])


@pytest.mark.parametrize("made_in", [True, False])
def test_a_cache_outlives_inference_mode(made_in):
    """Neither making a cache nor a padded prompt, which widens it, binds later steps to inference mode."""
    prior, inputs = PRIORS["goat"](), content()
    padding = torch.zeros(B, 10, dtype=torch.bool)
    padding[1, :4] = True
    with torch.inference_mode(made_in):
        cache = cache_for(prior)
    with torch.inference_mode():
        steps(inputs, prior, cache, [10], key_padding_mask=padding)
    output = steps(inputs, prior, cache, [1, 2], start=10)
    alone = [side[1:, :, 4:13] for side in inputs]
    expected = prior_attention(*alone, prior=prior, is_causal=True, backend="reference")
    assert_close(output[1:], expected[:, :, 6:])


@pytest.mark.parametrize("name", ["goat", "no lanes", "none"])
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_steps_share_graphs_whatever_the_length(name, window):
    torch._dynamo.reset()
    prior, inputs, graphs = PRIORS[name](), content(16), torch._dynamo.testing.CompileCounterWithBackend("eager")
    cache, arguments = cache_for(prior), {"prior": prior, "is_causal": True, "window": window}
    compiled = torch.compile(
        lambda *new: prior_attention(*new, cache=cache, **arguments), fullgraph=True, backend=graphs
    )
    with torch.no_grad():
        expected = prior_attention(*inputs, **arguments)
        prior_attention(*part(inputs, 0, 4), cache=cache, **arguments)
        outputs = [compiled(*part(inputs, t, t + 1)) for t in range(4, 16)]
    assert_close(torch.cat(outputs, dim=2), expected[:, :, 4:])
    assert graphs.frame_count <= 3
