"""A model with priors and the static cache of transformers: exact, compiled too, and one graph of it all is refused."""

import pytest
import torch
from integrations.families import GROUPED
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn import attach
from eotattn.priors import goat_prior

transformers = pytest.importorskip("transformers")
LENGTH, PROMPT = 10, 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).eval()


def decoded(model, tokens, step, cache):
    ends = [PROMPT, *range(PROMPT + 1, LENGTH + 1)]
    outputs = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        run = step if start else model
        outputs.append(run(tokens[:, start:end], past_key_values=cache, cache_position=torch.arange(start, end)).logits)
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "static, compiled", "dynamic"])
def test_decoding_is_the_full_pass(model, kind):
    tokens = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with attach(model, lambda heads: off_neutral(goat_prior(heads, num_frequencies=2))):
        full = model(tokens).logits
        cache = transformers.DynamicCache(config=model.config)
        if kind != "dynamic":
            cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        torch._dynamo.reset()
        step = torch.compile(model, backend="eager") if "compiled" in kind else model
        assert_close(decoded(model, tokens, step, cache), full)
    assert (full - model(tokens).logits).abs().max() > 1e-3, "the prior must matter, or this test says nothing"


@torch.no_grad()
def test_one_graph_of_an_attached_model_is_refused_in_one_line(model):
    tokens = torch.ones(1, 3, dtype=torch.int64)
    with attach(model, lambda heads: goat_prior(heads)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="attach: masks that say where tokens are have no graph"):
            torch.compile(model, backend="eager", fullgraph=True)(tokens)
