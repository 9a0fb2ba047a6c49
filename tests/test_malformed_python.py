"""Malformed calls of Python: each raises one line that names what was called and what was given."""

import re

import numpy as np
import pytest
import torch

import eotattn
from eotattn import (
    ForgettingPrior,
    FourierPrior,
    GoatAttention,
    GridPrior,
    PriorAttention,
    RecencyPrior,
    RelativeBiasPrior,
    Rotary,
    SinkPrior,
    TransportProblem,
    explain,
    factorise,
    goat_prior,
    grid_positions,
    prior_attention,
    solve,
    with_dummy_key,
)
from eotattn.analysis import ByteTokenizer, analyze, code_samples, prose_samples, read_texts
from eotattn.attention import KeyValueCache, PackedDocuments
from eotattn.benchmarks.report import bench
from eotattn.benchmarks.suites import configure
from eotattn.diagnostics import fit_grid_prior, fit_prior, head_report, sink_mass
from eotattn.diagnostics.equivalence import measure_equivalences
from eotattn.experiments.reproduce import make_runs, reproduce
from eotattn.experiments.results import ResultFolder
from eotattn.integrations import capture, map_statistics, read_maps
from eotattn.integrations.loading import load_local_model
from eotattn.priors import alibi_slopes, split_parameters
from eotattn.transport import certify

NAN, INF = float("nan"), float("inf")
X, MAPS = torch.ones(1, 2, 5, 8), torch.full((2, 4, 4), 0.25)
STATISTICS = map_statistics(read_maps(MAPS))
SCORE, TOKENS = torch.zeros(2, 3), torch.ones(1, 5, 16)


def attend(query=X, key=X, value=X, **options):
    return prior_attention(query, key, value, **options)


def listen(model, **options):
    with capture(model, **options):
        pass


#: (what is called, its arguments, what the message says after the name of what was called).
PRIORS = [
    (goat_prior, (0,), "num_heads must be at least 1; got 0"),
    (goat_prior, (-1,), "num_heads must be at least 1; got -1"),
    (goat_prior, (2.0,), "num_heads must be an integer; got 2.0"),
    (goat_prior, ("2",), "num_heads must be an integer; got '2'"),
    (goat_prior, (True,), "num_heads must be an integer; got True"),
    (FourierPrior, (0,), "num_heads must be at least 1; got 0"),
    (FourierPrior, (2, 0), "num_frequencies must be at least 1; got 0"),
    (FourierPrior, (2, 1.5), "num_frequencies must be an integer; got 1.5"),
    (RecencyPrior, (0,), "num_heads must be at least 1; got 0"),
    (RecencyPrior, (None,), "num_heads must be an integer; got None"),
    (SinkPrior, (0,), "num_heads must be at least 1; got 0"),
    (SinkPrior, ("two",), "num_heads must be an integer; got 'two'"),
    (RelativeBiasPrior, (0, 4), "num_heads must be at least 1; got 0"),
    (ForgettingPrior, (8, 0), "num_heads must be at least 1; got 0"),
    (GridPrior, (RecencyPrior(2), None), "axes must be a LogPrior"),
    (alibi_slopes, (0,), "num_heads must be at least 1; got 0"),
    (alibi_slopes, (1.5,), "num_heads must be an integer; got 1.5"),
    (grid_positions, (0, 3), "height must be at least 1; got 0"),
    (grid_positions, (3, 1.5), "width must be an integer; got 1.5"),
]

LAYERS = [
    (GoatAttention, (64, 0), "num_heads must be at least 1; got 0"),
    (GoatAttention, (0, 4), "embed_dim must be at least 1; got 0"),
    (GoatAttention, (64, 7), "embed_dim must be a multiple of num_heads (7); got 64"),
    (GoatAttention, ("64", 4), "embed_dim must be an integer; got '64'"),
    (PriorAttention, (0, 4), "embed_dim must be at least 1; got 0"),
    (PriorAttention, (64, 0), "num_heads must be at least 1; got 0"),
    (PriorAttention, (64, 7), "embed_dim must be a multiple of num_heads (7); got 64"),
    (PriorAttention, (64, 1.5), "num_heads must be an integer; got 1.5"),
    (Rotary, (0,), "width must be at least 2; got 0"),
    (Rotary, (7,), "rotary_width must be even and at most 7; got 7"),
    (KeyValueCache, (1, 2, 0, 8, 8), "max_length must be at least 1; got 0"),
    (PackedDocuments, ([],), "lengths must not be empty; got ()"),
    (PackedDocuments, ([3, 0],), "lengths must be at least 1; got 0"),
]

ATTENTION = [
    ({"query": [[1.0]]}, "query must be a tensor; got <class 'list'>"),
    ({"query": None}, "query must be a tensor; got <class 'NoneType'>"),
    ({"query": np.ones((1, 2, 5, 8))}, "query must be a tensor; got <class 'numpy.ndarray'>"),
    ({"query": X.long()}, "query must have a floating dtype; got shape (1, 2, 5, 8), torch.int64, cpu"),
    ({"query": X[0]}, "query must have shape (B, heads, length, width); got shape (2, 5, 8)"),
    ({"key": X[..., :7]}, "key must have shape (1, any, any, 8); got shape (1, 2, 5, 7)"),
    ({"key": X.double()}, "key must have the query's dtype torch.float32"),
    (
        {"key": X[:, :1].repeat(1, 3, 1, 1), "value": X[:, :1].repeat(1, 3, 1, 1)},
        "key must have a number of heads that divides the query's 2",
    ),
    ({"value": X[:, :, 1:]}, "value must have shape (1, 2, 5, any); got shape (1, 2, 4, 8)"),
    ({"value": X[:, :1]}, "value must have shape (1, 2, 5, any); got shape (1, 1, 5, 8)"),
    ({"query": X[:, :, :0]}, "query must not be empty; got shape (1, 2, 0, 8)"),
    ({"prior": "recency"}, "prior must be a LogPrior"),
    ({"prior": RecencyPrior}, "prior must be a LogPrior"),
    ({"prior": RecencyPrior(3)}, "prior must have the query's 2 heads; got 3"),
    ({"backend": "flash"}, "backend must be one of"),
    ({"dropout_p": 1.5}, "dropout_p must lie in [0, 1); got 1.5"),
    ({"dropout_p": "0.1"}, "dropout_p must be a number; got '0.1'"),
    ({"scale": 0.0}, "scale must be positive and finite; got 0.0"),
    ({"scale": NAN}, "scale must be positive and finite; got nan"),
    ({"window": 0}, "window must be at least 1; got 0"),
]

PROBLEMS = [
    (TransportProblem, ([[0.0]],), {}, "score must be a tensor"),
    (TransportProblem, (SCORE.long(),), {}, "score must have a floating dtype; got shape (2, 3), torch.int64, cpu"),
    (TransportProblem, (SCORE[0],), {}, "score must have shape (..., queries, keys)"),
    (TransportProblem, (SCORE * NAN,), {}, "score must be finite; got '6 such entries of 6'"),
    (TransportProblem, (SCORE,), {"epsilon": 0.0}, "epsilon must be positive and finite; got 0.0"),
    (TransportProblem, (SCORE,), {"epsilon": "1"}, "epsilon must be a number; got '1'"),
    (TransportProblem, (SCORE,), {"epsilon": INF}, "epsilon must be positive and finite; got inf"),
    (TransportProblem, (SCORE,), {"key_marginal": torch.ones(2) / 2}, "key_marginal must have shape"),
    (
        TransportProblem,
        (SCORE,),
        {"key_marginal": torch.tensor([2.0, -1.0, 0.0])},
        "key_marginal must be non-negative; got",
    ),
    (
        TransportProblem,
        (SCORE,),
        {"key_marginal": torch.ones(3)},
        "key_marginal must sum to one under an infinite penalty; got",
    ),
    (TransportProblem, (SCORE,), {"query_penalty": -1.0}, "query_penalty must be non-negative; got -1.0"),
    (
        TransportProblem,
        (SCORE,),
        {"log_prior": torch.zeros(3, 3)},
        "log_prior must have shape (..., 2, 3); got shape (3, 3)",
    ),
    (with_dummy_key, (SCORE, "0"), {}, "logit must be a number or a tensor; got '0'"),
    (
        with_dummy_key,
        (SCORE, 0.0),
        {"key_marginal": torch.ones(3) / 3, "untransported": 0.25},
        "key_marginal must sum to 1 - untransported, 0.75; got 1.0",
    ),
    (ForgettingPrior, (8, 2), {"half_lives": 4.0}, "half_lives must be a list of numbers, tokens; got 4.0"),
    (factorise, (RecencyPrior(2), 64), {"tolerance": 0.1}, "positions must be a tensor; got 64"),
    (factorise, (RecencyPrior(2), range(64)), {"tolerance": 0.1}, "positions must be a tensor; got range(0, 64)"),
    (explain, (X, X, X), {"prior": RecencyPrior(3)}, "prior must have the query's 2 heads; got 3"),
    (explain, (X, X, X), {"prior": goat_prior}, "prior must be a LogPrior; got <function goat_prior"),
    (
        explain,
        (X, X, X),
        {"prior": SCORE},
        "prior must be a LogPrior; got shape (2, 3), torch.float32, cpu. Wrap numbers: Dense",
    ),
    (split_parameters, ([],), {}, "module must be a module; got []. Wrap a list: nn.ModuleList"),
    (solve, (SCORE,), {}, "problem must be a TransportProblem"),
    (solve, (None,), {}, "problem must be a TransportProblem"),
    (certify, (None, SCORE), {}, "weights must be a tensor; got <class 'NoneType'>"),
]

ANALYSIS = [
    (analyze, (), {}, "model must be given if and only if attention is not; got None. Pass one of the two"),
    (analyze, ("nowhere", ["a text"]), {}, "model must be a local folder; got 'nowhere'"),
    (analyze, ("nowhere", "a text"), {}, "texts must be a list of texts; got <class 'str'>"),
    (analyze, ("nowhere", []), {}, "texts must hold at least one text; got []"),
    (analyze, ("nowhere", [""]), {}, "texts[0] must not be empty; got ''"),
    (analyze, ("nowhere", ["a text", 3]), {}, "texts[1] must be a text; got 3"),
    (analyze, ("nowhere", None), {}, "texts must be a list of texts; got <class 'NoneType'>"),
    (analyze, ("nowhere", ["a text"]), {"tokenizer": ByteTokenizer(8)}, "tokenizer must not be given with the folder"),
    (analyze, ("nowhere", ["a text"]), {"dtype": "int8"}, "dtype must be one of 'float16', 'bfloat16'"),
    (analyze, ("nowhere", ["a text"]), {"device": "gpu"}, "device must be a device of this machine; got 'gpu'"),
    (analyze, ("nowhere", ["a text"]), {"max_length": 1}, "max_length must be at least 2; got 1"),
    (analyze, ("nowhere", ["a text"]), {"max_length": "9"}, "max_length must be an integer; got '9'"),
    (analyze, (torch.nn.Linear(2, 2), ["a text"]), {}, "tokenizer must be given with a model object; got None"),
    (analyze, (torch.nn.Linear(2, 2), ["a text"]), {"dtype": "float32"}, "dtype must not be given with a model object"),
    (analyze, (3, ["a text"]), {}, "model must be a module or the folder of one; got 3"),
    (analyze, (), {"attention": "none.npy"}, "attention must be an existing file; got 'none.npy'"),
    (analyze, (), {"attention": 3}, "attention must be an array; got <class 'int'>"),
    (analyze, (), {"attention": {}}, "attention must hold at least one map; got {}"),
    (analyze, (), {"attention": MAPS[0]}, "the maps must have shape (H, Q, K) or (layers, H, Q, K)"),
    (analyze, (), {"attention": MAPS * NAN}, "the map '0' must be finite; got '32 such entries of 32'"),
    (analyze, (), {"attention": MAPS * 2}, "the map '0' must have rows that sum to one"),
    (analyze, (), {"attention": MAPS, "heads": [2]}, "heads must name heads from 0 to 1; got [2]"),
    (analyze, (), {"attention": MAPS, "heads": 1}, "heads must be a list of whole numbers; got 1"),
    (analyze, (), {"attention": MAPS, "heads": []}, "heads must name at least one, and each once; got []"),
    (analyze, (), {"attention": MAPS, "layers": ["first"]}, "layers must be among {0: 0}; got ['first']"),
    (analyze, (), {"attention": MAPS, "layers": 0}, "layers must be a list of names and numbers; got 0"),
    (analyze, (), {"attention": MAPS, "max_length": 4}, "max_length must not be given with attention maps; got 4"),
    (read_texts, (None, None), {}, "texts must come from one file; got (None, None)"),
    (read_texts, ("none.txt", None), {}, "text must be an existing file; got 'none.txt'"),
    (read_texts, (None, "none.jsonl"), {}, "texts must be an existing file; got 'none.jsonl'"),
    (prose_samples, (0,), {}, "count must be at least 1; got 0"),
    (code_samples, (-1,), {}, "count must be at least 1; got -1"),
    (load_local_model, (None,), {}, "model must be given; got None"),
    (load_local_model, ("nowhere",), {}, "model must be a local folder; got 'nowhere'"),
]

READINGS = [
    (read_maps, (None,), {}, "attention must be an array; got <class 'NoneType'>"),
    (read_maps, ("maps.txt",), {}, "attention must be an existing file; got 'maps.txt'"),
    (read_maps, (np.array([[["a"]]]),), {}, "the maps must be numbers; got"),
    (read_maps, (MAPS - 1,), {}, "the map '0' must lie in [0, 1]"),
    (map_statistics, (MAPS,), {}, "maps must map names to maps; got shape (2, 4, 4), torch.float32, cpu"),
    (map_statistics, ({"0": MAPS},), {"heads": [5]}, "heads must name heads from 0 to 1; got [5]"),
    (listen, (3,), {}, "model must be a module; got <class 'int'>"),
    (listen, (torch.nn.Linear(2, 2),), {"layers": []}, "layers must name at least one"),
    (fit_prior, (None,), {}, "statistics must be SequenceStatistics; got None"),
    (fit_prior, (MAPS,), {}, "statistics must be SequenceStatistics; got shape (2, 4, 4)"),
    (fit_prior, (STATISTICS,), {}, "statistics must be SequenceStatistics; got"),
    (fit_prior, (STATISTICS["0"],), {"num_folds": 1}, "num_folds must be at least 2; got 1"),
    (fit_prior, (STATISTICS["0"],), {"num_bootstraps": -1}, "num_bootstraps must be at least 1; got -1"),
    (fit_prior, (STATISTICS["0"],), {"smoothing": 0.0}, "smoothing must be positive and finite; got 0.0"),
    (fit_prior, (STATISTICS["0"],), {"tolerance": NAN}, "tolerance must be positive and finite; got nan"),
    (fit_grid_prior, (None,), {}, "statistics must be GridStatistics; got None"),
    (head_report, ({},), {}, "layers must hold at least one layer; got {}"),
    (head_report, (None,), {}, "layers must map names to statistics; got None"),
    (head_report, (STATISTICS,), {"thresholds": [2.0]}, "thresholds must lie in (0, 1); got 2.0"),
    (head_report, (STATISTICS,), {"sink_positions": []}, "sink_positions must name at least one key; got []"),
    (sink_mass, (None,), {}, "attention_weights must be a tensor; got <class 'NoneType'>"),
    (measure_equivalences, (), {"seed": -1}, "seed must be at least 0; got -1"),
    (measure_equivalences, (), {"seed": 2**63}, "seed must be below 2^63"),
    (measure_equivalences, (), {"device": "gpu"}, "device must be a device of this machine; got 'gpu'"),
]

EXPERIMENTS = [
    (reproduce, ([9],), {}, "figures must be among 1, 2, 3, 4, 5, ablations, sinks, books; got ['9']"),
    (
        reproduce,
        ("1",),
        {"scale": "huge"},
        "scale must be one of 'smoke', 'laptop', 'h200', 'paper', 'gpu'; got 'huge'",
    ),
    (reproduce, ("1",), {"jobs": 0}, "jobs must be at least 1; got 0"),
    (reproduce, ("1",), {"jobs": 1.5}, "jobs must be an integer; got 1.5"),
    (reproduce, ("1",), {"out": __file__}, "out must be a folder that can be written; got"),
    (make_runs, (["one"],), {}, "figures must be among 1, 2, 3, 4, 5, ablations, sinks, books; got ['one']"),
    (make_runs, ("1",), {"scale": None}, "scale must be one of"),
    (make_runs, ("1",), {"jobs": "2"}, "jobs must be an integer; got '2'"),
    (make_runs, ("1",), {"out": __file__}, "out must be a folder that can be written; got"),
    (make_runs, ("1",), {"only": "goat-*"}, "only must be a list of names; got 'goat-*'"),
    (ResultFolder, (__file__, "smoke", "fig"), {}, "out must be a folder that can be written; got"),
    (ResultFolder, ("out", "huge", "fig"), {}, "scale must be one of"),
    (bench, ("speed", None), {}, "suite must be one of 'overview'"),
    (configure, ("gpu", "float32", "small", 3), {}, "device must be a device of this machine; got 'gpu'"),
    (configure, ("cpu", "half", "small", 3), {}, "dtype must be one of"),
    (configure, ("cpu", "float32", "tiny", 3), {}, "sizes must be one of"),
    (configure, ("cpu", "float32", "small", 0), {}, "rounds must be at least 1; got 0"),
]

#: What is called under another name than its own.
NAMES = {attend: "prior_attention", listen: "capture", make_runs: "train", configure: "bench"}

CALLS = [
    *[(function, arguments, {}, says) for function, arguments, says in (*PRIORS, *LAYERS)],
    *[(attend, (), options, says) for options, says in ATTENTION],
    *PROBLEMS,
    *ANALYSIS,
    *READINGS,
    *EXPERIMENTS,
]


def name_of(function):
    return NAMES.get(function, function.__name__)


def test_there_are_enough_calls():
    assert len(CALLS) >= 130


@pytest.mark.parametrize(
    ("function", "arguments", "options", "says"),
    [pytest.param(*row, id=f"{name_of(row[0])}-{n}") for n, row in enumerate(CALLS)],
)
def test_a_malformed_call_is_one_line_that_names_what_was_called(
    function, arguments, options, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as refused:
        function(*arguments, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"{name_of(function)}: {says}"), message
    assert re.search(r"; got .+\. \S.+\.$", message), message  # what was given, and what to do
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="module 'eotattn' has no attribute 'Goat'"):
        eotattn.Goat  # noqa: B018
