"""The analysis as a whole: folder, page, tables, and everything that can be wrong with the input."""

import csv
import json
import re

import numpy as np
import pytest
import torch

import eotattn
from eotattn import cli
from eotattn.experiments.analysis import analyze, read_texts
from eotattn.integrations import capture
from eotattn.integrations.loading import load_local_model
from eotattn.records import write_atomically

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "key", "and", "query", "of", "a", "head", "make", "one", "row", "long", "<", "&"]
TEXTS = ["the key and the query", "one row of a head", "a long long row < & make the key", "query query the head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random sentence encoder with its tokenizer, as on disk."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("encoder")
    (path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab=str(path / "vocab.txt"))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_local_model(folder)


def test_folder_page_and_tables(folder, loaded, tmp_path):
    out = tmp_path / "report"
    result = analyze(folder, TEXTS, out=out)
    record = json.loads((out / "report.json").read_text())
    assert record["num_texts"] == len(TEXTS)
    assert {path.name for path in out.iterdir()} == {*record["files"], "report.json"}
    with (out / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["head"]) for row in rows[:2]] == [("encoder.layer.0.attention.self", h) for h in "01"]
    model, tokenizer = loaded
    with torch.no_grad(), capture(model) as captured:
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    first = next(iter(captured.layers.values()))
    mass = (first.column_mass[..., 0] / first.column_count[..., 0]).mean(0)
    np.testing.assert_allclose([float(row["sink mass of key 0"]) for row in rows[:2]], mass, rtol=1e-5)
    assert float(rows[0]["sink mass of key 0 low"]) <= mass[0] <= float(rows[0]["sink mass of key 0 high"])
    assert result.explained().shape == (2, 2)
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page), "the page refers to something outside"
    assert "[CLS]" in page
    assert page.count("data:image/png;base64,") == sum(name.endswith(".png") for name in record["files"])
    analyze(folder, TEXTS[:2], out=out)  # an earlier report may be replaced
    assert json.loads((out / "report.json").read_text())["num_texts"] == 2


def test_tokens_are_escaped(loaded, tmp_path):
    model, tokenizer = loaded
    analyze(model, [TEXTS[2]], tokenizer=tokenizer, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;" in page
    assert "<th><</th>" not in page


def test_maps_need_no_model(tmp_path):
    weights = torch.softmax(torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)), -1)
    np.save(tmp_path / "maps.npy", weights.numpy())
    result = analyze(attention=tmp_path / "maps.npy", out=tmp_path / "out", heads=[0, 2])
    assert result.heads.layers == ("0", "1")
    mass = weights[:, [0, 2], :, 0].mean(-1)
    np.testing.assert_allclose(result.heads.mean["sink mass of key 0"], mass, atol=1e-6)
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_interruption_keeps_finished_texts(loaded, tmp_path):
    model, tokenizer = loaded
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.encoder.layer[1].register_forward_pre_hook(interrupt)
    try:
        result = analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path / "out")
    finally:
        handle.remove()
    assert result.num_texts == 2
    assert result.heads.num_sequences == 2
    assert all(stats.num_sequences == 2 for stats in result.statistics.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_texts"] == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"analyze: texts must hold at least one text"),
        (["the key", " \n"], r"analyze: texts\[1\] must not be empty"),
    ],
)
def test_bad_texts_are_named(loaded, texts, message):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=message):
        analyze(model, texts, tokenizer=tokenizer)


def test_short_texts_are_named(loaded):
    model, tokenizer = loaded

    def bare(text, **options):
        return tokenizer(text, add_special_tokens=False, **options)

    with pytest.raises(ValueError, match=r"analyze: texts\[0\] must have at least two tokens"):
        analyze(model, ["key"], tokenizer=bare)
    with pytest.raises(ValueError, match=r"analyze: tokenizer must be given with a model object"):
        analyze(model, TEXTS)
    with pytest.raises(ValueError, match=r"analyze: model must be given if and only if"):
        analyze()


def test_long_texts_are_cut_to_the_models_positions(loaded):
    model, tokenizer = loaded
    result = analyze(model, ["the key and " * 50], tokenizer=tokenizer)
    assert int(next(iter(result.statistics.values())).num_queries[0]) == 32


def test_foreign_folders_are_left_alone(loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"analyze: out must be empty or hold an earlier report"):
        analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_failure_writes_nothing(loaded, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=r"capture: layers must be among"):
        analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path / "out", layers=[9])
    assert not (tmp_path / "out").exists()


def test_texts_come_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read_texts(tmp_path / "a.txt", None) == ["one\ntwo"]
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"text": "two"}\n')
    assert read_texts(None, tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "bad.jsonl").write_text('"one"\n{"words": 2}\n')
    with pytest.raises(ValueError, match=r"analyze: line 2 must hold a text"):
        read_texts(None, tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=r"analyze: texts must come from one file"):
        read_texts(None, None)
    with pytest.raises(ValueError, match=r"analyze: texts must be an existing file; got 'none.txt'"):
        read_texts(tmp_path / "none.txt", None)


def test_folders_without_safetensors_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"load_local_model: model must be a local folder"):
        load_local_model(tmp_path / "none")
    with pytest.raises(ValueError, match=r"load_local_model: model must hold config.json"):
        load_local_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_atomically(tmp_path / "config.json", json.dumps(config).encode())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"load_local_model: model must hold safetensors"):
        load_local_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    write_atomically(tmp_path / "config.json", json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}).encode())
    with pytest.raises(ValueError, match=r"load_local_model: model must need no code of its own"):
        load_local_model(tmp_path)


def test_command(folder, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS))
    out = tmp_path / "out"
    chosen = ["--layers", "0", "--heads", "1", "--max-length", "6"]
    assert cli.main(["analyze", str(folder), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out), *chosen]) == 0
    assert "encoder.layer.0.attention.self" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert record["layers"] == ["encoder.layer.0.attention.self"]
    assert np.shape(record["mean"]["entropy"]) == (1, 1)
    np.save(tmp_path / "maps.npy", np.full((1, 2, 4, 4), 0.25))
    assert cli.main(["analyze", "--attention", str(tmp_path / "maps.npy"), "--out", str(tmp_path / "maps")]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "none.txt"], "eotattn: error: analyze: texts must be an existing file; got 'none.txt'"),
        (["--attention", "none.npy"], "eotattn: error: read_maps: source must be an existing file; got 'none.npy'"),
        (["--text", __file__], "eotattn: error: load_local_model: model must be given"),
        (["nowhere", "--text", __file__], "eotattn: error: load_local_model: model must be a local folder"),
        (["x", "--text", __file__, "--dtype", "int8"], "eotattn: error: load_local_model: dtype must name a floating"),
    ],
)
def test_user_errors_of_the_command_are_one_line(arguments, says, tmp_path, capsys):
    assert cli.main(["analyze", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_package_offers_it_late():
    assert eotattn.analyze is analyze
    with pytest.raises(AttributeError, match="has no attribute 'analyse'"):
        _ = eotattn.analyse
