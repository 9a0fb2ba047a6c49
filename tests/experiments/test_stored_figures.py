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
#: Numbers of stored verdicts that tables do not hold: the largest of all heads, and u at the last trained position.
NOT_IN_TABLES = {"fig2_language": {"0.22", "0.39", "2.47", "0.38", "2.18", "1.18", "0.06"}}


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
    name = CLAIMS[module].figure.name
    before = numbers(stored_verdict(name))
    assert len(before) > 15
    assert before - numbers(verdict(module, "h200")) <= NOT_IN_TABLES.get(name, set())


#: Claims of stored notebooks -> what they are called now, where no interval is between them.
SAME = [
    ("fig2_language", "goat: at 16x no worse than ALiBi: held", "goat: at 16x better than ALiBi: held"),
    ("fig2_language", "rope diverges: held", "rope diverges, by more than 0.5 bits per byte: held"),
    ("fig2_language", "paper_goat: sink mass falls as the signal grows: did NOT hold", "below -0.5: refuted"),
    ("fig3_retrieval", "GOAT, needle, 16x: held", "GOAT, needle, 16x: at least 0.99: held"),
    ("fig3_retrieval", "paper's form, needle, 16x: did NOT hold", "paper's form, needle, 16x: at least 0.99: refuted"),
    ("fig4_dna", "paper_goat: lower NLL than RoPE: did NOT hold", "paper_goat: lower NLL than RoPE: refuted"),
    ("fig5_vision", "becomes shift invariant: held", "becomes shift invariant, to 90% of its variance: held"),
    ("fig1_copy_mixture", "row-centred, in every seed: held", "above 0.95, row-centred: held"),
]


@pytest.mark.parametrize(("name", "then", "now"), SAME)
def test_what_intervals_decide_is_decided_as_before(name, then, now):
    (module,) = [module for module, study in CLAIMS.items() if study.figure.name == name]
    assert then in stored_verdict(name)
    assert now in verdict(module, "h200")


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
