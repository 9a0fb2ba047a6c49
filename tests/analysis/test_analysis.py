"""The analysis as a whole: folder, page, tables, and everything that can be wrong with the input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from page_numbers import numbers_of

import eotattn
from eotattn import cli
from eotattn.analysis import analyze, findings, read_texts, run
from eotattn.analysis import folder as folder_module
from eotattn.diagnostics import fit_prior
from eotattn.diagnostics.value_statistics import value_drain
from eotattn.integrations import capture
from eotattn.integrations.loading import load_local_model
from eotattn.provenance import write_atomically

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


def test_folder_page_and_tables(folder, loaded, tmp_path, drawn):
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
    assert numbers_of((out / "report.html").read_text())["texts"][3][0] == "[CLS]"
    assert set(record["missing"]) == set()
    for name in ("value drain", "no-operation", "dormant", "certificate", "doubly stochastic distance", "omega"):
        assert f"{name} low" in rows[0]
        assert np.isfinite(record["mean"][name]).all()
    with (out / "residuals.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert [row["block"] for row in blocks] == ["encoder.layer.0", "encoder.layer.1"]
    assert (
        float(blocks[0]["first token low"]) <= float(blocks[0]["first token"]) <= float(blocks[0]["first token high"])
    )
    assert [path for path in tmp_path.iterdir() if path != out] == []


def test_values_and_residuals_are_those_of_the_model(loaded):
    model, tokenizer = loaded
    result = analyze(model, TEXTS[:1], tokenizer=tokenizer)
    seen = {}
    layer = model.encoder.layer[1]
    handles = [
        layer.attention.self.value.register_forward_hook(lambda module, args, output: seen.update(value=output)),
        layer.register_forward_hook(lambda module, args, output: seen.update(hidden=output)),
    ]
    with torch.no_grad():
        model(**tokenizer(TEXTS[0], return_tensors="pt"))
    for handle in handles:
        handle.remove()
    value = seen["value"].unflatten(-1, (2, 8)).transpose(1, 2)
    drains = value_drain(value, layer.attention.output.dense.weight)
    np.testing.assert_allclose(result.heads.mean["value drain"][1], drains[0].mean(-1).detach(), rtol=1e-5)
    np.testing.assert_allclose(result.heads.mean["value drain of the sink"][1], drains[0, :, 0].detach(), rtol=1e-5)
    hidden = (seen["hidden"][0] if isinstance(seen["hidden"], tuple) else seen["hidden"])[0].detach()
    norms = result.residuals
    assert norms.first_token["encoder.layer.1"] == pytest.approx([float(hidden[0].norm())])
    assert norms.largest["encoder.layer.1"] == pytest.approx([float(hidden.abs().max())])
    assert norms.largest_at["encoder.layer.1"] == [int(hidden.abs().amax(-1).argmax())]


def test_massive_activations_are_found(loaded):
    model, tokenizer = loaded

    def spike(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, 0, 3] = 5000.0
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.encoder.layer[0].register_forward_hook(spike)
    try:
        result = analyze(model, TEXTS[:2], tokenizer=tokenizer)
    finally:
        handle.remove()
    assert result.residuals.massive_share() == {"encoder.layer.0": 1.0, "encoder.layer.1": 0.0}
    assert result.residuals.largest_at["encoder.layer.0"] == [0, 0]


def test_an_earlier_report_is_replaced_whole(folder, tmp_path):
    out = tmp_path / "report"
    analyze(folder, TEXTS, out=out)
    analyze(folder, TEXTS[:2], out=out, layers=[1])
    record = json.loads((out / "report.json").read_text())
    assert record["num_texts"] == 2
    assert {path.name for path in out.iterdir()} == {*record["files"], "report.json"}
    assert "lags_1.png" in record["files"]
    assert "lags_0.png" not in record["files"]


def test_maps_need_no_model(tmp_path):
    weights = torch.softmax(torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)), -1)
    np.save(tmp_path / "maps.npy", weights.numpy())
    result = analyze(attention=tmp_path / "maps.npy", out=tmp_path / "out", heads=[0, 2])
    assert result.heads.layers == ("0", "1")
    assert result.heads.to_dict()["head"].tolist() == [0, 2, 0, 2]
    mass = weights[:, [0, 2], :, 0].mean(-1)
    np.testing.assert_allclose(result.heads.mean["sink mass of key 0"], mass, atol=1e-6)
    assert (tmp_path / "out" / "report.html").is_file()
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["missing"]["value drain"].startswith("needs values, and a linear layer")
    assert record["missing"]["intervals"] == "needs two texts or more"
    assert "residual norms" in record["missing"]


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("has_layers", [True, False])
def test_the_command_reads_every_form_of_maps(form, has_layers, tmp_path, capsys):
    weights = torch.softmax(torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)), -1)
    weights = weights if has_layers else weights[0]
    path = tmp_path / f"maps.{form}"
    if form == "npy":
        np.save(path, weights.numpy())
    elif form == "npz":
        np.savez(path, a=weights.numpy())
    else:
        pytest.importorskip("safetensors.torch").save_file({"a": weights}, path)
    out = tmp_path / "out"
    assert cli.main(["analyze", "--attention", str(path), "--out", str(out), "--heads", "1"]) == 0
    mean = json.loads((out / "report.json").read_text())["mean"]["entropy"]
    layers = weights if has_layers else weights[None]
    np.testing.assert_allclose(mean, -torch.special.xlogy(layers, layers).sum(-1).mean(-1)[:, [1]], rtol=1e-5)
    capsys.readouterr()


def test_chosen_layers_and_heads_keep_their_numbers(loaded, tmp_path):
    """In tables, records and on the page; what is chosen is chosen once."""
    model, tokenizer = loaded
    result = analyze(model, TEXTS, tokenizer=tokenizer, layers=[1], heads=[1], out=tmp_path / "out")
    assert (result.heads.numbers, result.heads.heads) == ((1,), (1,))
    for name in ("heads", "priors"):
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            assert {row["head"] for row in csv.DictReader(file)} == {"1"}
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (record["layer_numbers"], record["heads"]) == ([1], [1])
    data = numbers_of((tmp_path / "out" / "report.html").read_text())
    assert (data["numbers"], data["heads"]) == ([1], [1])
    whole = analyze(model, TEXTS, tokenizer=tokenizer)
    assert result.heads.mean["entropy"][0, 0] == pytest.approx(whole.heads.mean["entropy"][1, 1])
    for heads in ([], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"analyze: heads must name"):
            analyze(model, TEXTS, tokenizer=tokenizer, heads=heads)
    with pytest.raises(ValueError, match=r"analyze: layers must name at least one"):
        analyze(model, TEXTS, tokenizer=tokenizer, layers=[])


def test_intervals_of_layers_are_those_of_the_mean_over_heads(loaded, tmp_path):
    model, tokenizer = loaded
    result = analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path / "out")
    heads, stats = result.heads, list(result.statistics.values())
    for a, layer in enumerate(stats):
        of_text = (layer.sums["entropy"] / layer.num_queries[:, None]).mean(1).numpy()
        drawn = np.random.default_rng(0).integers(len(of_text), size=(4000, len(of_text)))
        wanted = np.quantile(of_text[drawn].mean(1), [0.025, 0.975])
        np.testing.assert_allclose(heads.layer_interval["entropy"][a], wanted, atol=0.1 * np.ptp(of_text))
        sink = layer.column_mass[..., 0] / layer.column_count[..., 0]
        rate = (sink > 0.3).double().mean(1)
        low, high = heads.sink_rate_interval[0.3][a]
        assert rate.min() <= low <= heads.sink_rate[0.3][a] == rate.mean() <= high <= rate.max()
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = [[float(row[f"entropy {side}"]) for side in ("low", "high")] for row in rows]
    np.testing.assert_allclose(written, heads.layer_interval["entropy"], rtol=1e-5)


def test_layers_of_maps_are_selected(tmp_path):
    weights = torch.softmax(torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)), -1)
    assert analyze(attention=weights, layers=[2, "0"]).heads.layers == ("0", "2")
    with pytest.raises(ValueError, match=r"analyze: layers must be among \{0: 0, 1: 1, 2: 2\}; got \[3\]"):
        analyze(attention=weights, layers=[3])
    with pytest.raises(ValueError, match=r"analyze: heads must name heads from 0 to 1; got \[2\]"):
        analyze(attention=weights, heads=[2])


def test_maps_that_are_not_square_have_no_prior(tmp_path):
    weights = torch.softmax(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), -1)
    result = analyze(attention=weights, out=tmp_path / "out")
    assert result.priors == {}
    assert "needs square attention" in result.needs["implicit prior"]
    with pytest.raises(ValueError, match=r"fit_prior: statistics must come from square attention"):
        fit_prior(next(iter(result.statistics.values())))


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
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (record["num_texts"], record["num_texts_given"]) == (2, 4)
    assert "2 of 4 texts" in (tmp_path / "out" / "report.html").read_text()
    assert not result.is_complete


def test_an_interrupted_command_says_what_was_kept(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS))
    own, out = run._run_batch, tmp_path / "out"
    arguments = ["analyze", str(folder), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out)]

    def interrupted_after(count):
        calls = []

        def run_text(*positional, **options):
            calls.append(1)
            if len(calls) > count:
                raise KeyboardInterrupt
            return own(*positional, **options)

        return run_text

    monkeypatch.setattr(run, "_run_batch", interrupted_after(0))
    assert cli.main(arguments) == 130
    assert "interrupted; no text was finished yet, and nothing was written" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(run, "_run_batch", interrupted_after(3))
    assert cli.main(arguments) == 130
    assert "3 of 4 texts that were finished" in capsys.readouterr().err
    assert json.loads((out / "report.json").read_text())["num_texts"] == 3


@pytest.mark.parametrize("when", ["to_png", "page"])
def test_an_interruption_while_writing_leaves_the_old_report_or_none(loaded, tmp_path, monkeypatch, when):
    model, tokenizer = loaded
    out, calls = tmp_path / "out", []

    def stop(*_, **__):
        calls.append(1)
        raise KeyboardInterrupt

    for there in (False, True):
        if there:
            analyze(model, TEXTS[:3], tokenizer=tokenizer, out=out)
        with monkeypatch.context() as patch:
            patch.setattr(folder_module, when, stop)
            with pytest.raises(KeyboardInterrupt):
                analyze(model, TEXTS[:1], tokenizer=tokenizer, out=out)
        assert out.exists() is there
        assert [path.name for path in tmp_path.iterdir()] == ["out"] * there
    assert json.loads((out / "report.json").read_text())["num_texts"] == 3
    assert len(calls) == 2
    plt.close("all")


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


def test_texts_longer_than_the_models_positions_are_named(loaded):
    model, tokenizer = loaded
    message = r"texts\[1\] must fit into the model's 32 positions; got '152 tokens'. Cut it with max_length=32"
    with pytest.raises(ValueError, match=message):
        analyze(model, ["the key", "the key and " * 50], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"analyze: max_length must be at most the model's 32 positions; got 33"):
        analyze(model, TEXTS, tokenizer=tokenizer, max_length=33)
    with pytest.raises(ValueError, match=r"analyze: max_length must be at least 2"):
        analyze(model, TEXTS, tokenizer=tokenizer, max_length=1)


def test_texts_are_cut_where_asked_and_that_is_said(loaded, tmp_path):
    model, tokenizer = loaded
    result = analyze(model, ["the key", "the key and " * 50], tokenizer=tokenizer, max_length=32, out=tmp_path / "out")
    assert next(iter(result.statistics.values())).num_queries.tolist() == [4, 32]
    assert result.num_cut == 1
    assert "1 of the texts were cut" in (tmp_path / "out" / "report.html").read_text()


def test_foreign_folders_are_left_alone(loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"analyze: out must be empty or hold an earlier report"):
        analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    analyze(model, TEXTS[:1], tokenizer=tokenizer, out=tmp_path / "out")
    (tmp_path / "out" / "note.txt").write_text("mine")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"analyze: out must be empty or hold an earlier report.*got \['note.txt'\]"):
        analyze(model, TEXTS[:2], tokenizer=tokenizer, out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match=r"analyze: out must be a folder that can be written; got '.*letter.txt"):
        analyze(model, TEXTS[:1], tokenizer=tokenizer, out=tmp_path / "letter.txt")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "report.json").write_text('{"mine": true}')
    with pytest.raises(ValueError, match=r"analyze: out must be empty or hold an earlier report"):
        analyze(model, TEXTS[:1], tokenizer=tokenizer, out=tmp_path / "json")


def test_places_that_cannot_hold_a_report_are_refused_before_any_work(tmp_path, monkeypatch):
    weights = torch.full((1, 3, 3), 1 / 3)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"analyze: out must be a folder that can be written; got '.*file/out"):
        analyze(attention=weights, out=tmp_path / "file" / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", tmp_path / "here"):
        with pytest.raises(ValueError, match=r"analyze: out must be neither the current folder nor a mount"):
            analyze(attention=weights, out=path)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(tmp_path, exists):
    target = tmp_path / "target"
    if exists:
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    analyze(attention=torch.full((1, 3, 3), 1 / 3), out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (target / "report.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "target"}


def test_failure_writes_nothing(loaded, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=r"analyze: layers must be among"):
        analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path / "out", layers=[9])
    with pytest.raises(ValueError, match=r"analyze: heads must name heads from 0 to 1"):
        analyze(model, TEXTS, tokenizer=tokenizer, out=tmp_path / "out", heads=[2])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "idle", [{"texts": TEXTS}, {"max_length": 4}, {"device": "cpu"}, {"dtype": "float32"}, {"tokenizer": "x"}]
)
def test_arguments_without_effect_are_refused_beside_maps(idle):
    (name,) = idle
    with pytest.raises(ValueError, match=rf"analyze: {name} must not be given with attention maps"):
        analyze(attention=torch.full((1, 3, 3), 1 / 3), **idle)


def test_arguments_without_effect_are_refused_beside_models(folder, loaded):
    model, tokenizer = loaded
    for name, value in (("device", "cpu"), ("dtype", "float32")):
        with pytest.raises(ValueError, match=rf"analyze: {name} must not be given with a model object"):
            analyze(model, TEXTS, tokenizer=tokenizer, **{name: value})
    with pytest.raises(ValueError, match=r"analyze: tokenizer must not be given with the folder of a model"):
        analyze(folder, TEXTS, tokenizer=tokenizer)
    pair = torch.nn.Module()
    pair.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match=r"analyze: model must be an encoder or a decoder, not both; got 'Module'"):
        analyze(pair, TEXTS, tokenizer=tokenizer)


def test_a_model_of_nan_is_named(folder):
    model, tokenizer = load_local_model(folder)
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight[0, 0] = torch.nan
    message = r"analyze: queries and keys of layer 'encoder.layer.1.attention.self' must be numbers; got 'NaN'"
    with pytest.raises(ValueError, match=message):
        analyze(model, TEXTS, tokenizer=tokenizer)


def test_positions_that_count_from_after_padding_are_not_there(loaded):
    """RoBERTa's first token has position 2: of 34 positions it can use 32."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.RobertaConfig(vocab_size=len(WORDS), pad_token_id=1, max_position_embeddings=34, **sizes)
    model = transformers.RobertaModel(config)
    words = "the " * 31  # 33 tokens
    assert eotattn.analyze(model, [words], tokenizer=loaded[1], max_length=32).num_cut == 1
    with pytest.raises(ValueError, match=r"texts\[0\] must fit into the model's 32 positions; got '33 tokens'"):
        eotattn.analyze(model, [words], tokenizer=loaded[1])


def test_texts_come_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read_texts(tmp_path / "a.txt", None) == ["one\ntwo"]
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"text": "two"}\n')
    assert read_texts(None, tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "marked.jsonl").write_text('\ufeff"one\u2028line"\r\n"two"', encoding="utf-8")
    assert read_texts(None, tmp_path / "marked.jsonl") == ["one\u2028line", "two"]
    (tmp_path / "marked.txt").write_text("\ufeffone", encoding="utf-8")
    assert read_texts(tmp_path / "marked.txt", None) == ["one"]
    (tmp_path / "bad.jsonl").write_text('"one"\n{"words": 2}\n')
    with pytest.raises(ValueError, match=r"read_texts: line 2 of texts must hold a text"):
        read_texts(None, tmp_path / "bad.jsonl")
    (tmp_path / "broken.jsonl").write_text('"one"\n{"text": \n')
    with pytest.raises(ValueError, match=r"read_texts: line 2 of texts must be JSON"):
        read_texts(None, tmp_path / "broken.jsonl")
    (tmp_path / "latin.txt").write_bytes("Gänse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"read_texts: text must be UTF-8; got '.*latin.txt'"):
        read_texts(tmp_path / "latin.txt", None)
    with pytest.raises(ValueError, match=r"read_texts: texts must come from one file"):
        read_texts(None, None)
    with pytest.raises(ValueError, match=r"read_texts: text must be an existing file; got '.*none.txt'"):
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


def test_damaged_folders_are_named(folder, tmp_path):
    save_file, load_file = (
        getattr(pytest.importorskip("safetensors.torch"), name) for name in ("save_file", "load_file")
    )
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop("encoder.layer.1.attention.self.query.weight")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"load_local_model: model must hold every weight of its class; got .*query"):
        load_local_model(broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"load_local_model: model must be readable \(.+\); got '.*broken'"):
        load_local_model(broken)
    with pytest.raises(ValueError, match=r"load_local_model: device must be a device of this machine; got 'cuda:77'"):
        load_local_model(folder, device="cuda:77")


def test_command(folder, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS))
    out = tmp_path / "out"
    chosen = ["--layers", "0", "--heads", "1", "--max-length", "6"]
    assert cli.main(["analyze", str(folder), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out), *chosen]) == 0
    assert "encoder.layer.0.attention.self" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert record["layers"] == ["encoder.layer.0.attention.self"]
    assert np.shape(record["mean"]["entropy"]) == (1, 1)
    assert max(record["mean"]["entropy"][0]) <= np.log(6) + 1e-6


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_command_is_the_function(folder, tmp_path, dtype, capsys):
    """Device, dtype, length, layers and heads mean the same from both doors; dtypes reach the model."""
    (tmp_path / "text.txt").write_text(TEXTS[2])
    shared = ["--dtype", dtype, "--device", "cpu", "--max-length", "9", "--layers", "1", "--heads", "0"]
    first = ["analyze", str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "a")]
    assert cli.main(first + shared) == 0
    options = {"dtype": dtype, "device": "cpu", "max_length": 9, "layers": [1], "heads": [0]}
    found = analyze(folder, [TEXTS[2]], out=tmp_path / "b", **options)
    printed = capsys.readouterr().out
    for name, said in (("a", str(found) + "\n\n"), ("b", "")):
        said += "\n".join([*findings(found), f"Page, with what each quantity is: {tmp_path}/{name}/report.html", ""])
        assert said in printed
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert one == other
    exact = analyze(folder, [TEXTS[2]], **{**options, "dtype": "float64"}).heads.mean["entropy"]
    error = np.abs(np.array(one["mean"]["entropy"]) - exact).max()
    assert error == 0 if dtype == "float64" else 0 < error < 0.05


def test_the_package_offers_it_late():
    assert eotattn.analyze is analyze
    with pytest.raises(AttributeError, match="has no attribute 'analyse'"):
        _ = eotattn.analyse


@pytest.mark.slow
def test_processes_of_torchrun_find_what_one_finds(folder, tmp_path, capsys):
    """Two processes share five texts through the command itself; every number of the report is the same."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in [*TEXTS, "the long row"]))
    (tmp_path / "command.py").write_text("import sys\nfrom eotattn.cli import main\nsys.exit(main())\n")
    command = [str(tmp_path / "command.py"), "analyze", str(folder), "--texts", str(tmp_path / "texts.jsonl")]
    command += ["--dtype", "float64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    several = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *command]
    call = [sys.executable, *several, "--out", str(tmp_path / "two")]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert cli.main([*command[1:], "--out", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out.replace(f"{tmp_path / 'one'}/", "")
    assert printed == done.stdout.replace(f"{tmp_path / 'two'}/", "")  # by the first process alone
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["num_texts"] == two["num_texts"] == 5
    for part in ("mean", "low", "high"):
        for name, grid in one[part].items():
            wanted, found = (np.array(table, dtype=float) for table in (grid, two[part][name]))
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10, err_msg=name)
    np.testing.assert_allclose(
        np.array(two["explained"], dtype=float), np.array(one["explained"], dtype=float), atol=1e-10
    )
    assert (tmp_path / "one" / "residuals.csv").read_text() == (tmp_path / "two" / "residuals.csv").read_text()
