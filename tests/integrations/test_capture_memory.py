"""Memory of a capture, in a process of its own."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

PROGRAM = """
import resource, sys, torch, transformers
torch.set_num_threads(1)
from eotattn.integrations import capture
config = transformers.LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192)
config._attn_implementation, length = sys.argv[1], int(sys.argv[2])
model = transformers.LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 100, (1, length))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    with capture(model):
        model(tokens[:, :64])
    if sys.argv[1] == "sdpa":
        model(tokens)  # what it needs by itself
    before = peak()
    with capture(model) as captured:
        model(tokens)
    assert len(captured.layers) == 1
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize(("implementation", "length", "bound"), [("sdpa", 8192, 100), ("eager", 4096, 125)])
def test_full_statistics_stay_below_a_quarter_of_one_stored_map(implementation, length, bound):
    """MiB, above the model's own where it stores no maps; those of the four heads would take 1024, and 256 at 4096."""
    command = [sys.executable, "-c", PROGRAM, implementation, str(length)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < bound
