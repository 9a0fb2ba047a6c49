"""Bad input to attention: a clear error before any work starts. One table."""

import math

import pytest
import torch
from attention.oracles import normal

from eotattn.attention import (
    AttentionSinks,
    GoatAttention,
    KeyValueCache,
    PackedDocuments,
    PriorAttention,
    Rotary,
    explain,
    prior_attention,
)
from eotattn.priors import (
    ClassTokenPrior,
    DensePrior,
    FourierPrior,
    KeyTablePrior,
    RecencyPrior,
    RelativeBiasPrior,
    goat_prior,
    grid_positions,
)

B, H, Q, K, D, V = 2, 6, 5, 7, 8, 4
QUERY, KEY, VALUE = normal(B, H, Q, D).float(), normal(B, 3, K, D).float(), normal(B, 3, K, V).float()
RECENCY = RecencyPrior(H)
CELLS = grid_positions(1, Q)


def call(query=QUERY, key=KEY, value=VALUE, **arguments):
    return lambda: prior_attention(query, key, value, **arguments)


FUNCTIONAL = {
    "query no tensor": (call(query=[[1.0]]), TypeError, "prior_attention: query must be a tensor"),
    "integer query": (call(query=QUERY.long()), TypeError, "query must have a floating dtype; got shape"),
    "complex key": (call(key=KEY.to(torch.complex64)), TypeError, "key must have a floating dtype"),
    "three axes": (
        call(query=QUERY[0]),
        ValueError,
        r"query must have shape \(B, heads, length, width\); got shape \(6,",
    ),
    "five axes": (call(value=VALUE[None]), ValueError, "value must have shape"),
    "no queries": (call(query=QUERY[:, :, :0]), ValueError, "query must not be empty"),
    "no keys": (call(key=KEY[:, :, :0], value=VALUE[:, :, :0]), ValueError, "key must not be empty"),
    "no samples beside some": (call(query=QUERY[:0]), ValueError, r"key must have shape \(0, any, any, 8\)"),
    "mixed dtypes": (call(key=KEY.double()), ValueError, "key must have the query's dtype torch.float32"),
    "key elsewhere": (call(key=KEY.to("meta")), ValueError, r"key must be on the device of query \(cpu\)"),
    "value elsewhere": (call(value=VALUE.to("meta")), ValueError, "value must be on the device of query"),
    "mask elsewhere": (
        call(attn_mask=torch.ones(Q, K, dtype=torch.bool, device="meta")),
        ValueError,
        "attn_mask must be on the device of query",
    ),
    "padding elsewhere": (
        call(key_padding_mask=torch.ones(B, K, dtype=torch.bool, device="meta")),
        ValueError,
        "key_padding_mask must be on the device of query",
    ),
    "positions not a number": (
        call(prior=RECENCY, query_positions=torch.full((Q,), math.nan)),
        ValueError,
        "query_positions must be finite",
    ),
    "positions not a number, no prior": (
        call(key_positions=torch.full((K,), math.nan), is_causal=True),
        ValueError,
        "key_positions must be finite",
    ),
    "boolean positions, no prior": (
        call(query_positions=torch.ones(Q, dtype=torch.bool)),
        TypeError,
        "query_positions must hold real numbers",
    ),
    "positions elsewhere": (
        call(prior=RECENCY, key_positions=torch.arange(K, device="meta")),
        ValueError,
        "key_positions must be on cpu",
    ),
    "other batch": (call(key=KEY[:1]), ValueError, r"key must have shape \(2, any, any, 8\); got shape \(1, 3, 7, 8\)"),
    "other width": (call(key=KEY[..., :7]), ValueError, "key must have shape"),
    "value of other heads": (call(value=VALUE[:, :1]), ValueError, r"value must have shape \(2, 3, 7, any\)"),
    "value of other length": (call(value=VALUE[:, :, 1:]), ValueError, "value must have shape"),
    "heads that do not divide": (
        call(key=normal(B, 4, K, D).float(), value=normal(B, 4, K, V).float()),
        ValueError,
        "key must have a number of heads that divides the query's 6",
    ),
    "prior of key heads": (call(prior=RecencyPrior(3)), ValueError, "prior must have the query's 6 heads; got 3"),
    "prior no prior": (call(prior=torch.zeros(H, Q, K)), TypeError, "prior must be a LogPrior"),
    "grid prior without positions": (
        call(prior=ClassTokenPrior(H)),
        ValueError,
        "query_positions must be given explicitly to a prior on grids",
    ),
    "grid prior with a range": (
        call(prior=ClassTokenPrior(H), query_positions=range(Q)),
        ValueError,
        "query_positions must be given explicitly",
    ),
    "causal on a grid": (
        call(
            *(QUERY, KEY[:, :, :Q], VALUE[:, :, :Q]),
            prior=ClassTokenPrior(H),
            query_positions=CELLS,
            key_positions=CELLS,
            is_causal=True,
        ),
        ValueError,
        "is_causal must be false on grids",
    ),
    "too few positions": (call(query_positions=torch.arange(4)), ValueError, r"query_positions must have shape \(5,\)"),
    "range too long": (call(key_positions=range(8)), ValueError, "key_positions must have length 7"),
    "range with steps": (call(query_positions=range(0, 10, 2)), ValueError, "be a range of step one"),
    "positions of a third batch": (
        call(query_positions=torch.zeros(3, Q)),
        ValueError,
        "query_positions must have shape",
    ),
    "positions in words": (call(query_positions="first"), TypeError, "query_positions must be positions; got 'first'"),
    "too few positions in a list": (call(query_positions=[0, 1]), ValueError, "query_positions must have shape"),
    "boolean positions": (
        call(prior=RECENCY, query_positions=torch.ones(Q, dtype=torch.bool)),
        TypeError,
        "query_positions must hold real numbers",
    ),
    "given matrix too small": (
        call(prior=DensePrior(torch.zeros(H, Q, K - 1))),
        ValueError,
        "DensePrior: key_positions must lie in 0 to 5",
    ),
    "scale zero": (call(scale=0.0), ValueError, "scale must be positive and finite; got 0.0"),
    "scale negative": (call(scale=-1.0), ValueError, "scale must be positive"),
    "scale NaN": (call(scale=math.nan), ValueError, "scale must be positive"),
    "scale infinite": (call(scale=math.inf), ValueError, "scale must be positive and finite"),
    "scale no number": (call(scale="auto"), TypeError, "scale must be a number"),
    "dropout one": (call(dropout_p=1.0), ValueError, r"dropout_p must lie in \[0, 1\)"),
    "dropout negative": (call(dropout_p=-0.1), ValueError, r"dropout_p must lie in \[0, 1\)"),
    "dropout NaN": (call(dropout_p=math.nan), ValueError, r"dropout_p must lie in \[0, 1\)"),
    "dropout no number": (call(dropout_p=None), TypeError, "dropout_p must be a number; got None"),
    "mask too large": (
        call(attn_mask=torch.ones(Q, K + 1, dtype=torch.bool)),
        ValueError,
        r"attn_mask must broadcast to \(2, 6, 5, 7\); got shape \(5, 8\)",
    ),
    "mask of key heads": (call(attn_mask=torch.zeros(3, Q, K)), ValueError, "attn_mask must broadcast"),
    "mask of five axes": (call(attn_mask=torch.zeros(1, 1, 1, 1, K)), ValueError, "attn_mask must broadcast"),
    "integer mask": (call(attn_mask=torch.ones(Q, K, dtype=torch.int64)), TypeError, "attn_mask .* floating dtype"),
    "integer padding": (
        call(key_padding_mask=torch.ones(B, K, dtype=torch.int64)),
        TypeError,
        "key_padding_mask must be a boolean tensor",
    ),
    "padding of queries": (
        call(key_padding_mask=torch.ones(B, Q, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask must have shape \(2, 7\)",
    ),
    "unknown backend": (
        call(backend="flash"),
        ValueError,
        "backend must be one of 'auto', 'sdpa', 'near_far', 'rebased', 'varlen', 'flex', 'reference'",
    ),
    "a switch that is a word": (call(return_lse="yes"), TypeError, "return_lse must be True or False; got 'yes'"),
    "a switch that is a number": (call(return_weights=1), TypeError, "return_weights must be True or False; got 1"),
    "a window without causality": (call(window=3), ValueError, "window must be left out without is_causal; got 3"),
    "an empty window": (call(is_causal=True, window=0), ValueError, "window must be at least 1; got 0"),
    "a fractional window": (call(is_causal=True, window=2.0), TypeError, "window must be an integer"),
    "lengths that are no documents": (
        call(key=QUERY, value=QUERY, documents=[Q] * B),
        TypeError,
        "documents must be PackedDocuments",
    ),
    "documents across rows": (
        call(key=QUERY, value=QUERY, documents=PackedDocuments([Q + 1, Q - 1])),
        ValueError,
        "documents must fill 2 rows of 5 tokens; got '2 documents of 10 tokens'",
    ),
    "documents that end early": (
        call(key=QUERY, value=QUERY, documents=PackedDocuments([Q])),
        ValueError,
        "documents must fill 2 rows of 5 tokens",
    ),
    "documents in cross-attention": (
        call(documents=PackedDocuments([Q] * B)),
        ValueError,
        r"key must have shape \(any, any, 5, any\)",
    ),
    "documents with positions": (
        call(key=QUERY, value=QUERY, documents=PackedDocuments([Q] * B), key_positions=range(Q)),
        ValueError,
        "key_positions must be left out with documents",
    ),
    "documents with padding": (
        call(
            key=QUERY,
            value=QUERY,
            documents=PackedDocuments([Q] * B),
            key_padding_mask=torch.zeros(B, Q, dtype=torch.bool),
        ),
        ValueError,
        "key_padding_mask must be left out with documents",
    ),
    "a length alone": (lambda: PackedDocuments(5), TypeError, "lengths must be several numbers; got 5"),
    "no documents": (lambda: PackedDocuments([]), ValueError, "lengths must not be empty"),
    "an empty document": (lambda: PackedDocuments([3, 0]), ValueError, "lengths must be at least 1; got 0"),
    "ids that are no numbers": (
        lambda: PackedDocuments.from_ids(torch.zeros(2, 3)),
        TypeError,
        r"ids must be an integer tensor \(B, L\) or \(L,\)",
    ),
    "a cache and other keys": (
        call(cache=KeyValueCache(B, 3, 9, D, V)),
        ValueError,
        "key must have 5 tokens, as the query has",
    ),
    "a cache and positions": (
        call(key=KEY[:, :, :Q], value=VALUE[:, :, :Q], cache=KeyValueCache(B, 3, 9, D, V), query_positions=range(Q)),
        ValueError,
        "query_positions must be left to the cache",
    ),
    "a cache and documents": (
        call(
            key=KEY[:, :, :Q],
            value=VALUE[:, :, :Q],
            cache=KeyValueCache(B, 3, 9, D, V),
            documents=PackedDocuments([Q] * B),
        ),
        ValueError,
        "documents must be left to the cache",
    ),
    "key bias of two axes": (
        call(key_bias=torch.zeros(B, K)),
        ValueError,
        r"prior_attention: key_bias must have shape \(2, 1 or 3 or 6, 7\); got shape \(2, 7\)",
    ),
    "key bias of other heads": (call(key_bias=torch.zeros(B, 2, K)), ValueError, "key_bias must have shape"),
    "key bias of one sample": (call(key_bias=torch.zeros(1, H, K)), ValueError, "key_bias must have shape"),
    "key bias of queries": (call(key_bias=torch.zeros(B, H, Q)), ValueError, "key_bias must have shape"),
    "integer key bias": (call(key_bias=torch.zeros(B, H, K).long()), TypeError, "key_bias must have a floating dtype"),
    "key bias no tensor": (call(key_bias=[0.0]), TypeError, "key_bias must be a tensor"),
    "key bias elsewhere": (
        call(key_bias=torch.zeros(B, H, K, device="meta")),
        ValueError,
        r"key_bias must be on the device of query \(cpu\)",
    ),
    "NaN in a key bias": (
        call(key_bias=torch.full((B, 1, K), math.nan)),
        ValueError,
        "prior_attention: key_bias must be finite; got '14 such entries of 14'",
    ),
    "a key hidden by its bias": (
        call(key_bias=torch.full((B, 1, K), -math.inf)),
        ValueError,
        "key_bias must be finite",
    ),
    "a key bias that float16 cannot hold": (
        call(query=QUERY.half(), key=KEY.half(), value=VALUE.half(), key_bias=torch.full((B, 1, K), 5e4)),
        ValueError,
        "key_bias must lie within 45962 nats in float16; got 50000",
    ),
    "query bias of keys": (
        call(query_bias=torch.zeros(B, H, K)),
        ValueError,
        r"query_bias must have shape \(2, 6, 5\)",
    ),
    "query gains without a prior": (
        call(query_gains=torch.ones(B, H, Q)),
        ValueError,
        "query_gains must belong to a prior with lanes; got 'no prior'",
    ),
    "a query gain that is a number": (
        call(prior=RECENCY, query_gains=2.0),
        TypeError,
        "query_gains must be a tensor, or one or None for each term; got 2.0",
    ),
    "query gains of another shape": (
        call(prior=RECENCY, query_gains=torch.ones(B, H, K)),
        ValueError,
        r"query_gains must have shape \(2, 6, 5\)",
    ),
    "too many query gains": (
        call(prior=RECENCY, query_gains=(None, torch.ones(B, H, Q))),
        ValueError,
        "query_gains must be one for each of the prior's 1 terms; got 2",
    ),
    "query gains of a table": (
        call(prior=KeyTablePrior(H, 3), query_gains=torch.ones(B, H, Q)),
        ValueError,
        "query_gains must belong to terms with weights, not to a table of keys",
    ),
    "NaN in query gains": (
        call(prior=RECENCY, query_gains=torch.full((B, H, Q), math.nan)),
        ValueError,
        "query_gains must be finite",
    ),
    "a matrix for other samples": (
        call(prior=DensePrior(torch.zeros(3, H, Q, K))),
        ValueError,
        "prior must be for 2 samples; got 3",
    ),
    "samples that disagree": (
        lambda: DensePrior(torch.zeros(3, H, Q, K)) + DensePrior(torch.zeros(2, H, Q, K)),
        ValueError,
        "SumPrior: parts must be for equally many samples",
    ),
    "no cache": (call(key=KEY[:, :, :Q], cache={}), TypeError, "cache must be a KeyValueCache; got {}"),
    "a cache and no tensor": (
        call(query=[1.0], cache=KeyValueCache(B, 3, 9, D, V)),
        TypeError,
        "query must be a tensor",
    ),
    "a cache explained": (
        lambda: explain(QUERY, QUERY, QUERY, cache=KeyValueCache(B, H, 9, D, D)),
        ValueError,
        "explain: cache must be left out",
    ),
    "misspelled keyword": (call(causal=True), TypeError, "unexpected keyword argument 'causal'"),
    "positional prior": (lambda: prior_attention(QUERY, KEY, VALUE, RECENCY), TypeError, "positional"),
    "sdpa without lanes": (
        call(prior=RelativeBiasPrior(H, 3), backend="sdpa"),
        NotImplementedError,
        "backend 'sdpa' cannot serve this call with RelativeBiasPrior: this prior has no lanes",
    ),
    "sdpa with a sum without lanes": (
        call(prior=RECENCY + RelativeBiasPrior(H, 3), backend="sdpa"),
        NotImplementedError,
        "backend 'sdpa' cannot serve this call with SumPrior",
    ),
    "sdpa with weights": (
        call(return_weights=True, backend="sdpa"),
        NotImplementedError,
        "backend 'sdpa' cannot serve this call with no prior: fused kernels do not return weights",
    ),
    "flex with weights": (
        call(return_weights=True, backend="flex"),
        NotImplementedError,
        "backend 'flex' cannot serve",
    ),
    "flex on the CPU": (
        call(prior=RECENCY, backend="flex"),
        NotImplementedError,
        "backend 'flex' cannot serve this call with RecencyPrior: it compiles for a GPU and the query is on cpu",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional(name):
    build, error, message = FUNCTIONAL[name]
    with pytest.raises(error, match=message):
        build()


LAYER = PriorAttention(24, 4, prior=RecencyPrior(4), batch_first=True)
APART = PriorAttention(24, 4, kdim=10, vdim=13, batch_first=True)
X = normal(B, Q, 24).float()


def layer(*arguments, **named):
    return lambda: PriorAttention(*arguments, **{"batch_first": True, **named})


MODULE = {
    "width no multiple": (layer(25, 4), ValueError, r"PriorAttention: embed_dim must be a multiple of num_heads \(4\)"),
    "no heads": (layer(24, 0), ValueError, "num_heads must be at least 1"),
    "fractional heads": (layer(24, 4.0), TypeError, "num_heads must be an integer"),
    "key heads that do not divide": (layer(24, 4, num_kv_heads=3), ValueError, r"num_kv_heads must divide num_heads"),
    "no key heads": (layer(24, 4, num_kv_heads=0), ValueError, "num_kv_heads must be at least 1; got 0"),
    "no key width": (layer(24, 4, kdim=0), ValueError, "kdim must be at least 1; got 0"),
    "no value width": (layer(24, 4, vdim=0), ValueError, "vdim must be at least 1; got 0"),
    "prior of other heads": (layer(24, 4, prior=RecencyPrior(2)), ValueError, "prior must have 4 heads; got 2"),
    "prior no prior": (layer(24, 4, prior=torch.zeros(4)), TypeError, "prior must be a LogPrior"),
    "dropout one": (layer(24, 4, dropout=1.0), ValueError, r"dropout must lie in \[0, 1\)"),
    "dropout no number": (layer(24, 4, dropout="some"), TypeError, "PriorAttention: dropout must be a number"),
    "lanes of no dtype": (
        layer(24, 4, prior=RecencyPrior(4), lanes="reserved", lane_dtype="bf16"),
        TypeError,
        "lane_dtype must be a floating dtype; got 'bf16'",
    ),
    "sinks of no kind": (layer(24, 4, sinks=torch.zeros(4)), TypeError, "PriorAttention: sinks must be AttentionSinks"),
    "sinks of other heads": (
        layer(24, 4, sinks=AttentionSinks.logit(3)),
        ValueError,
        r"PriorAttention: sinks must have shape \(4\)",
    ),
    "registers of another width": (
        layer(24, 4, sinks=AttentionSinks.registers(4, 8)),
        ValueError,
        r"PriorAttention: sinks \(keys\) must have shape",
    ),
    "conversion of another layer": (
        lambda: PriorAttention.from_multihead_attention(torch.nn.Linear(2, 2)),
        TypeError,
        "attention must be an nn.MultiheadAttention; got 'Linear'",
    ),
    "rotary no rotary": (layer(24, 4, rotary=10_000.0), TypeError, "PriorAttention: rotary must be a Rotary"),
    "rotary of another content": (
        lambda: Rotary(6)(QUERY),
        ValueError,
        r"content must have shape \(any, any, any, 6\)",
    ),
    "rotary without heads": (lambda: Rotary(D)(QUERY[0]), ValueError, "Rotary: content must have shape"),
    "input no tensor": (lambda: LAYER([1.0]), TypeError, "PriorAttention: query must be a tensor"),
    "key no tensor": (lambda: LAYER(X, [1.0]), TypeError, "PriorAttention: key must be a tensor"),
    "padding no tensor": (
        lambda: LAYER(X, key_padding_mask=[False] * Q),
        TypeError,
        "key_padding_mask must be a boolean tensor",
    ),
    "padding that a cache cannot keep": (
        lambda: LAYER(X, key_padding_mask=torch.zeros(B, Q), cache=LAYER.make_cache(B, Q)),
        TypeError,
        "PriorAttention: key_padding_mask must be boolean with a cache",
    ),
    "beams that are flags": (
        lambda: LAYER.make_cache(B, Q).reorder(torch.tensor([True, False])),
        TypeError,
        "samples must be an integer tensor",
    ),
    "unknown backend": (layer(24, 4, backend="math"), ValueError, "backend must be one of"),
    "unknown lanes": (layer(24, 4, lanes="none"), ValueError, "lanes must be one of 'appended', 'reserved'"),
    "misspelled keyword": (layer(24, 4, num_kv_head=2), TypeError, "unexpected keyword argument"),
    "positional options": (layer(24, 4, 0.1), TypeError, "positional"),
    "reserving without lanes": (
        layer(24, 4, prior=RelativeBiasPrior(4, 3), lanes="reserved"),
        ValueError,
        "prior must have lanes to reserve; got 'RelativeBiasPrior'",
    ),
    "reserving the whole head": (
        layer(24, 4, prior=FourierPrior(4, 3), lanes="reserved"),
        ValueError,
        "prior must leave content in a head of width 6; got '6 lanes'",
    ),
    "rotary of another width": (
        layer(24, 4, rotary=Rotary(6), prior=RecencyPrior(4), lanes="reserved"),
        ValueError,
        "rotary must have width 4; got 6",
    ),
    "goat in a narrow head": (
        lambda: GoatAttention(16, 4, batch_first=True),
        ValueError,
        "GoatAttention: prior must leave content",
    ),
    "input of another width": (lambda: LAYER(X[..., :23]), ValueError, "query must have width 24 in its last axis"),
    "key of another width": (lambda: APART(X, X, X), ValueError, "key must have width 10"),
    "four axes": (lambda: LAYER(X[None]), ValueError, "query must have two or three axes"),
    "batch beside no batch": (lambda: LAYER(X[0], X), ValueError, "key must have width 24"),
    "one axis": (lambda: LAYER(X[0, 0]), ValueError, "query must have two or three axes"),
    "misspelled argument": (lambda: LAYER(X, causal=True), TypeError, "unexpected keyword argument"),
    "integer mask": (
        lambda: LAYER(X, attn_mask=torch.ones(Q, Q).long()),
        TypeError,
        "attn_mask must be boolean .* or float",
    ),
    "mask of samples alone": (
        lambda: LAYER(X, attn_mask=torch.zeros(B, Q, Q)),
        ValueError,
        r"attn_mask must have 2 \* 4 matrices",
    ),
    "mask of another size": (lambda: LAYER(X, attn_mask=torch.zeros(Q, K)), ValueError, "attn_mask must broadcast"),
    "integer padding": (
        lambda: LAYER(X, key_padding_mask=torch.ones(B, Q).long()),
        TypeError,
        "key_padding_mask must be a boolean tensor",
    ),
    "positions that are words": (
        lambda: LAYER(X, query_positions=["first"] * Q),
        TypeError,
        "PriorAttention: query_positions must be numbers: a tensor, an array",
    ),
    "positions of another length": (
        lambda: LAYER(X, query_positions=[0, 1]),
        ValueError,
        r"query_positions must have shape \(5,\)",
    ),
    "layout unsaid": (
        layer(24, 4, batch_first=None),
        TypeError,
        "PriorAttention: batch_first must be true or false; got None",
    ),
    "nested input": (
        lambda: LAYER(torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)),
        TypeError,
        "PriorAttention: query must be padded; got 'a nested tensor'",
    ),
    "empty sequence": (lambda: LAYER(X[:, :0]), ValueError, "query must not be empty"),
    "weights from sdpa": (
        lambda: PriorAttention(24, 4, backend="sdpa", batch_first=True)(X, need_weights=True),
        NotImplementedError,
        "backend 'sdpa' cannot serve",
    ),
    "positions beside a cache": (
        lambda: LAYER(X, cache=LAYER.make_cache(B, Q), query_positions=range(Q)),
        ValueError,
        "query_positions must be left to the cache",
    ),
    "cache too short": (
        lambda: LAYER(X, cache=LAYER.make_cache(B, Q - 1)),
        ValueError,
        "KeyValueCache: key must leave room in 4 slots; got '5 tokens'",
    ),
    "cache of another batch": (
        lambda: LAYER(X, cache=LAYER.make_cache(B + 1, Q)),
        ValueError,
        r"KeyValueCache: key must have shape \(3, 4, 5, 6\)",
    ),
    "empty cache": (lambda: KeyValueCache(1, 2, 0, 4, 4), ValueError, "max_length must be at least 1"),
    "positions beside documents": (
        lambda: LAYER(X, documents=PackedDocuments([Q] * B), query_positions=range(Q)),
        ValueError,
        "query_positions must be left to documents",
    ),
    "a window without causality": (
        lambda: PriorAttention(24, 4, window=3, batch_first=True)(X),
        ValueError,
        "window must be left out without is_causal; got 3",
    ),
    "an empty window": (layer(24, 4, window=0), ValueError, "PriorAttention: window must be at least 1; got 0"),
    "a cache for a prior of other heads": (
        lambda: KeyValueCache(1, 2, 4, 4, 4, prior=RecencyPrior(3)),
        ValueError,
        "prior must have a multiple of 2 heads; got 3",
    ),
    "cropping to more": (
        lambda: LAYER.make_cache(1, 4).crop(1),
        ValueError,
        "length must be at most the 0 slots filled; got 1",
    ),
    "goat prior of period zero": (lambda: goat_prior(4, min_period=0.0), ValueError, "min_period must be positive"),
    "goat prior up to period zero": (lambda: goat_prior(4, max_period=0.0), ValueError, "max_period must be positive"),
    "the paper's prior of period zero": (
        lambda: goat_prior(4, form="paper", min_period=0.0),
        ValueError,
        "min_period must be positive",
    ),
    "goat prior misspelled": (lambda: goat_prior(4, frequencies=3), TypeError, "unexpected keyword"),
}


@pytest.mark.parametrize("name", MODULE)
def test_module(name):
    build, error, message = MODULE[name]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_backend_asked_for_by_name_never_falls_back(backend, monkeypatch):
    """It is refused even though the reference could serve the call; nothing else is called in its place."""

    def never(*arguments, **named):
        raise AssertionError("a backend that was not asked for was called")

    monkeypatch.setattr("eotattn.kernels.reference.attend", never)
    monkeypatch.setattr("eotattn.kernels.flex.attend", never)
    monkeypatch.setattr("eotattn.kernels.sdpa.attend", never)
    with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot serve this call with RelativeBiasPrior"):
        prior_attention(QUERY, KEY, VALUE, prior=RelativeBiasPrior(H, 3), backend=backend)
