"""prior_attention: every backend against the reference, and the reference against an independent rewrite."""

import math

import pytest
import torch
from attention.oracles import attention, causal, normal
from priors.cases import off_neutral
from tolerances import assert_close, relative_error

from eotattn.attention import prior_attention
from eotattn.priors import (
    DensePrior,
    FourierPrior,
    GridPrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    goat_prior,
    grid_positions,
)

B, H, Q, K, D, V = 2, 6, 5, 7, 8, 4
BACKENDS = ["sdpa", "reference"]
DTYPES = [torch.float64, torch.float32]


def content(kv_heads=H, *, queries=Q, keys=K, dtype=torch.float64, width=D, value_width=V):
    return (
        normal(B, H, queries, width, dtype=dtype),
        normal(B, kv_heads, keys, width, seed=1, dtype=dtype),
        normal(B, kv_heads, keys, value_width, seed=2, dtype=dtype),
    )


def goat(seed=0):
    return off_neutral(goat_prior(H, num_frequencies=3, length_scale=20.0), seed=seed)


def dense(prior, queries, keys):
    return prior.dense(queries, keys, dtype=torch.float64).detach()


# Against the definition ---------------------------------------------------------------------------------------------

PRIORS = {
    "none": lambda: None,
    "goat": goat,
    "recency": lambda: RecencyPrior(H),
    "fourier": lambda: off_neutral(FourierPrior(H, 3, 4.0, 30.0)),
    "sink": lambda: off_neutral(SinkPrior(H, 2, length_scale=9.0)),
    "multiple": lambda: -0.5 * goat(),
    "table": lambda: off_neutral(RelativeBiasPrior(H, 3)),
    "given": lambda: DensePrior(normal(H, 9, 9)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("name", PRIORS)
def test_output(name, kv_heads, backend, dtype):
    prior = PRIORS[name]()
    if prior is not None and not prior.has_lanes and backend == "sdpa":
        pytest.skip("no lanes; its refusal is among the bad inputs")
    inputs = content(kv_heads, dtype=dtype)
    log_prior = None if prior is None else dense(prior, torch.arange(Q), torch.arange(K))
    expected, expected_weights = attention(*inputs, log_prior=log_prior)
    assert_close(prior_attention(*inputs, prior=prior, backend=backend), expected.to(dtype))
    if backend == "reference":
        output, weights = prior_attention(*inputs, prior=prior, return_weights=True)
        assert_close(output, expected)
        assert_close(weights, expected_weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.05, 1.0, 3.0])
def test_scale_touches_the_content_and_never_the_prior(backend, scale):
    inputs, prior = content(), goat()
    log_prior = dense(prior, torch.arange(Q), torch.arange(K))
    expected, _ = attention(*inputs, log_prior=log_prior, scale=scale)
    assert_close(prior_attention(*inputs, prior=prior, scale=scale, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (3, 9), (9, 3), (24, 24)])
def test_widths(backend, width, value_width):
    inputs, prior = content(3, width=width, value_width=value_width), goat()
    expected, _ = attention(*inputs, log_prior=dense(prior, torch.arange(Q), torch.arange(K)))
    assert_close(prior_attention(*inputs, prior=prior, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_constant_changes_nothing(backend):
    prior, inputs = RecencyPrior(H), content()
    expected = prior_attention(*inputs, prior=prior, backend=backend)
    shifted = prior_attention(*inputs, prior=prior, query_positions=torch.arange(Q) + 40, backend=backend)
    assert_close(shifted, expected)  # to this prior an offset of the queries is a constant of each row
    bias = normal(B, H, Q, 1)
    assert_close(prior_attention(*inputs, prior=prior, attn_mask=bias, backend=backend), expected)


def test_auto_takes_lanes_where_there_are_some():
    """It chooses by what can serve, and gives exactly what the backend that it chose gives."""
    inputs = content(dtype=torch.float32)
    lanes, table = goat(), off_neutral(RelativeBiasPrior(H, 3))
    assert torch.equal(prior_attention(*inputs, prior=lanes), prior_attention(*inputs, prior=lanes, backend="sdpa"))
    by_name = prior_attention(*inputs, prior=table, backend="near_far")
    assert torch.equal(prior_attention(*inputs, prior=table), by_name)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grids(backend, class_token):
    prior = GridPrior(off_neutral(FourierPrior(H, 2, 4.0, 9.0)), RecencyPrior(H))
    cells = grid_positions(2, 3, class_token=class_token)
    inputs = content(3, queries=len(cells), keys=len(cells))
    expected, _ = attention(*inputs, log_prior=dense(prior, cells, cells))
    positions = {"query_positions": cells, "key_positions": cells}
    assert_close(prior_attention(*inputs, prior=prior, backend=backend, **positions), expected)


# Positions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_explicit_positions(backend, is_causal):
    prior, inputs = goat(), content(2)
    queries, keys = torch.tensor([9, 2, 4, 0, 7]), torch.tensor([3, 0, 8, 1, 9, 5, 2])
    allowed = causal(queries, keys) if is_causal else None
    expected, _ = attention(*inputs, log_prior=dense(prior, queries, keys), allowed=allowed)
    positions = {"query_positions": queries, "key_positions": keys}
    assert_close(prior_attention(*inputs, prior=prior, is_causal=is_causal, backend=backend, **positions), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16])
def test_differences_of_narrow_positions_neither_wrap_nor_round(dtype, window, backend):
    numbers = {torch.uint8: (255, 200, 0), torch.int8: (127, 100, -128)}.get(dtype, (9728, 0, -9984))
    inputs, queries = content(), torch.tensor([*numbers, 3, 7]).to(dtype)
    keys = torch.tensor([3, 0, 8, 1, *numbers]).to(dtype)
    lag = queries.long()[:, None] - keys.long()
    allowed = (lag >= 0) if window is None else (lag >= 0) & (lag < window)
    expected, _ = attention(*inputs, allowed=allowed)
    positions = {"query_positions": queries, "key_positions": keys}
    assert_close(prior_attention(*inputs, is_causal=True, window=window, backend=backend, **positions), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_positions_can_be_mapped_over(dtype):
    prior, inputs = goat(), content(queries=K, keys=K)
    rows = (torch.arange(K) + torch.tensor([[0], [40]])).to(dtype)

    def attend(query, key, value, positions):
        at = {"query_positions": positions, "key_positions": positions}
        return prior_attention(query[None], key[None], value[None], prior=prior, is_causal=True, **at)[0]

    expected = torch.stack([attend(*one) for one in zip(*inputs, rows, strict=True)])
    assert_close(torch.func.vmap(attend)(*inputs, rows), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_outweighs_any_prior(dtype):
    """Keys far ahead of the queries have log-priors of a hundred thousand nats, which padding has to undo."""
    prior, inputs = RecencyPrior(H), content(dtype=dtype)
    keys, padding = torch.tensor([3, 900_000, 2, 800_000, 1, 7, 5]), torch.zeros(B, K, dtype=torch.bool)
    padding[:, [1, 3]] = True
    kept = ~padding[0]
    output = prior_attention(*inputs, prior=prior, key_positions=keys, key_padding_mask=padding, backend="sdpa")
    alone = inputs[0], *(side[:, :, kept] for side in inputs[1:])
    assert_close(output, prior_attention(*alone, prior=prior, key_positions=keys[kept], backend="sdpa"))
    inputs = [side.requires_grad_() for side in inputs]
    padding[1] = True
    output = prior_attention(*inputs, prior=prior, key_positions=keys, key_padding_mask=padding, backend="sdpa")
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_every_sample(backend):
    prior, inputs = goat(), content(2)
    queries = torch.stack([torch.arange(Q), torch.arange(Q) + 11])
    keys = torch.stack([torch.arange(K), torch.arange(K).flip(0) + 5])
    output = prior_attention(
        *inputs, prior=prior, query_positions=queries, key_positions=keys, is_causal=True, backend=backend
    )
    for b in range(B):
        one = [x[b : b + 1] for x in inputs]
        log_prior = dense(prior, queries[b], keys[b])
        expected, _ = attention(*one, log_prior=log_prior, allowed=causal(queries[b], keys[b]))
        assert_close(output[b : b + 1], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("first_query", "first_key"), [(0, 0), (3, 0), (2, 0), (7, 3), (1, 4), (20, 5)])
def test_a_range_says_what_a_tensor_says(backend, is_causal, first_query, first_key):
    prior, inputs = goat(), content()
    spans = range(first_query, first_query + Q), range(first_key, first_key + K)
    tensors = torch.arange(first_query, first_query + Q), torch.arange(first_key, first_key + K)
    shared = {"prior": prior, "is_causal": is_causal, "backend": backend}
    by_range = prior_attention(*inputs, query_positions=spans[0], key_positions=spans[1], **shared)
    by_tensor = prior_attention(*inputs, query_positions=tensors[0], key_positions=tensors[1], **shared)
    allowed = causal(*tensors) if is_causal else None
    expected, _ = attention(*inputs, log_prior=dense(prior, *tensors), allowed=allowed)
    assert_close(by_range, expected)
    assert_close(by_tensor, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("first_query", "first_key"), [(4, 0), (0, 4), (3, 3)])
def test_equal_lengths_at_unequal_starts_are_no_triangle(backend, first_query, first_key):
    prior, inputs = goat(), content(queries=K, keys=K)
    spans = range(first_query, first_query + K), range(first_key, first_key + K)
    output = prior_attention(
        *inputs, prior=prior, query_positions=spans[0], key_positions=spans[1], is_causal=True, backend=backend
    )
    tensors = torch.arange(spans[0].start, spans[0].stop), torch.arange(spans[1].start, spans[1].stop)
    expected, _ = attention(*inputs, log_prior=dense(prior, *tensors), allowed=causal(*tensors))
    assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_prior", [False, True])
def test_left_padding_under_the_causal_triangle_leaves_its_rows_empty(backend, with_prior):
    prior, (query, key, value) = goat() if with_prior else None, content(queries=K, keys=K)
    padding = torch.zeros(query.shape[0], K, dtype=torch.bool)
    padding[0, :3] = True
    output = prior_attention(query, key, value, prior=prior, key_padding_mask=padding, is_causal=True, backend=backend)
    assert torch.equal(output[0, :, :3], torch.zeros_like(output[0, :, :3]))
    positions = torch.arange(K)
    log_prior = None if prior is None else dense(prior, positions, positions)
    allowed = causal(positions, positions) & ~padding[:, None, None, :]
    expected, _ = attention(query, key, value, log_prior=log_prior, allowed=allowed)
    assert_close(output[0, :, 3:], expected[0, :, 3:])
    assert_close(output[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("as_range", [True, False])
def test_decoding_in_chunks_is_the_full_pass(backend, chunk, as_range):
    """Step by step (chunk 1) or in longer chunks of the prompt, each with all keys up to its end."""
    length, prior = 11, goat()
    query, key, value = content(2, queries=length, keys=length)
    whole = prior_attention(query, key, value, prior=prior, is_causal=True, backend=backend)
    parts = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        positions = range(start, end) if as_range else torch.arange(start, end)
        seen = slice(None), slice(None), slice(end)
        parts.append(
            prior_attention(
                query[:, :, start:end],
                key[seen],
                value[seen],
                prior=prior,
                query_positions=positions,
                is_causal=True,
                backend=backend,
            )
        )
    assert_close(torch.cat(parts, dim=2), whole)


# Masks --------------------------------------------------------------------------------------------------------------

MASK_SHAPES = [(Q, K), (1, K), (Q, 1), (H, Q, K), (H, 1, K), (B, 1, Q, K), (B, H, 1, K), (B, H, Q, K), (K,), ()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "floating", "none"])
def test_masks_combine(backend, kind, is_padded, is_causal):
    prior, inputs = goat(), content(3)
    allowed = torch.ones(B, H, Q, K, dtype=torch.bool)
    log_prior = dense(prior, torch.arange(Q), torch.arange(K)).expand(B, H, Q, K)
    arguments = {"is_causal": is_causal}
    if kind == "boolean":
        arguments["attn_mask"] = mask = normal(B, 1, Q, K, seed=5) > -0.7
        allowed = allowed & mask
    elif kind == "floating":
        arguments["attn_mask"] = bias = normal(H, Q, K, seed=5).masked_fill(normal(H, Q, K, seed=6) > 1, -math.inf)
        log_prior = log_prior + bias
    if is_padded:
        padding = torch.tensor([[False] * 5 + [True] * 2, [True] * 2 + [False] * 5])
        arguments["key_padding_mask"] = padding
        allowed = allowed & ~padding[:, None, None]
    if is_causal:
        allowed = allowed & causal(torch.arange(Q), torch.arange(K))
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=allowed)
    assert_close(prior_attention(*inputs, prior=prior, backend=backend, **arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_broadcast(backend, shape):
    prior, inputs = goat(), content(3)
    log_prior = dense(prior, torch.arange(Q), torch.arange(K))
    mask, bias = normal(*shape, seed=5) > -0.7, 3 * normal(*shape, seed=6)
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=mask.expand(B, H, Q, K))
    assert_close(prior_attention(*inputs, prior=prior, attn_mask=mask, backend=backend), expected)
    expected, _ = attention(*inputs, log_prior=log_prior + bias)
    assert_close(prior_attention(*inputs, prior=prior, attn_mask=bias, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_bias", [False, True])
def test_the_same_causal_mask_as_a_tensor_keeps_the_prior(backend, as_bias):
    """However causality is said, the recency prior stays."""
    prior, inputs = goat(), content(queries=K)
    seen = torch.ones(K, K, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, -math.inf).double() if as_bias else seen
    by_flag = prior_attention(*inputs, prior=prior, is_causal=True, backend=backend)
    assert_close(prior_attention(*inputs, prior=prior, attn_mask=mask, backend=backend), by_flag)
    without = prior_attention(*inputs, is_causal=True, backend=backend)
    assert relative_error(without, by_flag) > 0.05, "the prior must matter, or this test says nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_cannot_matter(backend):
    prior, (query, key, value) = goat(), content()
    arguments = {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 3] * 2), "prior": prior, "backend": backend}
    expected = prior_attention(query, key, value, **arguments)
    key[:, :, 4:], value[:, :, 4:] = 50.0, -70.0
    assert_close(prior_attention(query, key, value, **arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["boolean", "floating", "padding", "padding and causal", "causal positions"])
def test_rows_without_admissible_keys(backend, dtype, how):
    """Output, weights and gradients are zero there, finite everywhere, and other rows are what they were."""
    prior, inputs = RecencyPrior(H), [x.requires_grad_() for x in content(3, dtype=dtype)]
    empty = torch.zeros(B, Q, dtype=torch.bool)
    allowed = torch.ones(B, 1, Q, K, dtype=torch.bool)
    arguments = {}
    queries, keys = torch.arange(Q), torch.arange(K)
    if how in ("boolean", "floating"):
        empty[0, 3] = empty[1] = True
        allowed = allowed & ~empty[:, None, :, None]
        arguments["attn_mask"] = allowed if how == "boolean" else torch.where(allowed, 0.0, -math.inf)
    elif how == "causal positions":
        queries = torch.tensor([4, 1, 3, 2, 9])
        keys = keys + 3
        arguments = {"is_causal": True, "query_positions": queries, "key_positions": keys}
        empty[:, [1, 3]] = True
        allowed = causal(queries, keys).expand(B, 1, Q, K)
    else:
        padding = torch.tensor([[True] * 2 + [False] * 5, [True] * 7])
        arguments["key_padding_mask"] = padding
        empty[1] = True
        allowed = (~padding)[:, None, None].expand(B, 1, Q, K)
        if "causal" in how:
            arguments["is_causal"] = True
            empty[0, :2] = True
            allowed = allowed & causal(queries, keys)
    arguments |= {"prior": prior, "backend": backend}
    expected, expected_weights = attention(*inputs, log_prior=dense(prior, queries, keys), allowed=allowed)
    output = prior_attention(*inputs, **arguments)
    assert_close(output, expected)
    assert not output.transpose(1, 2)[empty].any()
    if backend == "reference":
        _, weights = prior_attention(*inputs, return_weights=True, **arguments)
        assert_close(weights, expected_weights)
        assert not weights.transpose(1, 2)[empty].any()
    gradients = torch.autograd.grad(output.double().square().sum(), [*inputs, prior.strength])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0].transpose(1, 2)[empty].any()
    if empty[1].all():
        assert not gradients[1][1].any()
        assert not gradients[2][1].any()
    truth = torch.autograd.grad(expected.square().sum(), inputs)
    # 16-bit kernels round the weights and their gradient before the second product: a few units of 2^-8
    wider = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype)
    for gradient, exact in zip(gradients, truth, strict=False):
        assert_close(gradient, exact, tolerance=wider)


# Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_gradients_of_content_and_prior(backend, kv_heads):
    prior, inputs = goat(), [x.requires_grad_() for x in content(kv_heads)]
    names = [name for name, _ in prior.named_parameters()]
    parameters = list(prior.parameters())
    weight = normal(B, H, Q, V, seed=7)
    output = prior_attention(*inputs, prior=prior, is_causal=True, backend=backend)
    gradients = torch.autograd.grad((weight * output).sum(), [*inputs, *parameters])
    log_prior = prior.dense(torch.arange(Q), torch.arange(K), dtype=torch.float64)
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=causal(torch.arange(Q), torch.arange(K)))
    truth = torch.autograd.grad((weight * expected).sum(), [*inputs, *parameters])
    for name, gradient, exact in zip(["query", "key", "value", *names], gradients, truth, strict=True):
        assert gradient.abs().max() > 1e-6, name
        assert_close(gradient, exact)  # parameters are float32, so are their gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epsilon", [1.0, 0.25, 4.0])
def test_the_gradient_is_the_advantage(backend, epsilon):
    """dL/ds_ij = p_ij (u_ij - sum_k p_ik u_ik) / epsilon with u_ij = <dL/do_i, v_j>: a policy gradient.

    The score s reaches the kernel as a query times unit keys, so its gradient is the gradient of the query.
    """
    score = normal(B, H, Q, K).requires_grad_()
    key = torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    value, weight, prior = normal(B, H, K, V, seed=2), normal(B, H, Q, V, seed=3), goat()
    output = prior_attention(score, key, value, prior=prior, scale=1 / epsilon, backend=backend)
    (gradient,) = torch.autograd.grad((weight * output).sum(), score)
    log_prior = dense(prior, torch.arange(Q), torch.arange(K))
    _, policy = attention(score.detach(), key, value, log_prior=log_prior, scale=1 / epsilon)
    reward = torch.einsum("bhqv,bhkv->bhqk", weight, value)
    baseline = (policy * reward).sum(-1, keepdim=True)
    assert_close(gradient, policy * (reward - baseline) / epsilon)


# Low precision and autocast -----------------------------------------------------------------------------------------


def long_content(dtype=torch.float64, length=1024):
    return tuple(normal(1, 3, length, 16, seed=s).to(dtype) for s in range(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lambda: RecencyPrior(3), lambda: off_neutral(goat_prior(3, length_scale=300.0))])
def test_bfloat16_with_a_prior_is_as_good_as_without(backend, make):
    rounded = long_content(torch.bfloat16)
    exact_content = [x.double() for x in rounded]
    seen = causal(torch.arange(1024), torch.arange(1024))
    plain_truth, _ = attention(*exact_content, allowed=seen)
    plain = prior_attention(*rounded, is_causal=True, backend=backend)
    prior = make()
    log_prior = dense(prior, torch.arange(1024), torch.arange(1024))
    truth, _ = attention(*exact_content, log_prior=log_prior, allowed=seen)
    output = prior_attention(*rounded, prior=prior, is_causal=True, backend=backend)
    error, plain_error = ((a.double() - b).norm() / b.norm() for a, b in ((output, truth), (plain, plain_truth)))
    assert error <= 1.5 * plain_error
    assert error <= 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_prior(backend, dtype):
    """Autocast narrows the arguments of a fused call; lanes written before that would lose the positions."""
    prior, inputs = RecencyPrior(3), long_content(dtype)
    log_prior = dense(prior, torch.arange(1024), torch.arange(1024))
    seen = causal(torch.arange(1024), torch.arange(1024))
    truth, _ = attention(*[x.bfloat16() for x in inputs], log_prior=log_prior, allowed=seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = prior_attention(*inputs, prior=prior, is_causal=True, backend=backend)
    assert output.dtype == torch.bfloat16
    by_hand = prior_attention(*[x.bfloat16() for x in inputs], prior=prior, is_causal=True, backend=backend)
    assert torch.equal(output, by_hand)  # also inside the reference, whose products stay in float32
    assert (output.double() - truth).norm() / truth.norm() <= 5e-3


def test_autocast_leaves_float64_alone():
    prior, inputs = goat(), content()
    expected = prior_attention(*inputs, prior=prior)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior_attention(*inputs, prior=prior), expected)


@pytest.mark.parametrize("position", [131_072, 1_000_000])
def test_float16_and_bfloat16_are_finite_far_out(position):
    prior = off_neutral(goat_prior(H))
    for dtype in (torch.float16, torch.bfloat16):
        output = prior_attention(
            *content(3, dtype=dtype),
            prior=prior,
            query_positions=range(position, position + Q),
            key_positions=range(position - 2, position - 2 + K),
            is_causal=True,
        )
        assert output.isfinite().all()


# Dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_the_stated_share_and_keeps_the_mean(backend):
    """With unit values the output of a row is the sum of the kept weights over 0.7."""
    prior, (query, key, _) = RecencyPrior(H), content(queries=200, keys=200, dtype=torch.float32)
    value = torch.ones(B, H, 200, V)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = prior_attention(query, key, value, prior=prior, dropout_p=0.3, backend=backend)
        again = prior_attention(query, key, value, prior=prior, dropout_p=0.3, backend=backend)
    _, weights = prior_attention(query, key, value, prior=prior, return_weights=True)
    assert not torch.equal(output, again)
    spread = (0.3 / 0.7 * weights.square().sum(-1)).mean().sqrt()
    rows = output[..., 0]
    assert abs(rows.mean() - 1) < 4 * spread / math.sqrt(rows.numel())
    assert abs(((rows - 1).square().mean()).sqrt() / spread - 1) < 0.1
    torch.testing.assert_close(prior_attention(query, key, value, prior=prior, backend=backend), value)
