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
from page_numbers import numbers_of

from eotattn.analysis import analyze, findings
from eotattn.analysis.analysis_report import summarize
from eotattn.analysis.page import page
from eotattn.analysis.shards import merged
from eotattn.analysis.summary import TextFindings
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
        with residuals(model) as norms, capture(model, certify=True, top_key_rows=9) as captured:
            model(torch.randn(1, len(TOKENS), 12, dtype=torch.float64, requires_grad=True))
        parts = {"top_keys": captured.top_keys, "tokens": (TOKENS,)}
        found.append(TextFindings(captured.layers, captured.values, captured.certificates, norms, **parts))
    whole = summarize(found, num_given=3)
    first, second = whole.priors  # the first one's fit holds, the second one's fails
    bounds = {first: np.array([[0.1, 0.5]] * 3), second: np.array([[-0.5, 0.5]] * 3)}
    shares = {name: np.full(3, 0.3) for name in whole.priors}
    priors = {n: replace(r, interval=bounds[n], explained=shares[n]) for n, r in whole.priors.items()}
    return replace(whole, priors=priors)


def later(content, script):
    """The page with a script that runs once its numbers are there."""
    return content.replace("</body>", f"<script>setTimeout(() => {{ {script} }}, 500);</script></body>")


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
      document.querySelector(".cell").dispatchEvent(new MouseEvent("click"));
      const target = document.querySelector({json.dumps(selector)});
      target.dispatchEvent(new MouseEvent("mousemove", {{bubbles: true, clientX: 50, clientY: 50}}));
      const said = document.createElement("pre");
      said.id = "said"; said.textContent = document.getElementById("tip").textContent;
      said.dataset.shown = document.getElementById("tip").style.display;
      document.body.append(said);
    """
    return later(content, script)


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
    assert tuple(numbers_of(content)["texts"][0]) == TOKENS


def test_the_numbers_inside_are_those_of_the_analysis(analysis):
    data = numbers_of(page(analysis))
    for name, grid in analysis.heads.mean.items():
        np.testing.assert_allclose(np.array(data["mean"][name], dtype=float), grid, rtol=1e-4)
    first = next(iter(analysis.statistics.values()))
    shares = (first.column_mass / first.column_count).mean(1)
    np.testing.assert_allclose(data["shares"][0], shares, rtol=1e-4)
    report = next(iter(analysis.priors.values()))
    np.testing.assert_allclose([head["key"] for head in data["priors"][0]["heads"]], report.key, rtol=1e-4)
    assert data["priors"][1]["heads"] == [None] * 3  # failed fits are not even there
    assert data["fails"] == [[False] * 3, [True] * 3]
    assert data["mean"]["explained by position"][1] == [None] * 3
    assert data["named"] == ['<s>he said "no"</script>& moreefg'] * 3
    assert {quantity["name"] for quantity in data["quantities"]} >= {"value drain", "certificate", "no-operation"}


@needs_browser
def test_every_part_is_drawn_without_errors_or_requests(analysis, tmp_path):
    document, console, network = visit(tmp_path, page(analysis))
    assert console == []
    assert network == set()
    for part in ("grid", "head", "strongest", "map", "tokens", "margins", "layers"):
        inside = re.search(rf'id="{part}"[^>]*>(.*?)</div>', document, flags=re.DOTALL).group(1)
        assert "<svg" in inside or "<table" in inside, part
    assert document.count('class="cell"') == 2 * 3
    assert len(re.findall('class="thumb[ "]', document)) == 2 * 3
    assert len(re.findall('class="key[ "]', document)) == len(TOKENS)
    assert "he said &quot;no&quot;" in html.escape(html.unescape(document))
    drawn = visit(tmp_path, hovering(page(analysis), ".cell"))[0].split("<script")[0]
    for title in ("(a) key-only part", "(b) relative part", "(c) row-centred log-prior (nats)", "(d) induced prior"):
        assert title in drawn
    assert document.count('class="margin"') == 2 * 2 * 3
    assert "content" in document
    assert "NaN" not in document.split('<script type="application/json"')[0]


@needs_browser
@pytest.mark.parametrize(
    ("selector", "words"),
    [
        (".cell", ("Layer 0, head 0 (layers.0.self_attn)", "mass of the strongest key: ", "95% interval")),
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
        value = float(re.search(r"mass of the strongest key: (\S+)", text).group(1))
        assert value == pytest.approx(analysis.heads.mean["mass of the strongest key"][0, 0], rel=1e-3)


@needs_browser
def test_a_click_chooses_another_head(analysis, tmp_path):
    click = 'document.querySelectorAll(".cell")[5].dispatchEvent(new MouseEvent("click"));'
    document, console, _ = visit(tmp_path, later(page(analysis), click))
    assert console == []
    assert "The implicit prior of Layer 1, head 2" in document
    assert "not surely better than uniform attention" in document
    assert "(c) row-centred log-prior" not in document.split("<script")[0]


@needs_browser
def test_keys_choose_heads_and_queries(analysis, tmp_path):
    keys = """
      document.querySelectorAll(".cell")[0].dispatchEvent(new MouseEvent("click"));
      const press = (name, key) => document.getElementById(name).dispatchEvent(new KeyboardEvent("keydown", {key}));
      press("grid", "ArrowRight"); press("grid", "ArrowDown"); press("reading", "ArrowRight");
    """
    document, console, _ = visit(tmp_path, later(page(analysis), keys))
    assert console == []
    assert "The implicit prior of Layer 1, head 1" in document
    kept = list(analysis.top_keys.values())[1]
    key, weight = int(kept.key[0, 1, 2, 0]), float(kept.weight[0, 1, 2, 0])
    assert html.escape(f'Query 2 "{TOKENS[2]}" attends to {weight * 100:.0f}% {key} "', quote=False) in document


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows(analysis, tmp_path, width):
    """In a frame, as a notebook shows it."""
    long = replace(analysis, subject=replace(analysis.subject, model="A" * 200))
    frame = long.show()._repr_html_().replace("width:100%", f"width:{width}px").replace(' sandbox="allow-scripts"', "")
    script = """
      const root = document.querySelector("iframe").contentDocument.documentElement;
      const said = document.createElement("pre");
      said.id = "said"; said.dataset.shown = "yes"; said.textContent = `${root.clientWidth} ${root.scrollWidth}`;
      document.body.append(said);
    """
    document, console, _ = visit(tmp_path, later(f"<body>{frame}</body>", script))
    assert console == []
    inner, needed = map(int, said(document)[1].split())
    assert width - 40 < inner <= width
    assert needed <= inner


@needs_browser
def test_a_broken_page_is_noticed(analysis, tmp_path):
    broken = page(analysis).replace('byId("more").addEventListener', 'byId("nothing").addEventListener')
    _, console, _ = visit(tmp_path, broken)
    assert any("TypeError" in line for line in console)
    missing = page(analysis).replace('"deflate"', '"no-such-format"')
    document, _, _ = visit(tmp_path, missing)
    assert "The pictures could not be drawn" in document
    outside = page(analysis).replace("</body>", '<img src="http://example.invalid/x.png"></body>')
    _, console, network = visit(tmp_path, outside)
    assert any("Content Security Policy" in line for line in console)
    assert network == set()
    _, _, network = visit(tmp_path, outside.replace("Content-Security-Policy", "x"))
    assert network == {"http://example.invalid/x.png"}


def test_the_page_says_what_was_found_and_how_much_is_shown(analysis):
    """In words, before anything is drawn; a phone shows it at its own width."""
    result = analyze(attention=torch.full((1, 2, 4, 4), 0.25))
    text = page(result)
    for sentence in findings(result):
        assert f"<li>{html.escape(sentence)}</li>" in text
    assert text.index(html.escape(findings(result)[0])) < text.index("<h2")
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert str(result.subject) in text
    assert result.subject.version in text
    assert result.subject.date in text
    assert "The first" not in text
    longer = replace(analysis, tokens=tuple(tokens + ("the",) * 70 for tokens in analysis.tokens))
    assert f"The first {len(TOKENS)} of {len(TOKENS) + 70} tokens." in page(longer)


def test_a_large_model_fits_on_the_page():
    """32 layers of 32 heads, 16 texts of 1024 tokens: random pairs, which compress least; below 3 MB."""
    generator = torch.Generator().manual_seed(0)
    layers, heads, texts, tokens, kept = 32, 32, 16, 1024, 256
    part = analyze(attention=torch.softmax(torch.randn(heads, 40, 40, generator=generator) * 3, -1))
    stats, prior = next(iter(part.statistics.values())), next(iter(part.priors.values()))
    weight = torch.rand(4, heads, kept, 4, generator=generator) * torch.tensor([0.6, 0.3, 0.05, 0.05])
    names = [f"model.layers.{a}.self_attn" for a in range(layers)]
    grids = {
        side: {name: np.random.default_rng(0).random((layers, heads)) for name in getattr(part.heads, side)}
        for side in ("mean", "low", "high")
    }
    key = torch.randint(tokens, weight.shape, generator=generator).int()
    shape, words = (texts, heads), tuple(f"word{i % 500}" for i in range(tokens))
    strongest = replace(
        part.strongest,
        layers=tuple(names),
        position=(np.random.default_rng(0).integers(tokens, size=shape),) * layers,
        mass=(np.random.default_rng(0).random(shape),) * layers,
        token=(np.full(shape, "word"),) * layers,
    )
    report = replace(
        part.heads,
        layers=tuple(names),
        numbers=tuple(range(layers)),
        num_sequences=texts,
        **grids,
        layer_interval={name: np.zeros((layers, 2)) for name in part.heads.layer_interval},
        sink_rate={0.3: np.zeros(layers)},
        sink_rate_interval={0.3: np.zeros((layers, 2))},
    )
    noisy = [replace(prior, lag=prior.lag + np.random.default_rng(a).random(prior.lag.shape)) for a in range(layers)]
    whole = replace(
        part,
        heads=report,
        strongest=strongest,
        tokens=(words,) * texts,
        num_texts=texts,
        num_given=texts,
        statistics=dict.fromkeys(names, merged([stats] * texts)),
        priors=dict(zip(names, noisy, strict=True)),
        top_keys={name: replace(next(iter(part.top_keys.values())), key=key, weight=weight) for name in names},
    )
    content = page(whole)
    data = numbers_of(content)
    assert len(content.encode()) < 3_000_000
    assert "tokens." in content
    assert len(data["pairs"][0]) == layers
    assert all(len(found[0]) >= 96 for found in data["pairs"][0][0])
