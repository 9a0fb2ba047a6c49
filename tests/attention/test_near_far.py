"""Near and far keys apart: against dense float64 softmax with the prior in full; memory; long context; what it refuses.

Legend: B batch, H query heads, L tokens, D width.
"""

import pytest
import torch
from priors.cases import off_neutral
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from eotattn import PriorAttention, prior_attention
from eotattn.attention import PackedDocuments, explain
from eotattn.kernels import near
from eotattn.priors import (
    AlibiPrior,
    DensePrior,
    KerplePrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    T5Prior,
    goat_prior,
)

B, H, L, D = 2, 4, 50, 8
PADDING = torch.zeros(B, L, dtype=torch.bool)
PADDING[0, :7] = PADDING[1, 44:] = True

PRIORS = {
    "t5": lambda: off_neutral(T5Prior(H, 12, 9)),
    "t5 causal": lambda: off_neutral(T5Prior(H, 12, 9, bidirectional=False)),
    "table": lambda: off_neutral(RelativeBiasPrior(H, 5)),
    "table of one lag": lambda: off_neutral(RelativeBiasPrior(H, 1)),
    "constant": lambda: off_neutral(RelativeBiasPrior(H, 0)),
    "alibi": lambda: AlibiPrior(H),
    "sum with a prior of keys": lambda: off_neutral(T5Prior(H, 12, 9)) + off_neutral(SinkPrior(H, 2)),
    "sum with slopes": lambda: 0.5 * off_neutral(RelativeBiasPrior(H, 5)) + AlibiPrior(H),
    "lanes": lambda: off_neutral(goat_prior(H, num_frequencies=2)),
}
PATTERNS = {
    "full": (L, L, 0, {}),
    "causal": (L, L, 0, {"is_causal": True}),
    "wide window": (L, L, 0, {"is_causal": True, "window": 20}),
    "narrow window": (L, L, 0, {"is_causal": True, "window": 3}),
    "padding": (L, L, 0, {"key_padding_mask": PADDING}),
    "causal, padding": (L, L, 0, {"key_padding_mask": PADDING, "is_causal": True}),
    "mask of keys": (L, L, 0, {"attn_mask": torch.linspace(-1, 2, L).sin().expand(B, H, 1, L).double()}),
    "chunk": (13, L, 37, {"is_causal": True}),
    "early chunk": (13, L, 20, {"is_causal": True}),
    "last token": (1, L, L - 1, {"is_causal": True}),
    "queries beyond the keys": (60, 33, 3, {}),
    "queries before the keys": (20, L, -30, {}),
}


def content(queries, keys, dtype=torch.float64, *, heads=H, key_heads=2, width=D, batch=B):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = (batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width + 1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def dense(query, key, value, prior, rows=None, first=0, *, is_causal=False, window=None, attn_mask=None, padding=None):
    """Output and log-sum-exp by plain softmax in float64, at some rows."""
    rows = torch.arange(query.shape[2]) if rows is None else rows
    query = query[:, :, rows].double()
    key, value = (side.double().repeat_interleave(query.shape[1] // side.shape[1], 1) for side in (key, value))
    at, keys = rows + first, torch.arange(key.shape[2])
    score = query @ key.mT / query.shape[-1] ** 0.5
    if prior is not None:
        score = score + prior.dense(at, keys, dtype=torch.float64)
    lag = at[:, None] - keys[None]
    hidden = (lag < 0 if is_causal else torch.zeros_like(lag, dtype=torch.bool)) | (lag >= (window or 10**9))
    hidden = hidden if padding is None else hidden | padding[:, None, None, :]
    score = (score if attn_mask is None else score + attn_mask).masked_fill(hidden, float("-inf"))
    lse = score.logsumexp(-1)
    return (score - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp() @ value, lse


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", PRIORS)
def test_outputs_and_every_gradient_are_those_of_dense_attention(name, pattern, monkeypatch):
    monkeypatch.setattr(near, "MIN_BLOCK", 7)  # several blocks, the last one short
    prior, (queries, keys, first, options) = PRIORS[name](), PATTERNS[pattern]
    operands = [side.requires_grad_() for side in content(queries, keys)]
    learned = [*operands, *(parameter for parameter in prior.parameters() if parameter.requires_grad)]
    known = {"padding" if option == "key_padding_mask" else option: value for option, value in options.items()}
    at = {"query_positions": first, "key_positions": 0}
    results = (
        prior_attention(*operands, prior=prior, backend="near_far", return_lse=True, **at, **options),
        dense(*operands, prior, first=first, **known),
    )
    weights = [
        torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) for one in results[0]
    ]
    gradients = []
    for output, lse in results:
        loss = (output * weights[0]).sum() + (torch.where(lse.isfinite(), lse, 0.0) * weights[1]).sum()
        gradients.append(torch.autograd.grad(loss, learned))
    assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1].isfinite(), results[1][1].isfinite())
    assert_close(*(lse.nan_to_num(neginf=0.0) for _, lse in results))
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "window": 12}], ids=str)
@pytest.mark.parametrize("name", ["t5", "sum with a prior of keys", "sum with slopes"])
def test_documents_are_alone(name, options):
    prior, lengths = PRIORS[name](), [10, 3, L - 13, L - 1, 1]
    operands = [side.requires_grad_() for side in content(L, L)]
    bias = torch.linspace(-2, 2, B * L).sin().view(B, 1, L).double().requires_grad_()
    learned = [*operands, bias, *(parameter for parameter in prior.parameters() if parameter.requires_grad)]
    shared = {"prior": prior, "documents": PackedDocuments(lengths), "key_bias": bias, "return_lse": True, **options}
    results = [prior_attention(*operands, backend=backend, **shared) for backend in ("near_far", "reference")]
    gradients = []
    for output, lse in results:
        gradients.append(torch.autograd.grad(output.sin().sum() + lse.cos().sum(), learned))
    for ours, expected in zip(results[0] + gradients[0], results[1] + gradients[1], strict=True):
        assert_close(ours, expected)


def test_biases_beyond_the_range_of_exp_leave_gradients_finite(monkeypatch):
    monkeypatch.setattr(near, "MIN_BLOCK", 7)
    prior = RelativeBiasPrior(H, 5)
    with torch.no_grad():
        prior.table.copy_(torch.linspace(-900.0, 900.0, 11).sin() * 900)
    query, key, value = (side.requires_grad_() for side in content(L, L, torch.float32))
    gradients = []
    for backend in ("near_far", "reference"):
        output = prior_attention(query, key, value, prior=prior, backend=backend)
        gradients.append(torch.autograd.grad(output.sin().sum(), [query, key, value, prior.table]))
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected, tolerance=1e-4)


@pytest.mark.parametrize("name", ["t5", "alibi", "sum with a prior of keys", "kerple"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sinks_and_what_tokens_decide_count_once(name, is_causal):
    length = 300 if name == "kerple" else L
    make = PRIORS.get(name, lambda: off_neutral(KerplePrior(H)))
    generator = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    operands = [side.requires_grad_() for side in content(length, length)]
    more = {"sinks": random(H), "key_bias": random(B, 2, length), "query_bias": random(B, H, length)}
    results = []
    for backend in ("near_far", "reference"):
        call = {"prior": make(), "is_causal": is_causal, "return_lse": True, "tolerance": 1e-3, **more}
        output, lse = prior_attention(*operands, backend=backend, **call)
        loss = output.sin().sum() + lse.cos().sum()
        results.append((output, lse, *torch.autograd.grad(loss, [*operands, *more.values()])))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, tolerance=1e-6 if name == "kerple" else 1e-12)


@pytest.mark.parametrize("elements", [1, 2**14])
def test_blocks_do_not_depend_on_how_many_are_computed_at_a_time(elements, monkeypatch):
    prior, operands = PRIORS["sum with a prior of keys"](), [side.requires_grad_() for side in content(300, 300)]
    calls = []
    for limit in (2**30, elements):
        monkeypatch.setitem(near._ELEMENTS, "cpu", limit)
        output = prior_attention(*operands, prior=prior, backend="near_far")
        calls.append((output, *torch.autograd.grad(output.sin().sum(), [*operands, *prior.parameters()])))
    for ours, expected in zip(*calls, strict=True):
        assert_close(ours, expected)


LONG = {
    "t5": (lambda: off_neutral(T5Prior(2), size=3.0), {}),
    "t5 causal": (lambda: off_neutral(T5Prior(2, bidirectional=False), size=3.0), {"is_causal": True}),
    "table": (lambda: off_neutral(RelativeBiasPrior(2, 64), size=3.0), {}),
    "table, causal": (lambda: off_neutral(RelativeBiasPrior(2, 64), size=3.0), {"is_causal": True}),
    "alibi": (lambda: AlibiPrior(2), {}),
}


@pytest.mark.parametrize("name", LONG)
def test_long_context_in_float32_and_in_bfloat16(name):
    """In float32 within 1e-5; in bfloat16 within 1.5 times the error of plain attention."""
    make, pattern = LONG[name]
    prior, length = make(), 2048
    shape = {"heads": 2, "key_heads": 2, "width": 32, "batch": 1}
    query, key, value = content(length, length, torch.bfloat16, **shape)
    operands = query, key, value[..., :32]  # of one width, as fused kernels want it
    rows = torch.arange(length // 2, length, 7)
    expected = dense(*operands, prior, rows, **pattern)[0].detach()
    single = prior_attention(*(side.float() for side in operands), prior=prior, **pattern)[:, :, rows]
    assert_close(single, expected)
    error = size_of_error(prior_attention(*operands, prior=prior, **pattern)[:, :, rows], expected)
    plain = prior_attention(*operands, **pattern)[:, :, rows]
    assert error <= 1.5 * size_of_error(plain, dense(*operands, None, rows, **pattern)[0])


def size_of_error(actual, expected):
    """Root of the mean square of the error over that of what is expected."""
    return float(((actual.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "t5 causal", "table"])
def test_rows_at_32_768_tokens(name):
    make, pattern = LONG[name]
    prior, length = make(), 32_768
    operands = content(length, length, torch.float32, heads=2, key_heads=2, width=16, batch=1)
    rows = torch.tensor([0, 1, 63, 64, 91, 113, 5000, 16_383, 32_700, 32_767])
    with torch.no_grad():
        output = prior_attention(*operands, prior=prior, backend="near_far", **pattern)[:, :, rows]
        assert_close(output, dense(*operands, prior, rows, **pattern)[0])


class LargestTensor(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("name", ["t5", "t5 causal", "sum with a prior of keys"])
def test_no_tensor_grows_with_the_square_of_the_tokens(name):
    prior, largest = PRIORS[name](), []
    for length in (2048, 4096):
        operands = [side.requires_grad_() for side in content(length, length)]
        with LargestTensor() as counter:
            prior_attention(*operands, prior=prior, backend="near_far", is_causal="causal" in name).sum().backward()
        largest.append(counter.numel)
    assert largest[1] <= 2 * largest[0]
    assert largest[1] < 4096 * 4096 / 4


def test_prefill_in_chunks_and_decoding_are_the_full_pass():
    layer = PriorAttention(24, 4, prior=off_neutral(T5Prior(4, 9, 8, bidirectional=False)), batch_first=True).eval()
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = layer(x, is_causal=True)[0]
        cache = layer.make_cache(2, 40)
        parts = [layer(x[:, a:b], cache=cache, is_causal=True)[0] for a, b in ((0, 25), (25, 38), (38, 39), (39, 40))]
    assert_close(torch.cat(parts, 1), whole)


def test_auto_and_explain_tell_near_and_far_apart():
    operands = content(L, L, torch.float32)
    for prior, said in (
        (PRIORS["t5"](), "the log-prior in full within 7 tokens, by blocks; a constant a head beyond"),
        (PRIORS["sum with slopes"](), "lanes beyond, in stock calls, merged"),
        (PRIORS["alibi"](), "a stock call a side with lanes, merged"),
    ):
        told = explain(*operands, prior=prior)
        assert told.backend == "near_far"
        assert said in told.reason
        assert told.error_bound <= (1e-4 if "lanes" in said else 0.0)
    assert "error bound    0.0e+00" in str(explain(*operands, prior=PRIORS["t5"]()))


@pytest.mark.parametrize("name", ["t5", "sum with a prior of keys", "kerple"])
def test_one_graph_holds_the_whole_call(name):
    prior = PRIORS.get(name, lambda: off_neutral(KerplePrior(H)))()
    operands = [side.requires_grad_() for side in content(300, 300, torch.float32)]
    results = []
    attend = lambda *sides: prior_attention(*sides, prior=prior)  # noqa: E731
    for run in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        output = run(*operands)
        results.append((output, *torch.autograd.grad(output.sin().sum(), [*operands, *prior.parameters()])))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)


def call(**options):
    return lambda: prior_attention(*content(L, L), **{"backend": "near_far", **options})


TABLE = RelativeBiasPrior(H, 5)
REFUSED = {
    "no prior": (call(), "there is no prior to treat near and far apart"),
    "grid": (call(prior=off_neutral(T5Prior(H)) + DensePrior(torch.zeros(H, L, L))), "neither constant far away"),
    "matrix": (call(prior=DensePrior(torch.zeros(H, L, L))), "neither constant far away"),
    "short": (call(prior=RelativeBiasPrior(H, L)), "no key is 50 tokens away, so that nothing is far"),
    "positions": (call(prior=TABLE, query_positions=torch.arange(L)), "its positions must be consecutive"),
    "pairs": (call(prior=TABLE, attn_mask=torch.ones(L, L, dtype=torch.bool)), "it takes no mask of pairs"),
    "documents": (call(prior=KerplePrior(H), documents=PackedDocuments([L] * B)), "no documents in graphs, or with a"),
    "short documents": (call(prior=TABLE, documents=PackedDocuments([5] * 20)), "no key is 5 tokens away"),
    "dropout": (call(prior=TABLE, dropout_p=0.1), "it has no dropout"),
    "weights": (call(prior=TABLE, return_weights=True), "do not return weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve_is_refused_in_one_line(name):
    attend, reason = REFUSED[name]
    with pytest.raises(NotImplementedError, match=reason) as caught:
        attend()
    assert "\n" not in str(caught.value)


def test_a_prior_with_lanes_prefers_them():
    assert explain(*content(L, L), prior=RecencyPrior(H), is_causal=True).backend == "sdpa"
