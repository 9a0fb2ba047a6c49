"""What explain says is what prior_attention does."""

import csv
from pathlib import Path

import pytest
import torch

from eotattn.attention import PackedDocuments, backends, explain, prior_attention
from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Band
from eotattn.attention.masks import Masks
from eotattn.attention.measured import TIMES, pattern_of, preference
from eotattn.kernels import flex, near, reference, sdpa, varlen
from eotattn.priors import RecencyPrior, RelativeBiasPrior, goat_prior

H = 4
CALLS = {
    "plain": {},
    "lanes": {"prior": goat_prior(H, num_frequencies=2), "is_causal": True},
    "no lanes": {"prior": RelativeBiasPrior(H, 3)},
    "nothing far": {"prior": RelativeBiasPrior(H, 5)},
    "weights": {"prior": RecencyPrior(H), "return_weights": True},
    "named": {"prior": RecencyPrior(H), "backend": "reference"},
    "window": {"prior": RecencyPrior(H), "is_causal": True, "window": 2},
    "documents": {"prior": RecencyPrior(H), "is_causal": True, "documents": PackedDocuments([2, 3])},
    "chunk": {"is_causal": True, "query_positions": range(2, 7), "key_positions": range(1, 6)},
    "padded": {"key_padding_mask": torch.tensor([[False, True, False, False, False]])},
}


def content(dtype=torch.float32, kv_heads=H):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, H, 5, 8), (1, kv_heads, 5, 8), (1, kv_heads, 5, 8))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_the_backend_named_is_the_backend_used(arguments, monkeypatch):
    used = []
    for name, kernel in (
        ("sdpa", sdpa),
        ("varlen", varlen),
        ("flex", flex),
        ("near_far", near),
        ("reference", reference),
    ):
        attend = kernel.attend

        def watched(*given, name=name, attend=attend, **named):
            used.append(name)
            return attend(*given, **named)

        monkeypatch.setattr(kernel, "attend", watched)
    explanation = explain(*content(), **arguments)
    assert used == []
    prior_attention(*content(), **arguments)
    assert used[-1] == explanation.backend
    assert set(explanation.alternatives) == {"sdpa", "near_far", "rebased", "flex", "varlen", "reference"} - {
        explanation.backend
    }


def test_a_refusal_is_explained_and_not_raised():
    arguments = {"prior": RelativeBiasPrior(H, 3), "backend": "sdpa"}
    explanation = explain(*content(), **arguments)
    assert explanation.backend is None
    assert "sdpa cannot serve the call with RelativeBiasPrior" in explanation.reason
    with pytest.raises(NotImplementedError, match="RelativeBiasPrior"):
        prior_attention(*content(), **arguments)


def test_width_lanes_and_error_are_those_of_the_call():
    prior = goat_prior(H, num_frequencies=2)
    single = explain(*content(), prior=prior, is_causal=True)
    assert (single.num_lanes, single.width) == (7, 15)
    half = explain(*content(torch.bfloat16), prior=prior, is_causal=True)
    assert half.num_lanes == prior.num_lanes(torch.bfloat16)
    assert half.error_bound > single.error_bound > 0
    shared = explain(*content(kv_heads=2), prior=prior, is_causal=True)
    assert shared.num_lanes == 8  # u(j) of the two query heads that share a key head lie side by side
    assert explain(*content(), **CALLS["padded"]).num_lanes == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_fused_one(dtype):
    explanation = explain(*content(dtype), prior=goat_prior(H), is_causal=True)
    assert explanation.kernel == "flash_attention"
    assert "flash_attention" in str(explanation)
    assert "or reference" in str(explanation)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        explain(*content(), backend="fastest")
    with pytest.raises(ValueError, match="have the query's 4 heads"):
        explain(*content(), prior=RecencyPrior(3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (CALLS["lanes"], "one fused call; the prior rides in lanes"),
        (CALLS["window"], "fused calls over blocks of the window"),
        (CALLS["documents"], "2 fused calls, one a document"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "one fused call with a Q x K mask"),
    ],
)
def test_the_reason_says_how_the_pattern_is_served(arguments, words):
    explanation = explain(*content(), **arguments)
    assert words in explanation.reason
    assert explanation.kernel == "flash_attention"
    assert "it is a GPU kernel" in explanation.alternatives["varlen"] or "mask of pairs" in str(explanation)


def test_the_reason_speaks_of_a_prior_where_there_is_one():
    assert explain(*content(), is_causal=True).reason == "one fused call"
    assert "prior" not in str(explain(*content(), is_causal=True, window=2).reason)
    with_prior = explain(*content(), prior=RecencyPrior(H), is_causal=True, window=2)
    assert with_prior.reason == "fused calls over blocks of the window; the prior rides in lanes"


def test_misspelled_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        explain(*content(), causal=True)


#: Where a number of the table comes from: pattern, backend, suite, rows, name in that suite.
SOURCES = [
    ("whole", "sdpa", "bench_attention", {"width": "64"}, "eotattn, GOAT, 4 frequencies, appended"),
    ("whole", "flex", "bench_attention", {"width": "64"}, "FlexAttention, learnable slopes"),
    ("documents", "flex", "bench_patterns", {"pattern": "documents"}, "eotattn, no prior, flex"),
]
for part in ("window", "documents"):
    for kernel in ("varlen", "sdpa"):
        of = {"pattern": part}
        SOURCES.append((part, kernel, "bench_patterns", of, f"eotattn, no prior, {kernel}"))
        SOURCES.append((f"{part}, prior", kernel, "bench_patterns", of, f"eotattn, recency + sink, {kernel}"))


@pytest.mark.parametrize(("pattern", "backend", "suite", "where", "name"), SOURCES)
def test_the_table_says_what_was_measured(pattern, backend, suite, where, name):
    """Within a third, since runs differ; every number that is stated has its source."""
    path = Path(__file__).parents[2] / "figures" / "h200" / f"{suite}.csv"
    if not path.exists():
        pytest.skip(f"{path.name} was not measured yet")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == name and where.items() <= row.items()]
    measured = {row["pass"]: float(row["ratio"]) if row["ratio"] else None for row in rows}
    for stated, found in zip(TIMES[pattern][backend], (measured["forward"], measured["forward+backward"]), strict=True):
        assert stated is None or stated == pytest.approx(found, rel=1 / 3)


def test_every_number_of_the_table_has_a_source():
    stated = {(p, name) for p, of in TIMES.items() for name, times in of.items() if times.forward is not None}
    assert stated == {(pattern, backend) for pattern, backend, *_ in SOURCES}


@pytest.mark.parametrize("pattern", TIMES)
def test_the_fastest_comes_first(pattern):
    for way in ("forward", "both"):
        found = [getattr(times, way) for name, times in TIMES[pattern].items() if name != "flex"]
        found = [time for time in found if time is not None]
        assert found == sorted(found)
    assert list(TIMES[pattern])[-1] == "reference"


PARTS = {"window": {"window": 2}, "documents": {"documents": PackedDocuments([2, 3])}}


@pytest.mark.parametrize("prior", [None, RecencyPrior(H)], ids=["no prior", "prior"])
@pytest.mark.parametrize("part", PARTS)
def test_calls_take_the_order_and_the_times_of_their_own_pattern(part, prior, monkeypatch):
    times = TIMES[part if prior is None else f"{part}, prior"]
    arguments = PARTS[part] | {"prior": prior, "is_causal": True}
    explanation = explain(*content(), **arguments)
    assert explanation.times == times[explanation.backend]
    call = AttentionCall.from_arguments(*content(), **arguments)
    for kind in {type(backend) for backend in backends.BACKENDS.values()}:
        monkeypatch.setattr(kind, "refusal", lambda self, call: None)
    assert backends.choose(call).name == next(iter(times))


@pytest.mark.parametrize(("width", "words"), [(64, "heads of 64)"), (8, "heads of 64; not at this call's 8)")])
def test_what_was_measured_names_its_width(width, words):
    explanation = explain(*[torch.zeros(1, H, 5, width)] * 3, prior=RecencyPrior(H), is_causal=True)
    assert words in str(explanation).split("measured")[1].split("\n")[0]


def test_what_was_measured_with_a_prior_is_not_said_of_calls_without():
    explanation = explain(*content(), is_causal=True)
    assert explanation.times.forward is None
    assert not any("1.43" in line or "1.84" in line for line in str(explanation).split("\n"))


def test_a_window_and_documents_are_told_apart_with_and_without_a_prior():
    band, documents = Masks(band=Band(0, 4)), Masks(documents=PackedDocuments([3, 5]))
    assert preference(band, 8, has_prior=False)[0] == preference(documents, 8, has_prior=False)[0] == "varlen"
    patterns = [pattern_of(masks, 8, has_prior=prior) for masks in (band, documents) for prior in (False, True)]
    assert patterns == ["window", "window, prior", "documents", "documents, prior"]
    assert preference(band, 8, has_prior=True)[0] == preference(documents, 8, has_prior=True)[0] == "sdpa"
    assert preference(Masks(band=Band()), 8, has_prior=True) == preference(band, 1, has_prior=True)
    assert preference(Masks(band=Band(4)), 8, has_prior=True)[0] == "varlen"
