"""A cache that drops keys says how much of them was missed, and never too little."""

import pytest
import torch
from tolerances import assert_close

from eotattn import goat_prior
from eotattn.attention import AttentionSinks, StreamingCache
from eotattn.priors import FourierPrior, KeyTablePrior, RecencyPrior

B, H, HK, D, V = 2, 4, 2, 6, 5


def with_numbers(prior, size=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return prior


def tokens(length, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, length, D), (B, HK, length, D), (B, HK, length, V))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def weights(query, key, prior, sink=None):
    """(B, H, L, L [+ 1]) float64 by the definition, causal; the sink's last."""
    length = query.shape[2]
    at = torch.arange(length)
    keys = key.double().repeat_interleave(H // HK, dim=1)
    logits = query.double() @ keys.mT / D**0.5
    if prior is not None:
        logits = logits + prior.dense(at, at, dtype=torch.float64).detach()
    logits = logits.masked_fill(at > at[:, None], float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink.double()[:, None, None].expand(B, H, length, 1)], dim=-1)
    return logits.softmax(-1)


def missed(all_weights, chunks, num_first, num_recent):
    """(B, H, L): weight on the keys that a query of a chunk finds dropped."""
    found, start = [], 0
    for chunk in chunks:
        rows = all_weights[:, :, start : start + chunk, num_first : max(num_first, start - num_recent)]
        found.append(rows.sum(-1))
        start += chunk
    return torch.cat(found, dim=-1)


def stream(cache, parts, chunks, **options):
    results = [
        cache.attend(*pieces, **options) for pieces in zip(*(x.split(chunks, dim=2) for x in parts), strict=True)
    ]
    return [torch.cat(side, dim=2) for side in zip(*results, strict=True)]


PRIORS = {
    "none": lambda: None,
    "recency": lambda: RecencyPrior(H),
    "goat": lambda: with_numbers(goat_prior(H, num_frequencies=3, length_scale=64.0)),
    "waves": lambda: with_numbers(FourierPrior(H, num_frequencies=3)),
    "table": lambda: with_numbers(KeyTablePrior(H, 9) + RecencyPrior(H)),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("chunks", [[1] * 41, [17, 5, 1, 1, 17]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bound_is_never_below_the_true_loss(name, chunks, dtype):
    prior, parts = PRIORS[name](), tokens(41, dtype)
    for num_bins in (1, 4, 64):
        cache = StreamingCache(
            B, HK, key_width=D, value_width=V, prior=prior, num_first=2, num_recent=7, num_bins=num_bins, dtype=dtype
        )
        output, _, bound = stream(cache, parts, chunks)
        loss = missed(weights(*parts[:2], prior), chunks, 2, 7)
        assert output.shape == (B, H, 41, V)
        assert (bound >= loss).all()
        assert (bound <= 1).all()
        assert (bound[loss == 0] == 0).all()


def test_bound_is_tight_where_bins_hold_one_key():
    prior, parts = PRIORS["goat"](), tokens(41)
    cache = StreamingCache(B, HK, key_width=D, value_width=V, prior=prior, num_recent=7, dtype=torch.float64)
    bound = stream(cache, parts, [1] * 41)[2]
    loss = missed(weights(*parts[:2], prior), [1] * 41, 4, 7)
    assert loss.max() > 0.3
    assert_close(bound, loss, tolerance=1e-11)


def test_recency_and_a_sink_make_the_bound_small():
    parts, sink = tokens(200), torch.full((H,), 8.0)
    chunks, sizes = [1] * 200, {"key_width": D, "value_width": V, "num_recent": 64, "num_bins": 16}
    steep = RecencyPrior(H)  # ALiBi's slopes of four heads: 1/4 to 1/256 a token
    for prior, sinks in ((None, None), (steep, None), (None, sink), (steep, AttentionSinks(logits=sink))):
        bound = stream(StreamingCache(B, HK, prior=prior, dtype=torch.float64, **sizes), parts, chunks, sinks=sinks)[2]
        loss = missed(weights(*parts[:2], prior, None if sinks is None else sink), chunks, 4, 64)
        assert (bound >= loss).all()
        if prior is None and sinks is None:
            alone = bound
        assert prior is None or bound[:, 0].max() < 1e-5  # 64 tokens back at a quarter of a nat each
        assert sinks is None or bound.mean() < 0.6 * alone.mean()


def test_output_is_attention_to_what_is_kept_and_off_by_no_more_than_the_bound_says():
    prior, parts, chunks = PRIORS["goat"](), tokens(41), [1] * 41
    cache = StreamingCache(
        B, HK, key_width=D, value_width=V, prior=prior, num_first=2, num_recent=7, dtype=torch.float64
    )
    output, _, bound = stream(cache, parts, chunks)
    full = weights(*parts[:2], prior)
    at = torch.arange(41)
    kept = full.masked_fill((at >= 2) & (at < at[:, None] - 7), 0.0)
    values = parts[2].repeat_interleave(H // HK, dim=1)
    assert_close(output, kept / kept.sum(-1, keepdim=True) @ values, tolerance=1e-6)
    spread = (values.amax((2, 3)) - values.amin((2, 3)))[:, :, None]
    assert ((output - full @ values).abs().amax(-1) <= bound * spread + 1e-6).all()


def test_a_million_tokens_in_fixed_memory():
    heads, width, chunk, total = 2, 4, 1024, 2**20
    prior = RecencyPrior(heads, mean_lags=[40.0, 600.0])
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(1, 1, total, width, generator=generator)
    cache = StreamingCache(1, 1, key_width=width, value_width=width, prior=prior, num_recent=1020)
    sizes, checked = set(), 0
    for start in range(0, total, chunk):
        new = key[:, :, start : start + chunk]
        query = torch.randn(1, heads, chunk, width, generator=generator)
        bound = cache.attend(query, new, new).dropped_mass
        if start >= 128 * chunk:
            sizes.add(cache.num_elements)
        if start % (64 * chunk) == 0 and start > 0:  # the definition, for a few rows
            rows = torch.tensor([0, 500, 1023])
            at = torch.arange(start + chunk)
            logits = query[:, :, rows].double() @ key[:, :, : start + chunk].double().mT / width**0.5
            logits = logits + prior.dense(start + rows, at, dtype=torch.float64).detach()
            share = logits.masked_fill(at > (start + rows)[:, None], float("-inf")).softmax(-1)
            loss = share[..., 4 : start - 1020].sum(-1)
            assert (bound[:, :, rows] >= loss).all()
            assert bound[:, 0].max() < 1e-6  # 1020 tokens back at a mean lag of 40: e^-25 times what content does
            checked += 1
    assert checked == 15
    assert len(sizes) == 1
    assert sizes.pop() < 30_000
    assert cache.length == total


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"StreamingCache: num_recent must be at least 1"):
        StreamingCache(1, 1, key_width=2, value_width=2, num_recent=0)
    cache = StreamingCache(B, HK, key_width=D, value_width=V)
    query, key, value = tokens(3, torch.float32)
    with pytest.raises(TypeError, match=r"StreamingCache: key must be torch.float32"):
        cache.attend(query, key.double(), value)
    with pytest.raises(ValueError, match=r"StreamingCache: value must have shape"):
        cache.attend(query, key, value[:, :, :2])
    with pytest.raises(ValueError, match=r"StreamingCache: query must have the 3 tokens of the key"):
        cache.attend(query[:, :, :1], key, value)
    assert cache.length == 0
