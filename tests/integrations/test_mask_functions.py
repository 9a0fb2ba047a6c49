"""Windows are recognised in the mask functions of transformers, and nothing else is."""

import pytest
import torch

from eotattn.integrations import capture
from eotattn.integrations import interface_calls as integration
from eotattn.integrations.mask_functions import causal_window

masking_utils = pytest.importorskip("transformers.masking_utils")


def test_the_window_is_read():
    assert causal_window(masking_utils.sliding_window_causal_mask_function(7)) == 7


def test_other_functions_are_not_windows():
    and_masks, overlay = masking_utils.and_masks, masking_utils.sliding_window_overlay
    causal = masking_utils.causal_mask_function
    others = [
        causal,
        masking_utils.bidirectional_mask_function,
        overlay(7),
        and_masks(causal, overlay(7)),
        and_masks(overlay(7), causal, lambda batch, head, query, key: key != 3),
        and_masks(overlay(7), lambda batch, head, query, key: key <= query),
        masking_utils.chunked_causal_mask_function(7, torch.zeros(1, dtype=torch.int64)),
        lambda batch, head, query, key: key > query - 7,
    ]
    assert [causal_window(function) for function in others] == [None] * len(others)


@pytest.fixture
def windowed():
    """A model whose attention sees five tokens, and seventeen tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=5,
        attn_implementation="sdpa",
    )
    return transformers.MistralForCausalLM(config).eval(), torch.randint(0, 50, (1, 17))


def captured(model, tokens):
    with torch.no_grad(), capture(model) as found:
        model(tokens)
    (statistics,) = found.layers.values()
    return statistics


def test_a_window_gives_the_statistics_of_its_mask(windowed, monkeypatch):
    read = captured(*windowed)
    monkeypatch.setattr(integration, "causal_window", lambda function: None)
    asked = captured(*windowed)
    for name in asked.sums:
        assert torch.allclose(read.sums[name], asked.sums[name], atol=1e-5), name
    assert torch.equal(read.column_count, asked.column_count)
    assert read.column_count.max() == 5


def test_a_window_needs_no_row_of_its_mask(windowed, monkeypatch):
    asked, cropped = [], integration._cropped
    monkeypatch.setattr(integration, "_cropped", lambda rows, keys: asked.append(keys) or cropped(rows, keys))
    captured(*windowed)
    assert not asked
    monkeypatch.setattr(integration, "causal_window", lambda function: None)
    captured(*windowed)
    assert asked
