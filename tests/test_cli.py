"""The command line: parses, calls one function, and turns user errors into one line and status 2."""

import subprocess
import sys

import pytest

from eotattn import cli
from eotattn.experiments import reproduce as room


def test_reproduce_passes_its_arguments_on(monkeypatch):
    calls = []
    monkeypatch.setattr(room, "reproduce", lambda figures, **rest: calls.append((figures, rest)))
    assert cli.main(["reproduce"]) == 0
    assert cli.main(["reproduce", "--figure", "2", "1", "--scale", "smoke", "--out", "elsewhere"]) == 0
    assert cli.main(["reproduce", "--figure", "1", "--figure", "2"]) == 0
    assert calls == [
        (None, {"scale": "laptop", "out": "figures", "jobs": None, "fresh": False}),
        (["2", "1"], {"scale": "smoke", "out": "elsewhere", "jobs": None, "fresh": False}),
        (["1", "2"], {"scale": "laptop", "out": "figures", "jobs": None, "fresh": False}),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--figure", "9"], "eotattn: error: reproduce: figures must be among 1, 2, 3, 4, 5, ablations; got ['9']."),
        (["--scale", "huge"], "eotattn: error: reproduce: scale must be one of 'smoke'"),
    ],
)
def test_user_errors_are_one_line_and_status_two(arguments, says, capsys):
    assert cli.main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["reproduce", "--jobs", "one"]])
def test_bad_syntax_ends_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: eotattn" in capsys.readouterr().err


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "eotattn.cli", "verify", "--seed", "x"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid int value" in run.stderr


def test_importing_the_package_imports_no_plots_and_no_experiments():
    optional = ("matplotlib", "accelerate", "papermill", "pandas")
    code = f"import sys, eotattn; print([name for name in {optional} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
