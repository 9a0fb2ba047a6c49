"""Runs: made once, kept whole, made side by side with the same numbers, and none lost to another's failure."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from eotattn.cli import main
from eotattn.experiments import reproduce
from eotattn.experiments.records import Measurement, Run, RunFolder, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import RunsFailedError, perform
from eotattn.experiments.tasks import PASSKEY, RetrievalTask


@dataclass(frozen=True)
class Draw:
    """How many numbers to draw, and what happens then."""

    count: int
    seed: int
    event: str = ""


def measure(draw, checkpoint):
    """Draw numbers; the first attempt of an event leaves a checkpoint, later ones find it."""
    if draw.event and not checkpoint.exists():
        checkpoint.write_text("half-way")
        if draw.event == "raise":
            raise RuntimeError("no numbers today")
        if draw.event == "interrupt":
            raise KeyboardInterrupt
        if draw.event == "die":
            os._exit(3)
        if draw.event == "wait":
            time.sleep(100)
    numbers = torch.randn(draw.count)
    rows = [{"quantity": "mean", "value": float(numbers.mean())}, {"quantity": "gap", "value": float("nan")}]
    rows += [{"quantity": "number", "value": float(number)} for number in numbers]
    return Measurement(rows, summary=f"mean {float(numbers.mean()):.3f}")


def runs(recipe, records):
    """One run a name; the recipe is a dict of configurations."""
    return [Run(name, draw, measure) for name, draw in recipe.items()]


THREE = {"a-seed0": Draw(3, 0), "a-seed1": Draw(3, 1), "b-seed0": Draw(5, 0)}


@pytest.fixture
def folder(tmp_path):
    return ResultFolder(str(tmp_path), "smoke", "fig9_draws")


def silent(line):
    pass


def numbers(record, quantity="number"):
    return [row["value"] for row in record.rows if row["quantity"] == quantity]


def value(record, quantity):
    (only,) = numbers(record, quantity)
    return only


def check_numbers(records):
    """Every run saw torch's generator seeded with its own seed."""
    for name, draw in THREE.items():
        expected = torch.randn(draw.count, generator=torch.Generator().manual_seed(draw.seed))
        assert numbers(records[name]) == expected.tolist()
        assert value(records[name], "mean") == pytest.approx(expected.mean().item())


def test_runs_see_their_own_seed(folder):
    records = perform(runs, THREE, folder, jobs=1, report=silent)
    assert list(records) == list(THREE)
    check_numbers(records)


@pytest.mark.slow
def test_side_by_side_runs_give_the_same_numbers_and_survive_others(folder):
    """One run raises and one takes its process with it."""
    recipe = {"bad-seed0": Draw(2, 0, "raise"), "dead-seed0": Draw(2, 0, "die")} | THREE
    lines = []
    with pytest.raises(RunsFailedError, match="runs failed: bad-seed0, dead-seed0") as failed:
        perform(runs, recipe, folder, jobs=2, report=lines.append)
    assert sorted(failed.value.names) == ["bad-seed0", "dead-seed0"]
    reported = {line.split(":")[0]: line for line in lines}
    assert set(reported) == set(recipe)
    assert "FAILED" in reported["bad-seed0"]
    assert "no numbers today" in reported["bad-seed0"]
    assert "its process ended before the run did" in reported["dead-seed0"]
    check_numbers(perform(runs, THREE, folder, jobs=1, report=lines.append))
    assert sum("stored" in line for line in lines) == 3


def test_the_callers_generator_is_left_alone(folder):
    torch.manual_seed(7)
    expected = torch.randn(2)
    torch.manual_seed(7)
    perform(runs, THREE, folder, jobs=1, report=silent)
    assert torch.equal(torch.randn(2), expected)


def test_stored_runs_are_read_where_the_configuration_is_equal(folder):
    first = perform(runs, THREE, folder, jobs=1, report=silent)
    lines = []
    again = perform(runs, THREE | {"b-seed0": Draw(6, 0)}, folder, jobs=1, report=lines.append)
    assert [line.split(":")[1].split(",")[0] for line in lines[:2]] == [" stored", " stored"]
    assert "cpu, 20" in lines[0]  # device and date
    assert "stored" not in lines[2]
    assert len(numbers(again["b-seed0"])) == 6
    assert again["a-seed1"].provenance == first["a-seed1"].provenance
    assert again["a-seed1"].rows[0] == first["a-seed1"].rows[0]
    assert np.isnan(value(again["a-seed1"], "gap"))


def test_a_record_is_json_and_says_where_it_comes_from(folder):
    perform(runs, {"a-seed0": Draw(3, 0)}, folder, jobs=1, report=silent)
    store = folder.path / ".runs" / "fig9_draws"
    assert [path.name for path in store.iterdir()] == ["a-seed0.json"]
    stored = json.loads((store / "a-seed0.json").read_text())
    assert stored["configuration"] == {"count": 3, "seed": 0, "event": ""}
    assert stored["provenance"]["command"] == "eotattn train --figure fig9_draws --scale smoke --only a-seed0"
    assert {"commit", "versions", "date", "seed"} <= set(stored["provenance"])


def test_records_of_earlier_versions_are_read_where_rows_say_everything(folder):
    """They had an archive of arrays beside them, which is empty where a run measured rows alone, as that of sinks."""
    perform(runs, THREE, folder, jobs=1, report=silent)
    np.savez_compressed(RunFolder(folder).path / "a-seed0.npz")
    np.savez_compressed(RunFolder(folder).path / "a-seed1.npz", u=np.zeros(3))
    lines = []
    perform(runs, THREE, folder, jobs=1, report=lines.append)
    assert ["stored" in line for line in lines] == [True, True, False]  # those that are stored are reported first
    assert lines[-1].startswith("a-seed1")
    lines.clear()
    perform(runs, THREE, folder, jobs=1, report=lines.append)
    assert all("stored" in line for line in lines)


def test_damaged_records_are_named(folder):
    perform(runs, THREE, folder, jobs=1, report=silent)
    file = RunFolder(folder).path / "a-seed0.json"
    file.write_bytes(file.read_bytes()[:40])
    says = r"RunFolder: a-seed0\.json must be whole; got \w+\. Copy it again, or .* --fresh --only a-seed0"
    with pytest.raises(ValueError, match=says):
        perform(runs, THREE, folder, jobs=1, report=silent)


def test_a_failing_run_is_named_and_the_others_finish(folder):
    recipe = {"bad-seed0": Draw(2, 0, "raise")} | THREE
    lines = []
    with pytest.raises(RunsFailedError, match="runs failed: bad-seed0"):
        perform(runs, recipe, folder, jobs=1, report=lines.append)
    assert "no numbers today" in lines[0]
    assert len(lines) == 4
    lines.clear()
    perform(runs, recipe, folder, jobs=1, report=lines.append)  # continues from the checkpoint, which now exists
    assert ["stored" in line for line in lines].count(True) == 3
    assert list(RunFolder(folder).path.glob("*.pt")) == []


def test_an_interrupted_call_keeps_finished_runs_and_continues(folder):
    recipe = {"a-seed0": Draw(3, 0), "b-seed0": Draw(3, 0, "interrupt"), "c-seed0": Draw(3, 0)}
    with pytest.raises(KeyboardInterrupt):
        perform(runs, recipe, folder, jobs=1, report=silent)
    store = RunFolder(folder)
    assert sorted(path.name[:7] for path in store.path.iterdir()) == ["a-seed0", "b-seed0"]
    # A checkpoint of another configuration is not continued.
    assert not store.checkpoint(Run("b-seed0", Draw(4, 0, "interrupt"), measure)).exists()
    assert list(perform(runs, recipe, folder, jobs=1, report=silent)) == list(recipe)


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts its commands deaf to it
sys.path.insert(0, sys.argv[1])
import test_runs as here
if __name__ == "__main__":
    slow = {name: here.Draw(2, 0, "wait") for name in ("slow-seed0", "late-seed0")}
    recipe = {"quick-seed0": here.Draw(2, 0)} | slow
    here.reproduce.FIGURES = {"9": here.reproduce.Figure("fig9_draws", lambda scale: recipe, here.runs)}
    raise SystemExit(here.main(["train", "--scale", "smoke", "--jobs", "2", "--out", sys.argv[2]]))
"""


#: Seconds for a process to do what takes one on an idle machine.
PATIENCE = 180


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "terminated"])
def test_ctrl_c_ends_all_processes_and_keeps_what_is_finished(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    store = tmp_path / "smoke" / ".runs" / "fig9_draws"
    deadline = time.monotonic() + PATIENCE
    try:
        while len(list(store.glob("*.pt"))) < 2 or not (store / "quick-seed0.json").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.terminate()
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert (
            errors.decode().strip() == "eotattn train: interrupted; finished runs are kept, the same command continues"
        )
        assert sorted(path.name for path in store.glob("*.json")) == ["quick-seed0.json"]
        while somebody_is_left(process.pid):
            assert time.monotonic() < deadline + PATIENCE
            time.sleep(0.1)
    finally:  # a failure here must not leave processes to other tests
        if somebody_is_left(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def somebody_is_left(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_runs_may_depend_on_records(folder):
    def sweep_then_main(recipe, records):
        sweep = [Run(f"sweep-{n}", Draw(n, 0), measure) for n in (1, 2)]
        if not all(run.name in records for run in sweep):
            return sweep
        best = max(sweep, key=lambda run: value(records[run.name], "mean"))
        return [*sweep, Run("main-seed1", Draw(best.configuration.count, 1), measure)]

    records = perform(sweep_then_main, None, folder, jobs=1, report=silent)
    assert list(records) == ["sweep-1", "sweep-2", "main-seed1"]
    means = [value(records[f"sweep-{n}"], "mean") for n in (1, 2)]
    assert records["main-seed1"].configuration["count"] == 1 + means.index(max(means))


def choose(draw, checkpoint):
    """Leaves what it learned for the run that continues it, and does not get test data."""
    checkpoint.write_text("trained")
    numbers = torch.randn(draw.count)
    if draw.event == "peek":
        RetrievalTask(64).examination(PASSKEY, 2, depth=0.5)
    return Measurement([{"quantity": "mean", "value": float(numbers.mean())}])


def report_on(draw, checkpoint):
    """Reads test data with what was learned."""
    learned = float(checkpoint.exists())
    RetrievalTask(64).examination(PASSKEY, 2, depth=0.5)
    return Measurement([{"quantity": "learned", "value": learned}])


def choosing_plan(recipe, records):
    """Two choices; the reports are named from the start, as by a plan that does not wait."""
    choices = [Run(f"choose-{n}", Draw(n, 0, recipe), choose, chooses=True) for n in (1, 2)]
    reports = [Run(f"report-{run.configuration.count}", run.configuration, report_on, continues=run) for run in choices]
    return [*reports, *choices]


def test_reports_wait_for_all_choices_and_continue_what_they_trained(folder):
    lines = []
    records = perform(choosing_plan, "", folder, jobs=1, report=lines.append)
    assert [line.split(":")[0] for line in lines] == ["choose-1", "choose-2", "report-1", "report-2"]
    assert [value(records[f"report-{n}"], "learned") for n in (1, 2)] == [1.0, 1.0]
    assert list(RunFolder(folder).path.glob("*.pt")) == []
    RunFolder(folder).forget(["choose-2"])
    RunFolder(folder).forget(["report-*"])
    lines.clear()
    assert "report-1" not in perform(choosing_plan, "", folder, jobs=1, only=["report-*"], report=lines.append)
    assert lines[-1] == "some runs wait for choices that are not stored"


def test_a_run_that_chooses_gets_no_test_data(folder):
    lines = []
    with pytest.raises(RunsFailedError, match="runs failed: choose-1, choose-2"):
        perform(choosing_plan, "peek", folder, jobs=1, report=lines.append)
    assert "RetrievalTask.examination: test data must not be read by a run that chooses" in lines[0]
    assert list(RunFolder(folder).path.glob("*.json")) == []


def test_only_some_runs_are_made_by_name_or_pattern(folder):
    assert list(perform(runs, THREE, folder, jobs=1, only=["a-*"], report=silent)) == ["a-seed0", "a-seed1"]
    assert list(perform(runs, THREE, folder, jobs=1, only=["b-seed0"], report=silent)) == list(THREE)
    with pytest.raises(
        ValueError, match=r"only must name runs of the study; got \['c-\*'\]. There are a-seed0, a-seed1"
    ):
        perform(runs, THREE, folder, jobs=1, only=["c-*"], report=silent)


def test_a_name_must_be_a_file_name():
    with pytest.raises(ValueError, match="name must have letters, digits"):
        Run("a/b", Draw(1, 0), measure)


def test_the_provenance_of_a_figure_names_every_run(folder):
    records = perform(runs, THREE, folder, jobs=1, report=silent)
    merged = merged_provenance(records, command="eotattn reproduce", recipe=Draw(1, 0))
    assert merged["seed"] == [0, 1]
    assert list(merged["runs"]) == list(THREE)
    assert merged["wall_seconds"] == pytest.approx(sum(record.seconds for record in records.values()), abs=0.01)
    assert len(merged["versions"]) == 1


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def draws(monkeypatch):
    """A registry of one figure; returns its recipe, to be changed."""
    recipe = dict(THREE)
    figure = reproduce.Figure("fig9_draws", lambda scale: recipe, runs)
    monkeypatch.setattr(reproduce, "FIGURES", {"9": figure})
    return recipe


def train(tmp_path, *arguments):
    return main(["train", "--scale", "smoke", "--jobs", "1", "--out", str(tmp_path), *arguments])


def test_train_makes_what_is_missing(draws, tmp_path, capsys):
    assert train(tmp_path, "--figure", "9", "--only", "a-*") == 0
    assert train(tmp_path, "--figure", "fig9_draws") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "fig9_draws at scale smoke",
        "a-seed0",
        "a-seed1",
        "fig9_draws at scale smoke",
        "a-seed0",
        "a-seed1",
        "b-seed0",
    ]
    assert ["stored" in line for line in lines] == [False] * 4 + [True, True, False]
    assert train(tmp_path, "--fresh", "--only", "b-*") == 0
    assert capsys.readouterr().out.count("stored") == 2  # those of a
    assert train(tmp_path, "--fresh") == 0
    assert "stored" not in capsys.readouterr().out


def test_forgetting_a_run_forgets_its_checkpoint_alone(folder):
    store = RunFolder(folder)
    store.forget()  # nothing
    store.path.mkdir(parents=True)
    kept, gone = (store.checkpoint(Run(name, Draw(1, 0), measure)) for name in ("a-seed0", "a-seed1"))
    for file in (kept, gone):
        file.touch()
    store.forget(["a-seed1"])
    assert kept.exists()
    assert not gone.exists()


def test_train_returns_1_where_a_run_failed_and_2_for_bad_arguments(draws, tmp_path, capsys):
    draws["bad-seed0"] = Draw(1, 0, "raise")
    assert train(tmp_path) == 1
    assert "eotattn train: error: runs failed: bad-seed0" in capsys.readouterr().err
    assert train(tmp_path, "--figure", "10") == 2
    assert "--figure must be among 9; got ['10']" in capsys.readouterr().err
    assert train(tmp_path, "--jobs", "0", "--fresh") == 2
    assert (tmp_path / "smoke" / ".runs" / "fig9_draws" / "a-seed0.json").exists()  # nothing is forgotten
    assert train(tmp_path, "--only", "nothing") == 2


def test_a_pattern_needs_runs_in_some_figure_alone(monkeypatch, tmp_path, capsys):
    plans = {"8": ("fig8", ["a-seed0"]), "9": ("fig9", ["b-seed0"])}
    figures = {
        key: reproduce.Figure(
            name, lambda scale: None, lambda *_, names=names: [Run(n, Draw(1, 0), measure) for n in names]
        )
        for key, (name, names) in plans.items()
    }
    monkeypatch.setattr(reproduce, "FIGURES", figures)
    assert train(tmp_path, "--only", "b-*") == 0
    assert [path.stem for path in tmp_path.rglob("*.json")] == ["b-seed0"]
    assert train(tmp_path, "--only", "a-*", "c-*") == 2
    assert "--only must name runs of the study; got ['c-*']. There are a-seed0; others" in capsys.readouterr().err


def test_a_failure_counts_where_a_pattern_names_nothing(draws, tmp_path, capsys):
    draws["bad-seed0"] = Draw(1, 0, "raise")
    assert train(tmp_path, "--only", "bad-*", "nothing") == 1
    assert "runs failed: bad-seed0" in capsys.readouterr().err
