"""The command line: parses, calls one function, and turns what a user does into one line and an exit status."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import eotattn
from eotattn import analysis, cli
from eotattn.benchmarks import report as bench_report
from eotattn.diagnostics import equivalence
from eotattn.experiments import reproduce as room
from eotattn.experiments.tasks import books


@pytest.fixture
def calls(monkeypatch):
    """What ``reproduce`` is called with."""
    calls = []
    monkeypatch.setattr(room, "reproduce", lambda figures, report, **rest: calls.append((figures, rest)))
    return calls


def test_reproduce_passes_its_arguments_on(calls):
    assert cli.main(["reproduce"]) == 0
    assert cli.main(["reproduce", "--figure", "2", "1", "--scale", "smoke", "--out", "elsewhere"]) == 0
    assert cli.main(["reproduce", "--figure", "1", "--figure", "2"]) == 0
    assert calls == [
        (None, {"scale": "laptop", "out": "figures", "jobs": None, "fresh": False}),
        (["2", "1"], {"scale": "smoke", "out": "elsewhere", "jobs": None, "fresh": False}),
        (["1", "2"], {"scale": "laptop", "out": "figures", "jobs": None, "fresh": False}),
    ]


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"eotattn {eotattn.__version__}\n"


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "eotattn.cli", "verify", "--seed", "x"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == (
        "eotattn verify: error: argument --seed: invalid int value: 'x'. See eotattn verify --help.\n"
    )


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch):
    def fail(**options):
        raise ValueError("operands could not be broadcast together with shapes (2,) (3,)")

    monkeypatch.setattr(equivalence, "measure_equivalences", fail)
    with pytest.raises(ValueError, match="operands"):
        cli.main(["verify"])


def test_importing_the_package_imports_no_plots_and_no_experiments():
    optional = ("matplotlib", "accelerate", "papermill", "pandas")
    code = f"import sys, eotattn; print([name for name in {optional} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


# Missing libraries --------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from eotattn.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("absent", "command", "says"),
    [
        (
            "accelerate",
            "train --figure 1",
            "accelerate must be installed; got none. Run pip install 'eotattn[experiments]'.",
        ),
        ("pandas", "train --figure 1", "pandas must be installed; got none. Run pip install 'eotattn[experiments]'."),
        ("scipy,sklearn", "reproduce", "scipy and sklearn must be installed; got none. Run pip install"),
        (
            "ipykernel,papermill",
            "reproduce",
            "ipykernel and papermill must be installed; got none. Run pip install 'eotattn[experiments]'.",
        ),
        ("transformers", "analyze model --text note.txt --out new", "transformers must be installed; got none. Run"),
        ("safetensors", "analyze --attention a.safetensors --out new", "safetensors must be installed; got none. Run"),
    ],
)
def test_a_missing_library_names_its_extra(absent, command, says, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for file in ("model/weights.safetensors", "a.safetensors"):
        (tmp_path / file).touch()
    (tmp_path / "note.txt").write_text("the key")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, absent, *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith(f"eotattn {command.split()[0]}: error: {says}")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_maps_need_no_extra(tmp_path):
    np.save(tmp_path / "maps.npy", np.full((2, 6, 6), 1 / 6, dtype=np.float32))
    absent = "transformers,safetensors,accelerate,pandas,papermill,sklearn,datasets"
    command = ["analyze", "--attention", "maps.npy", "--out", "new"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", WITHOUT, absent, *command], cwd=tmp_path, env=environment)
    assert run.returncode == 0


# Interruptions ------------------------------------------------------------------------------------------------------


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "where", "kept"),
    [
        ("train", (room, "make_runs"), "finished runs are kept, the same command continues"),
        ("reproduce", (room, "reproduce"), "finished runs are kept, the same command continues"),
        ("prepare books --out new", (books, "prepare_books"), "the corpus is not whole"),
        ("verify", (equivalence, "measure_equivalences"), "verify writes nothing"),
        ("bench decode", (bench_report, "bench"), "nothing was measured yet"),
        (
            "analyze --attention a.npy --out new",
            (analysis, "analyze"),
            "no text was finished yet, and nothing was written",
        ),
    ],
)
def test_an_interruption_is_one_line_and_130(command, where, kept, monkeypatch, capsys):
    monkeypatch.setattr(*where, interrupted)
    assert cli.main(command.split()) == 130
    out, error = capsys.readouterr()
    assert out == ""
    assert error == f"eotattn {command.split()[0]}: interrupted; {kept}\n"


def test_termination_is_an_interruption(monkeypatch, capsys):
    def terminated(**options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(equivalence, "measure_equivalences", terminated)
    assert cli.main(["verify"]) == 130
    assert capsys.readouterr().err == "eotattn verify: interrupted; verify writes nothing\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_bench_prints_what_it_measured_and_keeps_earlier_files(monkeypatch, capsys, tmp_path):
    def suite(config):
        yield {"name": "first", "value": 0.5}
        raise KeyboardInterrupt

    (tmp_path / "bench_decode.csv").write_text("earlier")
    monkeypatch.setitem(bench_report.SUITES, "decode", suite)
    assert cli.main(["bench", "decode", "--out", str(tmp_path)]) == 130
    out, error = capsys.readouterr()
    assert out.split() == ["value", "name", "0.5", "first"]
    assert error == "eotattn bench: interrupted; the table has what was measured, and nothing was written\n"
    assert (tmp_path / "bench_decode.csv").read_text() == "earlier"


# What analyze says --------------------------------------------------------------------------------------------------


def test_analyze_ends_with_what_it_found_and_where(tmp_path, monkeypatch, capsys):
    weights = np.zeros((2, 8, 8), dtype=np.float32)
    weights[0, :, 0] = 1.0  # all to key 0
    weights[1] = 0.92 * np.eye(8) + 0.01  # nearly all to itself
    np.save(tmp_path / "maps.npy", weights)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["analyze", "--attention", "maps.npy", "--out", "new"]) == 0
    *_, sinks, kinds, explained, where = capsys.readouterr().out.splitlines()
    where_sinks = "(one text, so without intervals): the first token in 1, in layer 0."
    assert sinks == f"1 of 2 heads puts more than 30% of attention on one token {where_sinks}"
    assert kinds == "Of 2 heads, none attends mostly to the previous token."
    assert explained.startswith("Fitted to this one text and judged on it, in sample, a prior of position alone")
    assert where == "Page, with what each quantity is: new/report.html"
    assert (tmp_path / "new" / "report.html").is_file()
