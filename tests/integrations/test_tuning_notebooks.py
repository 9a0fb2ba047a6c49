"""The notebooks that tune sinks and priors: their cells run, on a small random model in place of the trained one."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from eotattn.analysis import ByteTokenizer

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
#: Notebook -> lines of sizes, smaller ones, and what the last cell says.
CASES = {
    "drop_the_cache": ({"256, 64, 24, 6, 14": "32, 8, 2, 2, 3"}, ["the window alone, against everything: "]),
    "extend_the_context": (
        {
            "256, 24, 14, 1024": "32, 2, 3, 64",
            "128, 700, 60, (128, 256, 512, 1024, 2048), 64": "16, 2, 1, (16, 32, 1024), 2",
        },
        ["the small model at ", "against a sliding window: "],
    ),
}


def sources(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], cells


@pytest.mark.parametrize("name", CASES)
def test_cells_run(name, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scope = {"model": model, "tokenizer": ByteTokenizer(10**9), "transformers": transformers}
    smaller, said = CASES[name]
    code, _ = sources(name)
    assert all(any(line in cell for cell in code) for line in smaller)
    for cell in code[2:]:
        for line, small in smaller.items():
            cell = cell.replace(line, small)
        exec(compile(cell, name, "exec"), scope)
    out = capsys.readouterr().out
    assert all(words in out for words in said)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "content does not train"
    plt.close("all")


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_was_computed(name):
    code, cells = sources(name)
    assert "%pip install" in code[0]
    assert "**Verdict.**" in "".join(cells[0]["source"])
    assert "TODO" not in "".join(cells[0]["source"])
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    said = "".join("".join(out.get("text", "")) for out in cells[-1]["outputs"])
    assert all(words in said for words in CASES[name][1])
