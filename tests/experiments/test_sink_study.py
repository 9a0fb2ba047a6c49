"""The study of sinks: runs side by side, goes on after an interruption, and judges by intervals."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest

from eotattn.cli import main
from eotattn.experiments.figures import sink_study
from eotattn.experiments.figures.sink_claims import NAMES, SinkStudy, draw_sinks, sink_verdict
from eotattn.experiments.networks import ATTENTION_KINDS
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.tasks.token_text import DATA_VARIABLE, TokenText

SMOKE = sink_study.recipe("smoke")
TINY = replace(
    SMOKE,
    arms=tuple(arm for arm in sink_study.ARMS if arm.name in ("rope", "goat")),
    training=replace(SMOKE.training, steps=4, evaluate_every=2, log_every=2, checkpoint_every=2),
)


@pytest.fixture
def small_text(monkeypatch):
    """Four documents of random tokens a part in place of the standard library's files."""
    draw = np.random.default_rng(0)
    documents = {part: list(draw.integers(256, size=(4, 400))) for part in ("validation", "test")}
    text = TokenText(draw.integers(256, size=2000), documents, 256, 257, {"sha256": "small"})
    monkeypatch.setattr(TokenText, "open", lambda corpus: text)


def silent(line):
    pass


def test_arms_are_kinds_of_attention_with_a_name_each():
    assert all(arm.attention in ATTENTION_KINDS for arm in sink_study.ARMS)
    assert {arm.name for arm in sink_study.ARMS} <= NAMES.keys()
    for recipe in sink_study.RECIPES.values():
        names = [run.name for run in sink_study.runs(recipe, {})]
        assert len(set(names)) == len(names) == len(recipe.arms) * len(recipe.seeds)
        assert {name.partition("-seed")[2] for name in names[: len(recipe.arms)]} == {"0"}


def test_a_study_is_the_same_from_records_and_from_its_table(tmp_path, small_text):
    folder = ResultFolder(str(tmp_path), "smoke", "fig_sinks")
    perform(sink_study.runs, TINY, folder, jobs=1, report=silent)
    study = SinkStudy.read(TINY, str(tmp_path))
    study.save(str(tmp_path))
    for file in (folder.path / ".runs" / "fig_sinks").iterdir():
        file.unlink()
    again = SinkStudy.read(TINY, str(tmp_path))
    assert sink_verdict(again) == sink_verdict(study)
    pandas.testing.assert_frame_equal(again.arm_table(), study.arm_table())
    assert study.arms == ("rope", "goat")
    assert study.provenance["runs"].keys() == {"rope-seed0", "goat-seed0", "rope-seed1", "goat-seed1"}
    assert len(study.rows("head_mass", arm="goat")) == 2 * 2  # seeds, and heads of the one block
    assert set(study.rows("test_loss", arm="rope").length) == set(TINY.lengths)
    u = study.rows("head_key_only", arm="goat").groupby("seed").value.mean()  # of every head
    half = 12.7062 * u.std() / 2**0.5  # Student's t, one degree, 95 %
    assert f"u(0) less the mean of the others, nats, all heads: {u.mean():+.2f} ± {half:.2f}" in sink_verdict(study)
    assert draw_sinks(study).axes[0].get_title(loc="left").startswith("RoPE")


def test_no_run_starts_after_the_minutes(tmp_path, small_text):
    folder, lines = ResultFolder(str(tmp_path), "smoke", "fig_sinks"), []
    records = perform(sink_study.runs, TINY, folder, jobs=1, minutes=1e-3, report=lines.append)
    assert len(records) <= 1
    assert "did not start within 0.001 minutes" in lines[-1]


@pytest.mark.slow
def test_interrupted_side_by_side_it_goes_on_from_checkpoints(tmp_path):
    command = [sys.executable, "-m", "eotattn", "train", "--figure", "sinks", "--scale", "smoke"]
    command += ["--out", str(tmp_path), "--jobs", "2", "--only", "rope-*"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ, text=True)
    records = tmp_path / "smoke" / ".runs" / "fig_sinks"
    while process.poll() is None and not list(records.glob("*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "interrupted; finished runs are kept" in process.communicate()[0] or process.returncode == 0
    kept = {file: file.stat().st_mtime_ns for file in records.glob("*.json")}
    assert kept
    assert main(command[3:]) == 0
    assert {path.name for path in records.glob("*.json")} == {"rope-seed0.json", "rope-seed1.json"}
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())


# Verdicts -----------------------------------------------------------------------------------------------------------


def study_of(**values):
    """A study of made-up numbers: arm -> quantity -> one value a seed."""
    rows = [
        {"arm": arm, "seed": seed, "quantity": quantity, "value": value, "step": 10.0}
        for arm, quantities in values.items()
        for quantity, each in quantities.items()
        for seed, value in enumerate(each)
    ]
    for arm in values:
        for seed in range(3):
            place = {"arm": arm, "seed": seed}
            rows += [place | {"quantity": "massive", "value": 10.0}]
            for document in range(4):
                loss = 3.0 + 0.1 * document + (-0.2 + 0.01 * seed if arm == "goat" else 0.0)
                rows += [place | {"quantity": "test_loss", "length": 8, "document": document, "value": loss}]
            for removed in ("nothing", "eight_bits", "far_keys", "far_keys_but_the_first"):
                rows += [place | {"quantity": "loss_without", "removed": removed, "value": 3.0}]
    return SinkStudy(SMOKE, pandas.DataFrame(rows).assign(protocol=None), {})


@pytest.mark.parametrize(
    ("rates", "word"),
    [((0.4, 0.41, 0.42), "held"), ((0.0, 0.5, 0.1), "undecided"), ((-0.4, -0.41, -0.42), "refuted")],
)
def test_a_verdict_has_three_values(rates, word):
    study = study_of(rope={"sink_rate": rates}, rope_without_token={"sink_rate": (0.0, 0.0, 0.0)})
    assert f"sinks need a first token: {word}" in sink_verdict(study)


def test_a_saving_is_paired():
    study = study_of(rope={}, goat={})
    by_seed, by_document = study.saving("goat", over="rope", length=8)
    assert by_seed.mean == by_document.mean == pytest.approx(0.19)
    assert (by_seed.count, by_document.count) == (3, 4)
    assert by_document.half_width == pytest.approx(0.0, abs=1e-9)
    assert "GOAT, default form predicts better than RoPE at 8 tokens: held" in sink_verdict(study)


def test_one_seed_decides_nothing_about_sinks():
    study = study_of(rope={"sink_rate": (0.9,)}, rope_without_token={"sink_rate": (0.0,)})
    assert "sinks need a first token: undecided" in sink_verdict(study)


def test_missing_runs_and_data_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="SinkStudy: folder must hold runs or a table"):
        SinkStudy.read(TINY, str(tmp_path))
    wanted = ["train", "--figure", "sinks", "--scale", "gpu", "--out", str(tmp_path)]
    assert main([*wanted, "--data", str(tmp_path / "nowhere")]) == 2
    assert "--data must be a folder that exists" in capsys.readouterr().err
    assert main(wanted) == 2
    assert "--data must name a folder of prepared books" in capsys.readouterr().err
    assert main([*wanted, "--minutes", "0"]) == 2
    assert "--minutes must be positive" in capsys.readouterr().err
    assert main(["train", "--figure", "2", "--scale", "gpu", "--out", str(tmp_path)]) == 2
    assert "--scale must be one of 'smoke'" in capsys.readouterr().err
    assert not Path(tmp_path, "gpu", ".runs").exists()
