"""Checkpoints of a run that transformers' own Trainer wrote: the numbers are those of the models loaded by hand."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from eotattn import cli
from eotattn.analysis import analyze, analyze_checkpoints, checkpoints_in, compare

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WORDS = ["<unk>", "<s>", "the", "key", "and", "query", "of", "a", "head", "make", "one", "row", "long"]
TEXTS = ["the key and the query and the key of one row", "a long long row make the key", "a row of one head and " * 3]
#: Texts in which a key with more than 0.3 is no matter of course.
LONG = [0, 2]


def tokenizer_of_words():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", pad_token="<unk>"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps on sentences of these words, a checkpoint every fourth."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(WORDS), **sizes))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, len(WORDS), (9,), generator=generator) for _ in range(24)]
    data = [{"input_ids": torch.cat([torch.ones(1, dtype=torch.int64), row.repeat(2)])} for row in rows]
    data = [row | {"labels": row["input_ids"]} for row in data]
    options = {"save_steps": 4, "max_steps": 12, "learning_rate": 0.03, "per_device_train_batch_size": 4}
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **options)
    transformers.Trainer(model, arguments, train_dataset=data, processing_class=tokenizer_of_words()).train()
    return folder


@pytest.fixture(scope="module")
def formation(run):
    return analyze_checkpoints(run, TEXTS)


def by_hand(path, text):
    """Loss and maps (A, H, L, L) of a checkpoint by eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ids = tokenizer_of_words()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(ids, labels=ids, output_attentions=True, output_hidden_states=True)
    return float(out.loss), torch.cat(out.attentions).double(), out.hidden_states


def test_checkpoints_are_found_in_the_order_of_steps(run, tmp_path):
    assert list(checkpoints_in(run)) == [4, 8, 12]
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "best"):
        (tmp_path / name).mkdir()
    assert list(checkpoints_in(tmp_path)) == [9, 10]
    (tmp_path / "config.json").touch()
    assert checkpoints_in(tmp_path) == {}, "a folder that is a model"


def test_numbers_are_those_of_the_models_loaded_by_hand(run, formation):
    table = formation.to_dict()
    for step, path in checkpoints_in(run).items():
        here = table["step"] == step
        losses, rates, previous, ratios = [], [], [], []
        for text in TEXTS:
            loss, maps, hidden = by_hand(path, text)
            at = maps.sum(-2).argmax(-1)
            admitting = torch.arange(maps.shape[-1], 0, -1)
            mass = maps.sum(-2).gather(-1, at[..., None])[..., 0] / admitting[at]
            losses.append(loss)
            rates.append((mass > 0.3).double().mean(-1))
            previous.append(maps.diagonal(-1, -2, -1).mean(-1).amax(-1))
            norms = torch.stack([state[0].norm(dim=-1) for state in hidden[1:]])
            ratios.append(norms[0, 0] / norms[0, 1:].mean())
        np.testing.assert_allclose(table["sink rate"][here], torch.stack(rates)[LONG].mean(0), atol=1e-12)
        np.testing.assert_allclose(table["previous-token score"][here], torch.stack(previous).mean(0), atol=1e-6)
        np.testing.assert_allclose(table["loss"][here], np.mean(losses), atol=1e-6)
        first = formation.analyses[formation.steps.index(step)].residuals
        block = first.blocks[0]
        found = np.divide(first.first_token[block], first.other_tokens[block])
        np.testing.assert_allclose(found, ratios, rtol=1e-5)


def test_changes_are_paired_over_texts(run, formation):
    first, last = ([by_hand(checkpoints_in(run)[step], text)[0] for text in TEXTS] for step in (4, 12))
    change = formation.change().change("loss")
    low, high = stats.t.interval(0.95, 2, np.mean(np.subtract(last, first)), stats.sem(np.subtract(last, first)))
    assert (change.low, change.high) == pytest.approx((low, high), abs=1e-5)
    assert change.high < change.mean + 5
    rows = formation.change(4, 8).to_frame()
    assert set(rows["layer"]) == {"all", "model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert {"entropy", "sink rate", "induction score"} <= set(rows["quantity"])
    assert set(rows["verdict"]) <= {"lower", "higher", "undecided"}
    same = compare(formation.analyses[0], formation.analyses[0])
    assert same.change("entropy").mean == 0
    with pytest.raises(ValueError, match="change: quantity must be among"):
        same.change("nothing")
    with pytest.raises(ValueError, match="change: steps must be among"):
        formation.change(5)


def test_the_command_writes_table_figure_and_pages(run, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    out = tmp_path / "out"
    assert cli.main(["analyze", str(run), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["step", "4", "8", "12"]
    assert "From step 4 to step 12:" in said
    assert f"{out}/steps.csv" in said
    with (out / "steps.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    files = json.loads((out / "report.json").read_text())["files"]
    assert sorted(files) == sorted(path.name for path in out.iterdir() if path.name != "report.json")
    assert {"step_4.html", "step_8.html", "step_12.html", "steps.png"} <= set(files)
    assert cli.main(["analyze", str(run), "--texts", str(tmp_path / "texts.jsonl"), "--out", str(out)]) == 0, "again"


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interruption_keeps_finished_checkpoints(run, formation, tmp_path, capsys, monkeypatch, finished):
    """Whether it comes between texts, where an analysis ends early, or before the first one."""
    ready = [*formation.analyses[:finished], replace(formation.analyses[finished], num_texts=1)]
    monkeypatch.setattr("eotattn.analysis.checkpoints.analyze", lambda *_, **__: ready.pop(0))
    (tmp_path / "text").write_text(TEXTS[0])
    command = ["analyze", str(run), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 130
    said = capsys.readouterr().err
    assert ("holds the 1 of 3 checkpoints" in said) == (finished == 1)
    assert (tmp_path / "out").exists() == (finished == 1)
    assert ready == []


def test_a_tokenizer_beside_the_checkpoints_is_read(run, formation, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for path in checkpoints_in(tmp_path / "run").values():
        for file in path.glob("tokenizer*"):
            file.replace(tmp_path / "run" / file.name)
    found = analyze_checkpoints(tmp_path / "run", TEXTS)
    np.testing.assert_array_equal(found.to_dict()["loss"], formation.to_dict()["loss"])


def test_what_is_missing_is_named_before_anything_is_loaded(run, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="analyze_checkpoints: folder must hold checkpoint-<step> folders"):
        analyze_checkpoints(tmp_path, TEXTS)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-12" / "model.safetensors").unlink()
    monkeypatch.setattr("eotattn.analysis.checkpoints.analyze", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"analyze_checkpoints: model must hold safetensors; got .*checkpoint-12"):
        analyze_checkpoints(tmp_path / "run", TEXTS)
    with pytest.raises(ValueError, match=r"analyze_checkpoints: texts\[1\] must not be empty"):
        analyze_checkpoints(run, ["a", " "])
    (tmp_path / "text").write_text("the key")
    assert (
        cli.main(["analyze", str(tmp_path / "run"), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "o")])
        == 2
    )
    assert "checkpoint-12" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_analyses_of_other_texts_are_not_compared(run, formation):
    maps = analyze(attention=torch.full((2, 2, 4, 4), 0.25))
    assert np.isnan(maps.loss).all(), "maps predict nothing"
    others = analyze(run / "checkpoint-4", [*TEXTS[:2], "one row"])
    for other, words in ((maps, "1 texts beside 3"), (others, "3 texts beside 3")):
        with pytest.raises(ValueError, match=f"compare: second must be of the texts of first; got '{words}'"):
            compare(formation.analyses[0], other)
    with pytest.raises(ValueError, match="compare: first must be of at least two texts"):
        compare(maps, maps)
    with pytest.raises(TypeError, match="compare: second must be an analysis"):
        compare(maps, 3)


def test_no_sink_is_told_in_texts_too_short_for_one(run):
    formation = analyze_checkpoints(run, TEXTS[1:2] * 2)
    assert np.isnan(formation.to_dict()["sink rate"]).all()
    assert "too short to tell a sink" in str(formation)
    assert len(formation.plot().axes) > 3
    assert np.isfinite(formation.change().change("loss").mean)
