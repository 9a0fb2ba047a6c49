"""The files of the page by themselves: they fit together, are valid, and run; a browser is not needed."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from importlib import resources
from pathlib import Path
from string import Template

import pytest

HTML, CHARTS, SCRIPT, STYLE = (
    resources.files("eotattn.analysis.page").joinpath(name)
    for name in ("report.html", "charts.js", "report.js", "report.css")
)
WHOLE = CHARTS.read_text(encoding="utf-8") + SCRIPT.read_text(encoding="utf-8")
STAND_IN = Path(__file__).parent / "document_stand_in.js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js")
IDS = {name: tag for tag, name in re.findall(r'<(\w+)[^>]* id="([\w-]+)"', HTML.read_text(encoding="utf-8"))}


def payload():
    """Two layers of two heads, three tokens; one prior failed, one layer has none, one entry is missing."""
    grid = [[0.9, 0.2], [0.4, None]]
    quantities = ["sink mass of key 0", "content margin", "prior margin", "entropy", "explained by position"]
    fitted = {"lag": [None, None, 0.0, -1.0, -2.0], "key": [0.5, 0.0, -0.5]}
    prior = {"causal": True, "size": 3, "inSample": False, "heads": [fitted, None]}
    curves = {"normalised entropy": {"mean": [0.5, 0.6], "low": [0.4, None], "high": [0.6, None]}}
    norms = {"first token": {"mean": [3.0, 30.0], "low": [None, None], "high": [None, None]}}
    panel = {"names": ["a", "b"], "numbers": [0, 1]}
    return {
        "layers": ["a", "b"],
        "numbers": [0, 1],
        "heads": [0, 1],
        "texts": [["<s>", "x", "y"]],
        "named": ["<s> x y"],
        "quantities": [{"name": name, "unit": "1", "formula": "p"} for name in quantities],
        "mean": dict.fromkeys(quantities, grid) | {"explained by position": [[0.9, None], [0.4, None]]},
        "low": {key: [[0.8, None], [0.3, None]] for key in quantities},
        "high": {key: [[1.0, None], [0.5, None]] for key in quantities},
        "sinks": [["broadcast", ""], ["", ""]],
        "kinds": {"sink on the first token": "mass of the strongest key", "induction": "induction score"},
        "kind": [[["sink on the first token"], ["induction"]], [[], []]],
        "fails": [[False, True], [False, False]],
        "strongest": [[[[0, 90, "<s>"]], [[1, 20, "x"]]], [[[0, 40, "<s>"]], []]],
        "pairs": [[[[[1, 2, 1], [0, 0, 1, 0], [100, 60, 40, 90]], [[1, 1, 1], [0, 0, 2], [100, 70, 80]]], None]],
        "shares": [[[0.5, 0.25, 0.25]], [[0.5, None, 0.5]]],
        "priors": [prior, None],
        "curves": [
            panel | {"title": "mean over heads", "log": False, "curves": curves},
            panel | {"title": "norm of the residual stream", "log": True, "curves": norms},
        ],
    }


def run(script, ids=None):
    """What the script draws, in Node with a stand-in of the document."""
    packed = base64.b64encode(zlib.compress(json.dumps(payload()).encode())).decode()
    content = json.dumps([script, IDS if ids is None else ids, packed])
    return subprocess.run([NODE, str(STAND_IN)], input=content, capture_output=True, text=True)


def test_lines_are_tidy():
    for file in (HTML, CHARTS, SCRIPT, STYLE):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{file.name}:{number} is longer than 120 characters"
            assert line == line.rstrip(), f"{file.name}:{number} ends in blanks"
            assert "\t" not in line, f"{file.name}:{number} holds a tab"


def test_script_and_style_name_what_the_page_has():
    script, style, html = WHOLE, *(file.read_text(encoding="utf-8") for file in (STYLE, HTML))
    asked = set(re.findall(r'(?:byId|getElementById)\("([\w-]+)"\)', script))
    assert asked <= set(IDS)
    assert set(re.findall(r"#([a-z][\w-]*)", re.sub(r"\{[^}]*\}", "", style))) <= set(IDS)
    classes = set(re.findall(r"class=\"?([\w-]+)", html))
    named = re.findall(r'(?:class: |"class", )"([\w -]+)"|\? "([\w -]+)" : "([\w -]+)"', script)
    classes |= {word for words in named for each in words for word in each.split()}
    assert set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\{[^}]*\}", "", style))) <= classes


def test_the_page_has_places_for_everything_and_no_more():
    places = {found["named"] for found in Template.pattern.finditer(HTML.read_text(encoding="utf-8"))}
    sentences = {"subject", "summary", "findings", "details", "shown", "missing", "definitions"}
    assert places == {"policy", "style", "data", "script"} | sentences


@needs_node
@pytest.mark.parametrize("file", [CHARTS, SCRIPT, STAND_IN], ids=lambda file: file.name)
def test_scripts_are_valid(file):
    result = subprocess.run([NODE, "--check", str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_node
def test_the_script_draws_every_part():
    result = run(WHOLE)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    counts = {"cell": 3, "token": 3 + 2, "margin": 2 * 3, "title": 8, "thumb": 3, "key": 3, "hatch": 0}
    assert found["classes"] == counts
    assert "sink mass of key 0" in found["texts"]["grid"]
    assert 'Query 1 "x" attends to 60% 0 "<s>", 40% 1 "x".' in found["texts"]["said"]
    assert "0.8 to 1" in found["texts"]["head"]
    assert "1: <s> x y…" in found["texts"]["strongest"]
    assert "1: <s> x y…" in found["texts"]["text"]
    assert "(d) induced prior" in found["texts"]["prior"]
    assert "norm of the residual stream" in found["texts"]["layers"]
    assert found["after_click"] == "Layer 1, head 0"
    assert "No prior was fitted here" in found["prior_after_click"]
    assert found["after_arrow"] == "Layer 0, head 0: sink on the first token"
    assert found["said"] == 'Query 2 "y" attends to 90% 0 "<s>".'
    assert found["thumbs_of_kind"] == 1
    assert found["first_thumb"] == "0.0: 0.9"
    assert found["tip"] == "a value"


@needs_node
def test_a_broken_script_is_noticed():
    assert "ReferenceError" in run(WHOLE.replace("colourBar(svg, left + across", "colorBar(svg, left + across")).stderr
    assert run(WHOLE, {name: tag for name, tag in IDS.items() if name != "margins"}).returncode != 0
