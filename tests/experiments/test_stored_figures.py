"""What is stored of every figure stays readable, and says what it said when its notebook was executed."""

import json
import re
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from eotattn.experiments.figures import (
    ablations,
    fig1_copy_mixture,
    fig2_claims,
    fig3_retrieval,
    fig4_claims,
    fig5_vision,
    sink_claims,
)
from eotattn.experiments.reproduce import FIGURES

STORED = Path(__file__).parents[2] / "figures"
CLAIMS = {
    ablations: ablations.AblationStudy,
    fig1_copy_mixture: fig1_copy_mixture.CopyMixtureStudy,
    fig2_claims: fig2_claims.LanguageStudy,
    fig3_retrieval: fig3_retrieval.RetrievalStudy,
    fig4_claims: fig4_claims.DnaStudy,
    fig5_vision: fig5_vision.VisionStudy,
}


@lru_cache
def read(module, scale):
    study = CLAIMS[module]
    return study.read(study.figure.recipe(scale), str(STORED))


@lru_cache
def verdict(module, scale):
    return module.verdict(read(module, scale))


def numbers(text):
    return {number.lstrip("+") for number in re.findall(r"[-+]?\d+\.\d+", text)}


def stored_verdict(name):
    """What the last cell of an executed notebook shows."""
    cells = json.loads((STORED / "h200" / f"{name}.ipynb").read_text())["cells"]
    return "".join(cells[-1]["outputs"][0]["data"]["text/markdown"])


@pytest.mark.parametrize("module", CLAIMS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_verdicts_have_the_numbers_of_the_stored_notebooks(module):
    stored = stored_verdict(CLAIMS[module].figure.name)
    assert len(numbers(stored)) > 15
    assert numbers(stored) == numbers(verdict(module, "h200"))


#: What notebooks said that were executed where their runs were made, before studies were tables.
BEFORE = {
    "fig1_copy_mixture": [
        "row-centred: held.** 0.9936 ± 0.0015 over seeds; the lowest is 0.9929",
        "Seed 2: loss on fresh sequences 1.1464 nats a token, 0.004",
    ],
    "fig2_language": [
        "at least 1% below rope at the training length (1024): refuted.** 1.1474 ± 0.0358 against 1.1182 ± 0.0240",
        "fast_goat: at 16x better than ALiBi: held.** 0.9281 ± 0.0078 against 1.0747 ± 0.0366",
        "rope diverges, by more than 0.5 bits per byte: held.** From 1024 to 16384 tokens it moves by +2.590 ± 0.298",
        "paper_goat: sink mass falls as the signal grows, with a rank correlation below -0.5: refuted",
        "local_rotary_goat: sink mass falls as the signal grows, with a rank correlation below -0.5: held",
        "alibi 0.0039 to 0.0034",
    ],
    "fig3_retrieval": [
        "GOAT, needle, 16x: at least 0.99: held",
        "paper's form, passkey, 16x: at least 0.99: refuted.** exact match: mean 0.279, worst seed and depth 0.000",
        "0.00015 for sinusoidal (at an end of the range: sinusoidal)",
    ],
    "fig4_dna": [
        "paper_goat: lower NLL than RoPE: refuted.** 1.1849 ± 0.0006 against 1.1683 ± 0.0028 nats a base",
        "GC content follows the true continuation better than RoPE's: undecided.** Correlation 0.391 ± 0.036",
        "11547 MiB (GOAT, lanes reserved, compiled) against 12760 MiB (RoPE, fused, compiled): 0.90",
    ],
    "fig5_vision": [
        "32 pixels (2x), positions in units of the training image: better than learned absolute embeddings: held",
        "GOAT 0.962 ± 0.045, learned (interpolated) 0.773 ± 0.123, sinusoidal 0.965 ± 0.008",
        "becomes local: undecided.** The mean distance under the induced prior is 0.879 ± 0.210",
        "becomes shift invariant, to 90% of its variance: held.** The lag alone explains 98%",
    ],
    "ablations": [
        "`fast_goat`: 1.555 bits per byte at the training length and 1.548 at 16x; retrieval 1.000 and 1.000",
        "Best in bits per byte at 16x: `fast_paper_goat` 1.511, `fast_goat` 1.548, `rotary_goat` 1.552",
    ],
}


@pytest.mark.parametrize("module", CLAIMS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_what_is_stored_says_what_it_said(module):
    text = verdict(module, "h200")
    assert [line for line in BEFORE[CLAIMS[module].figure.name] if line not in text] == []


@pytest.mark.parametrize("module", CLAIMS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_stored_tables_are_drawn(module, tmp_path):
    study = read(module, "laptop")
    lines = verdict(module, "laptop").splitlines()
    assert all(line.startswith("- ") for line in lines)
    assert re.search(r"\d+ runs, \d+ s on .*, at commit [0-9a-f]{8}", lines[-1])
    figure = module.draw(study)
    assert figure.axes[0].get_title(loc="left").startswith("(a)")
    plt.close(figure)
    folder = study.save(str(tmp_path))  # and once more
    again = type(study).read(study.recipe, str(tmp_path))
    assert module.verdict(again) == verdict(module, "laptop")
    assert folder.path == tmp_path / "laptop"


@pytest.mark.parametrize("scale", ["laptop", "gpu"])
def test_the_stored_sinks_are_read(scale):
    study = sink_claims.SinkStudy.read(sink_claims.FIGURE.recipe(scale), str(STORED))
    shown = json.loads((STORED / "gpu" / "fig_sinks.ipynb").read_text())["cells"][-1]["outputs"]
    if scale == "gpu":
        assert "".join(shown[0]["data"]["text/markdown"]) == sink_claims.sink_verdict(study)


def missing(stored, today):
    """What a stored configuration says otherwise than today's; what it lacks was added later."""
    if isinstance(stored, dict):
        return [f"{k}: {text}" for k in stored.keys() & today.keys() for text in missing(stored[k], today[k])]
    if isinstance(stored, list) and len(stored) == len(today):
        return [text for pair in zip(stored, today, strict=True) for text in missing(*pair)]
    return [] if stored == today else [f"{stored} is {today} today"]


RECORDED = [(figure, file) for figure in FIGURES.values() for file in sorted(STORED.glob(f"*/{figure.name}.json"))]


@pytest.mark.parametrize(("figure", "file"), RECORDED, ids=[f"{file.parent.name}-{file.stem}" for _, file in RECORDED])
def test_recipes_are_those_that_made_what_is_stored(figure, file):
    stored = json.loads(file.read_text())["configuration"]
    today = json.loads(json.dumps(asdict(figure.recipe(file.parent.name))))
    assert missing(stored, today) == []
