"""Statistics from kernel sums equal those from blocks of rows, which equal their dense form in another file.

Without a GPU or Triton's interpreter the kernel's sums are replaced by dense ones: what is tested then is everything
around the kernel.
"""

import math
import os
from dataclasses import fields

import pytest
import torch
from score_oracle import dense_column_sums, dense_row_sums
from tolerances import assert_close

from eotattn.attention.statistics import row_statistics, streaming, tile_statistics
from eotattn.attention.statistics.key_intervals import KeyIntervals
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.priors import goat_prior

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
B, H, HK, K, D = 2, 4, 2, 41, 16
#: Name -> options of the call.
CALLS = {
    "full": {},
    "causal": {"is_causal": True},
    "prior": {"prior": True, "is_causal": True},
    "key bias": {"key_bias": HK, "is_causal": True},
    "prior and key bias": {"prior": True, "key_bias": 1},
    "padding": {"padded": True, "is_causal": True},
    "explicit sink": {"sink": True, "is_causal": True},
    "soft cap": {"softcap": 3.0},
    "window": {"window": 13, "is_causal": True},
    "cache": {"queries": 17, "query_start": 24, "is_causal": True},
    "sliding cache": {"queries": 9, "query_start": 60, "key_start": 30, "window": 38, "is_causal": True},
    "one key": {"queries": 5, "query_start": -4, "is_causal": True, "window": 1},
    "everything": {
        "prior": True,
        "padded": True,
        "sink": True,
        "softcap": 2.0,
        "window": 29,
        "is_causal": True,
    },
}


def call(
    *, prior=False, padded=False, sink=False, key_bias=None, queries=K, device="cpu", dtype=torch.float32, **options
):
    """Arguments of :func:`row_statistics`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key = 2 * normal(B, H, queries, D), normal(B, HK, K, D)
    options["keys"] = (1, 0, 12)
    if prior:
        at = torch.arange(queries, device=device), torch.arange(K, device=device)
        learned = goat_prior(H, num_frequencies=3).to(device)
        with torch.no_grad():
            for parameter in learned.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(device))
            options["log_prior"] = learned.lanes(*at, dtype=dtype, num_kv_heads=HK)
    if padded:
        real = torch.ones(B, K, dtype=torch.bool)
        real[0, :6] = False
        options.update(mask=real[:, None, None].to(device), sequence_start=torch.tensor([6, 0]), counted=real)
    if key_bias is not None:
        options["key_bias"] = normal(B, key_bias, K).float()
    if sink:
        options["sink_logits"] = normal(H).float()
    return (query, key), options


ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def kernel(request, monkeypatch):
    """The device that the kernel runs on; on the CPU it is interpreted, or dense sums stand in its place."""
    if request.param == "cpu" and not INTERPRETED:
        monkeypatch.setattr(tile_statistics, "row_sums", lambda tiles, chosen: in_single(dense_row_sums(tiles, chosen)))
        monkeypatch.setattr(tile_statistics, "column_sums", dense_column_sums)
        monkeypatch.setattr(streaming, "refusal", lambda tiles: None)
    return request.param


def in_single(sums):
    return type(sums)(*(getattr(sums, field.name).float() for field in fields(sums)))


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
@pytest.mark.parametrize("name", CALLS)
def test_kernel_and_blocks_agree(name, kernel):
    content, options = call(**CALLS[name], device=kernel)
    found = row_statistics(*content, backend="kernel", **options)
    expected = row_statistics(*content, backend="blocks", **options)
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "first_lag":
            assert ours == theirs
        elif field.name == "counted":
            assert torch.equal(ours, theirs)
        elif field.name == "backend":
            assert (ours, theirs) == ("kernel", "blocks")
        elif field.name != "output":
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours.isnan(), theirs.isnan()), field.name
            assert torch.equal(ours == -math.inf, theirs == -math.inf), field.name
            defined = theirs.isfinite()
            assert_close(ours[defined], theirs[defined], tolerance=1e-4)
    sums, summed = SequenceStatistics.of(found).sums, SequenceStatistics.of(expected).sums
    for key in summed:
        assert_close(sums[key], summed[key], tolerance=1e-3 if key == "prior_log_ratio" else 1e-4)


def test_the_kernel_is_taken_where_it_serves(kernel, monkeypatch):
    used = []
    monkeypatch.setattr(streaming, "tile_statistics", lambda *arguments: used.append(arguments) or 1 / 0)
    content, options = call(prior=True, padded=True, device=kernel)
    with pytest.raises(ZeroDivisionError):
        row_statistics(*content, **options)
    row_statistics(*content, **options, backend="blocks")
    row_statistics(*content, **options, block_elements=64)
    row_statistics(*content, content[1], **options)
    assert len(used) == 1


def test_what_the_kernel_does_not_serve_is_refused_by_name(kernel):
    (query, key), options = call(device=kernel)
    table = torch.zeros(query.shape[2], K, device=kernel)
    refused = [
        ({"value": key}, "an output is wanted"),
        ({"block_elements": 64}, "block_elements asks for blocks"),
        ({"mask": table}, "the mask differs from query to query"),
        ({"mask": torch.ones(H, 1, K, dtype=torch.bool, device=kernel)}, "or from head to head"),
        ({"mask": torch.arange(K, device=kernel).float()}, "the mask adds other numbers"),
        ({"mask": lambda start, stop: table[start:stop]}, "the mask is a function of rows"),
        ({"log_prior": table}, "lanes would do"),
        ({"key_bias": torch.zeros(B, H, K, device=kernel)}, "key_bias has 4 heads and there are 2 key heads"),
        (
            {
                "log_prior": goat_prior(H)
                .to(kernel)
                .lanes(*(torch.arange(K, device=kernel),) * 2, dtype=torch.float64, num_kv_heads=HK)
            },
            "float64",
        ),
    ]
    for changed, reason in refused:
        with pytest.raises(NotImplementedError, match=rf"backend 'kernel' does not serve this call: .*{reason}"):
            row_statistics(query, key, backend="kernel", **options, **changed)
        row_statistics(query, key, **options, **changed)


def test_a_backend_must_be_known():
    (query, key), options = call()
    with pytest.raises(ValueError, match="row_statistics: backend must be"):
        row_statistics(query, key, backend="fast", **options)


def test_lanes_must_fit_the_call():
    (query, key), options = call()
    lanes = goat_prior(H).lanes(torch.arange(K - 1), torch.arange(K), dtype=torch.float32, num_kv_heads=HK)
    with pytest.raises(ValueError, match=r"row_statistics: log_prior must have lanes of 4 heads, 41 queries"):
        row_statistics(query, key, log_prior=lanes, **options)


def test_lanes_are_the_prior_that_they_state():
    (query, key), options = call(dtype=torch.float64, is_causal=True)
    prior = goat_prior(H, num_frequencies=3)
    at = torch.arange(K), torch.arange(K)
    lanes = row_statistics(query, key, log_prior=prior.lanes(*at, dtype=torch.float64, num_kv_heads=HK), **options)
    dense = row_statistics(query, key, log_prior=prior.dense(*at, dtype=torch.float64), **options)
    for name in ("entropy", "key_mass", "prior_margin", "column_mass", "expected_score"):
        ours, theirs = getattr(lanes, name), getattr(dense, name)
        assert_close(torch.nan_to_num(ours), torch.nan_to_num(theirs), tolerance=1e-10)
    moved = lanes.log_sum_exp - lanes.prior_log_sum_exp
    assert_close(moved, dense.log_sum_exp - dense.prior_log_sum_exp, tolerance=1e-10)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shift", [-3, 0, 5])
def test_intervals_count_what_a_table_counts(shift, is_causal, window):
    generator = torch.Generator().manual_seed(shift + 10)
    mask, counted = (torch.rand(2, size, generator=generator) < 0.6 for size in (9, 7))
    intervals = KeyIntervals(mask, 7, shift, is_causal, window)
    table = torch.zeros(2, 7, 9, dtype=torch.bool)
    for i in range(7):
        for j in range(9):
            inside = (not is_causal or j <= i + shift) and (window is None or j > i + shift - window)
            table[:, i, j] = mask[:, j] & inside
    assert torch.equal(intervals.num_keys(), table.sum(-1))
    assert torch.equal(intervals.num_queries_of_keys(counted), (table & counted[..., None]).sum(-2))
    chosen = torch.tensor([[0, 8, 3], [-1, 9, 5]])
    expected = table.gather(-1, chosen.clamp(0, 8)[:, None].expand(-1, 7, -1)) & ((chosen >= 0) & (chosen < 9))[:, None]
    assert torch.equal(intervals.admit(chosen), expected)
