"""The files of the page by themselves: they fit together, are valid, and run; a browser is not needed."""

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from string import Template

import pytest

HTML, SCRIPT, STYLE = (resources.files("eotattn.analysis.page").joinpath(f"report.{e}") for e in ("html", "js", "css"))
STAND_IN = Path(__file__).parent / "document_stand_in.js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js")
IDS = {name: tag for tag, name in re.findall(r'<(\w+)[^>]* id="([\w-]+)"', HTML.read_text(encoding="utf-8"))}


def payload():
    """Two layers of two heads, three tokens; one layer has no prior, one entry is missing."""
    grid = [[0.9, 0.2], [0.4, None]]
    quantities = ["sink mass of key 0", "content margin", "prior margin"]
    prior = {"causal": True, "size": 3, "lag": 2 * [[None, None, 0.0, -1.0, -2.0]], "key": 2 * [[0.5, 0.0, -0.5]]}
    curves = {"normalised entropy": {"mean": [0.5, 0.6], "low": [0.4, None], "high": [0.6, None]}}
    norms = {"first token": {"mean": [3.0, 30.0], "low": [None, None], "high": [None, None]}}
    panel = {"names": ["a", "b"], "numbers": [0, 1]}
    return {
        "layers": ["a", "b"],
        "numbers": [0, 1],
        "heads": [0, 1],
        "tokens": ["<s>", "x", "y"],
        "quantities": [{"name": name, "unit": "1", "formula": "p"} for name in quantities],
        "mean": dict.fromkeys(quantities, grid),
        "low": {key: [[0.8, None], [0.3, None]] for key in quantities},
        "high": {key: [[1.0, None], [0.5, None]] for key in quantities},
        "kinds": [["broadcast", ""], ["", ""]],
        "shares": [[[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]], [[0.5, None, 0.5], [0.2, 0.4, 0.4]]],
        "priors": [prior, None],
        "curves": [
            panel | {"title": "mean over heads", "log": False, "curves": curves},
            panel | {"title": "norm of the residual stream", "log": True, "curves": norms},
        ],
    }


def run(script, ids=None):
    """What the script draws, in Node with a stand-in of the document."""
    content = json.dumps([script, IDS if ids is None else ids, json.dumps(payload())])
    return subprocess.run([NODE, str(STAND_IN)], input=content, capture_output=True, text=True)


def test_lines_are_tidy():
    for file in (HTML, SCRIPT, STYLE):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{file.name}:{number} is longer than 120 characters"
            assert line == line.rstrip(), f"{file.name}:{number} ends in blanks"
            assert "\t" not in line, f"{file.name}:{number} holds a tab"


def test_script_and_style_name_what_the_page_has():
    script, style, html = (file.read_text(encoding="utf-8") for file in (SCRIPT, STYLE, HTML))
    asked = set(re.findall(r'(?:byId|getElementById)\("([\w-]+)"\)', script))
    assert asked <= set(IDS)
    assert set(re.findall(r"#([a-z][\w-]*)", re.sub(r"\{[^}]*\}", "", style))) <= set(IDS)
    classes = set(re.findall(r"class=\"?([\w-]+)", html)) | set(re.findall(r'class: "([\w-]+)"', script))
    assert set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\{[^}]*\}", "", style))) <= classes


def test_the_page_has_places_for_everything_and_no_more():
    places = {found["named"] for found in Template.pattern.finditer(HTML.read_text(encoding="utf-8"))}
    assert places == {"policy", "style", "summary", "findings", "shown", "missing", "definitions", "data", "script"}


@needs_node
@pytest.mark.parametrize("file", [SCRIPT, STAND_IN], ids=lambda file: file.name)
def test_scripts_are_valid(file):
    result = subprocess.run([NODE, "--check", str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_node
def test_the_script_draws_every_part():
    result = run(SCRIPT.read_text(encoding="utf-8"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["classes"] == {"cell": 3, "token": 3 * 3, "margin": 2 * 3, "title": 8}
    assert "sink mass of key 0" in found["texts"]["grid"]
    assert "0.8 to 1" in found["texts"]["head"]
    assert "(d) induced prior" in found["texts"]["prior"]
    assert "norm of the residual stream" in found["texts"]["layers"]
    assert found["after_click"] == "The implicit prior of b, head 0"
    assert found["tip"] == "a value"


@needs_node
def test_a_broken_script_is_noticed():
    script = SCRIPT.read_text(encoding="utf-8")
    assert "ReferenceError" in run(script.replace("colourBar(svg, left + heads", "colorBar(svg, left + heads")).stderr
    assert run(script, {name: tag for name, tag in IDS.items() if name != "margins"}).returncode != 0
