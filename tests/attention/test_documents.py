"""Packed documents: each as if it were alone."""

import pytest
import torch
from attention.oracles import attention, normal
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn.attention import PackedDocuments, PriorAttention, Rotary, prior_attention
from eotattn.priors import RelativeBiasPrior, goat_prior

B, H, HK, L, D, V = 2, 6, 3, 41, 8, 5
LENGTHS = (20, 1, 20, 10, 31)


def goat():
    return off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0))


def content():
    shapes = ((B, H, L, D), (B, HK, L, D), (B, HK, L, V))
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def one_by_one():
    """(sample, tokens) of every document, as an index into (B, H, L, D)."""
    start = 0
    for length in LENGTHS:
        sample, first = divmod(start, L)
        yield slice(sample, sample + 1), slice(None), slice(first, first + length)
        start += length


def oracle(inputs, prior, *, is_causal, window):
    """Every document through the float64 rewrite, on its own."""
    output = torch.zeros(B, H, L, V, dtype=torch.float64)
    for place in one_by_one():
        at = torch.arange(place[2].stop - place[2].start)
        lag = at[:, None] - at
        allowed = lag < (window or L) if not is_causal else (lag >= 0) & (lag < (window or L))
        log_prior = None if prior is None else prior.dense(at, at, dtype=torch.float64)
        output[place] = attention(*(side[place] for side in inputs), log_prior=log_prior, allowed=allowed)[0]
    return output


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (False, None), (True, 7)])
@pytest.mark.parametrize("with_prior", [True, False])
def test_each_document_as_if_it_were_alone(with_prior, is_causal, window, backend):
    prior, inputs = goat() if with_prior else None, [tensor.requires_grad_() for tensor in content()]
    expected = oracle(inputs, prior, is_causal=is_causal, window=window)
    pattern = {"is_causal": is_causal, "window": window, "documents": PackedDocuments(LENGTHS)}
    output = prior_attention(*inputs, prior=prior, backend=backend, **pattern)
    assert_close(output, expected)
    wanted = [*inputs, *(prior.parameters() if with_prior else ())]
    upstream = normal(B, H, L, V, seed=9)
    found, exact = (torch.autograd.grad(result, wanted, upstream) for result in (output, expected))
    for actual, truth in zip(found, exact, strict=True):
        assert_close(actual, truth)


def test_a_prior_without_lanes():
    prior, inputs = off_neutral(RelativeBiasPrior(H, 3)), content()
    output = prior_attention(*inputs, prior=prior, is_causal=True, documents=PackedDocuments(LENGTHS))
    assert_close(output, oracle(inputs, prior, is_causal=True, window=None))


def test_a_mask_beside_documents():
    inputs, ids = content(), PackedDocuments(LENGTHS).ids(B, L, torch.device("cpu"))
    mask = normal(L, L, seed=5) > 0
    allowed = (ids[:, None, :, None] == ids[:, None, None, :]) & mask
    expected, _ = attention(*inputs, allowed=allowed)
    assert_close(prior_attention(*inputs, attn_mask=mask, documents=PackedDocuments(LENGTHS)), expected)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "floating", "by head"])
def test_queries_of_a_document_without_keys_get_zeros(kind, is_causal, window):
    if window is not None and not is_causal:
        pytest.skip("a window is causal")
    inputs, ids = content(), torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).view(B, 1, 1, L)
    seen = ((ids != 0) & (ids != 3) & (torch.arange(L) % 5 != 1))[:1]  # also where the other sample has other documents
    seen = torch.cat([seen, ids[1:] != 3])
    if kind == "by head":
        seen = seen | (torch.arange(H)[:, None, None] % 2 == 0)
    mask = seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    lag = torch.arange(L)[:, None] - torch.arange(L)
    allowed = (ids.mT == ids) & seen
    if is_causal:
        allowed = allowed & (lag >= 0) & (lag < (window or L))
    documents = PackedDocuments(LENGTHS)
    given = {"documents": documents, "attn_mask": mask, "is_causal": is_causal, "window": window}
    expected, _ = attention(*inputs, allowed=allowed)
    for backend in ("sdpa", "reference"):
        assert_close(prior_attention(*inputs, **given, backend=backend), expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_layer_with_rotary_content(need_weights):
    """Positions start again for the rotation too."""
    layer = PriorAttention(
        24, H, num_kv_heads=HK, prior=goat(), rotary=Rotary(4), dtype=torch.float64, batch_first=True
    )
    x = normal(B, L, 24)
    output, weights = layer(x, is_causal=True, need_weights=need_weights, documents=PackedDocuments(LENGTHS))
    for sample, _, tokens in one_by_one():
        alone, alone_weights = layer(x[sample, tokens], is_causal=True, need_weights=need_weights)
        assert_close(output[sample, tokens], alone)
        if need_weights:
            assert_close(weights[sample, tokens, tokens], alone_weights)


def test_ids_say_what_lengths_say():
    ids = torch.tensor([[4, 4, 4, 0, 0], [0, 2, 2, 2, 2]])
    documents = PackedDocuments.from_ids(ids)
    assert documents.lengths == (3, 2, 1, 4)
    assert documents.longest == 4
    device = torch.device("cpu")
    assert documents.offsets(device).tolist() == [0, 3, 5, 6, 10]
    assert documents.offsets(device).dtype == torch.int32
    assert documents.positions(2, 5, device).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert PackedDocuments.from_ids(torch.tensor([1, 1, 5])).lengths == (2, 1)
    assert documents.mask(2, 5, device)[0, 0].equal(ids[0][:, None] == ids[0])


def test_tensors_made_in_inference_mode_serve_training():
    documents, inputs = PackedDocuments(LENGTHS), content()
    with torch.inference_mode():
        expected = prior_attention(*inputs, prior=goat(), is_causal=True, documents=documents)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = prior_attention(*inputs, prior=goat(), is_causal=True, documents=documents)
    output.sum().backward()
    assert_close(output, expected)
