"""The notebook on a trained model: its cells run, on a small random model in place of the trained one."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from eotattn.analysis import ByteTokenizer

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "find_sinks.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]


def test_it_is_short_and_installs_first():
    assert len(CELLS) <= 8
    assert "%pip install" in SOURCES[0]
    assert "**Verdict.**" in "".join(json.loads(NOTEBOOK.read_text())["cells"][0]["source"])


def test_what_it_shows_is_what_it_says():
    """The stored outputs are those of the trained model."""
    said = "".join("".join(out.get("text", "")) for out in CELLS[-1]["outputs"])
    assert "the sinks begin right after the jump: True" in said
    assert "rest on the first token: 12\n" in said
    repeats = "".join("".join(out.get("text", "")) for out in CELLS[-2]["outputs"])
    assert repeats.startswith("layer 18 head 6: ")
    assert "layer 17 head 3: " in repeats
    assert len(NOTEBOOK.read_bytes()) < 500_000


def test_its_cells_run(capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20000, **sizes)).eval()
    scope = {"model": model, "tokenizer": ByteTokenizer(256)}
    for source in SOURCES[2:]:
        small = source.replace("num_texts, max_length = 8, 256", "num_texts, max_length = 2, 64")
        exec(compile(small, NOTEBOOK.name, "exec"), scope)
    said = capsys.readouterr().out
    assert "of 8 heads" in said
    assert "the sinks begin right after the jump: " in said
    plt.close("all")


def test_without_the_packages_it_names_what_it_installs():
    """The first cell asks for nothing where everything is there."""
    plain = SOURCES[0].replace("%pip install", "raise SystemExit('asks for') #")
    everything = "import importlib.util\nimportlib.util.find_spec = lambda name: True\n"
    for there, status in ((everything, 0), (everything.replace("True", "None"), 1)):
        run = subprocess.run([sys.executable, "-c", there + plain], capture_output=True, text=True)
        assert run.returncode == status, run.stderr
