"""The page of an analysis in a real browser: it draws, it answers the mouse, it leaves the machine alone."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from eotattn.analysis import analyze, findings
from eotattn.analysis.page import page
from eotattn.analysis.summary import TextFindings, summarize
from eotattn.integrations import capture
from eotattn.integrations.residuals import residuals

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKENS = ("<s>", 'he said "no"', "</script>", "& more", "e", "f", "g")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")


class Model(torch.nn.Module):
    """Two layers with a residual stream."""

    def __init__(self):
        super().__init__()
        make = {"batch_first": True, "dtype": torch.float64}
        self.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(12, 3, 16, **make) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def analysis():
    torch.manual_seed(0)
    model, found = Model().eval(), []
    for _ in range(3):
        with residuals(model) as norms, capture(model, certify=True) as captured:
            model(torch.randn(1, len(TOKENS), 12, dtype=torch.float64, requires_grad=True))
        found.append(TextFindings(captured.layers, captured.values, captured.certificates, norms))
    return summarize(found, tokens=TOKENS, num_given=3)


def visit(folder, content, *, budget=4000):
    """The document after its scripts ran, what the console said, and what it asked the network for."""
    path = folder / "page.html"
    path.write_text(content)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--enable-logging=stderr", f"--virtual-time-budget={budget}", f"--log-net-log={folder / 'net.json'}"]
    run = subprocess.run([BROWSER, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    urls = set(re.findall(r'"url":"((?:http|ws)[^"]*)"', (folder / "net.json").read_text()))
    own = re.compile(r"\w+://[\w.-]+\.(google|googleapis|gvt1)\.com/")  # the browser itself says hello to its makers
    return run.stdout, console, {url for url in urls if not own.match(url)}


def hovering(content, selector):
    """The page, with a script that moves the mouse onto an element and repeats what the page then says."""
    script = f"""
      const target = document.querySelector({json.dumps(selector)});
      target.dispatchEvent(new MouseEvent("mousemove", {{bubbles: true, clientX: 50, clientY: 50}}));
      const said = document.createElement("pre");
      said.id = "said"; said.textContent = document.getElementById("tip").textContent;
      said.dataset.shown = document.getElementById("tip").style.display;
      document.body.append(said);
    """
    return content.replace("</body>", f"<script>{script}</script></body>")


def said(document):
    found = re.search(r'<pre id="said" data-shown="(\w+)">(.*?)</pre>', document, flags=re.DOTALL)
    assert found is not None
    return found.group(1), html.unescape(found.group(2))


def test_the_page_refers_to_nothing_outside_and_escapes_tokens(analysis):
    content = page(analysis)
    assert not re.search(r"(src|href)\s*=", content)
    assert "http://" not in content.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in content
    assert content.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', content, flags=re.DOTALL).group(1))
    assert tuple(data["tokens"]) == TOKENS


def test_the_numbers_inside_are_those_of_the_analysis(analysis):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page(analysis), flags=re.DOTALL).group(1))
    for name, grid in analysis.heads.mean.items():
        np.testing.assert_allclose(np.array(data["mean"][name], dtype=float), grid, rtol=1e-5)
    first = next(iter(analysis.statistics.values()))
    shares = first.column_mass[0] / first.column_count[0]
    np.testing.assert_allclose(data["shares"][0], shares, rtol=1e-5)
    report = next(iter(analysis.priors.values()))
    np.testing.assert_allclose(data["priors"][0]["key"], report.key, rtol=1e-5)
    assert {quantity["name"] for quantity in data["quantities"]} >= {"value drain", "certificate", "no-operation"}


@needs_browser
def test_every_part_is_drawn_without_errors_or_requests(analysis, tmp_path):
    document, console, network = visit(tmp_path, page(analysis))
    assert console == []
    assert network == set()
    for part in ("grid", "head", "tokens", "prior", "margins", "layers"):
        inside = re.search(rf'id="{part}"[^>]*>(.*?)</div>', document, flags=re.DOTALL).group(1)
        assert "<svg" in inside or "<table" in inside, part
    assert document.count('class="cell"') == 2 * 3
    for title in ("(a) key-only part", "(b) relative part", "(c) row-centred log-prior (nats)", "(d) induced prior"):
        assert title in document
    assert document.count('class="margin"') == 2 * 2 * 3
    assert "content" in document
    assert "NaN" not in document.split('<script type="application/json"')[0]


@needs_browser
@pytest.mark.parametrize(
    ("selector", "words"),
    [
        (".cell", ("head 0", "sink mass of key 0: ", "95% interval")),
        (".token", ('token 0 "<s>"', "mean weight ")),
        (".margin", ("margin ", "content ", "prior 0")),
        ("#prior svg circle[data-tip]", ('key 0 "<s>"', "u(j) = ", "nats")),
        ("#layers circle[data-tip]", ("normalised entropy: ", "95% interval")),
    ],
)
def test_hovering_says_token_and_exact_value(analysis, tmp_path, selector, words):
    document, console, _ = visit(tmp_path, hovering(page(analysis), selector))
    shown, text = said(document)
    assert console == []
    assert shown == "block"
    for word in words:
        assert word in text
    if selector == ".cell":
        value = float(re.search(r"sink mass of key 0: (\S+)", text).group(1))
        assert value == pytest.approx(analysis.heads.mean["sink mass of key 0"][0, 0], rel=1e-4)


@needs_browser
def test_a_click_chooses_another_head(analysis, tmp_path):
    click = '<script>document.querySelectorAll(".cell")[5].dispatchEvent(new MouseEvent("click"));</script></body>'
    document, console, _ = visit(tmp_path, page(analysis).replace("</body>", click))
    assert console == []
    last = analysis.heads.layers[1]
    assert f"The implicit prior of {last}, head 2" in document


@needs_browser
def test_a_broken_page_is_noticed(analysis, tmp_path):
    broken = page(analysis).replace('byId("quantity").addEventListener', 'byId("nothing").addEventListener')
    _, console, _ = visit(tmp_path, broken)
    assert any("TypeError" in line for line in console)
    outside = page(analysis).replace("</body>", '<img src="http://example.invalid/x.png"></body>')
    _, console, network = visit(tmp_path, outside)
    assert any("Content Security Policy" in line for line in console)
    assert network == set()
    _, _, network = visit(tmp_path, outside.replace("Content-Security-Policy", "x"))
    assert network == {"http://example.invalid/x.png"}


def test_the_page_says_what_was_found_and_how_much_is_shown():
    """In words, before anything is drawn; a phone shows it at its own width."""
    result = analyze(attention=torch.full((1, 2, 4, 4), 0.25))
    text = page(result)
    for sentence in findings(result):
        assert f"<li>{html.escape(sentence)}</li>" in text
    assert "of 70 tokens" not in text
    assert "<p class=note>The first 64 of 70 tokens.</p>" in page(replace(result, tokens=("the",) * 70))
    assert '<meta name="viewport" content="width=device-width' in text
