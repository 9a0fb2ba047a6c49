"""A T5 of transformers with its self-attention replaced: T5Prior, near and far keys apart, no bias of every pair."""

import pytest
import torch
from tolerances import assert_close
from torch import nn

from eotattn import prior_attention
from eotattn.attention import explain
from eotattn.priors import T5Prior

transformers = pytest.importorskip("transformers")


class PriorSelfAttention(nn.Module):
    """The projections of a T5 layer around a prior attention call."""

    def __init__(self, attention, prior, padding):
        super().__init__()
        self.attention, self.prior, self.padding = attention, prior, padding
        self.served_by = None

    def forward(self, hidden_states, mask=None, position_bias=None, past_key_values=None, **_):
        of = self.attention
        heads = [p(hidden_states).unflatten(-1, (of.n_heads, -1)).transpose(1, 2) for p in (of.q, of.k, of.v)]
        options = {"prior": self.prior, "scale": 1.0, "key_padding_mask": self.padding, "is_causal": of.is_decoder}
        self.served_by = explain(*heads, **options).backend
        return of.o(prior_attention(*heads, **options).transpose(1, 2).flatten(2)), None, None


def replace_self_attention(stack, padding):
    """Every layer of an encoder or decoder reads the table of the first one, as in T5."""
    own = stack.block[0].layer[0].SelfAttention
    prior = T5Prior.from_t5(
        own.relative_attention_bias.weight,
        num_buckets=own.relative_attention_num_buckets,
        max_distance=own.relative_attention_max_distance,
        bidirectional=not own.is_decoder,
    )
    for block in stack.block:
        block.layer[0].SelfAttention = PriorSelfAttention(block.layer[0].SelfAttention, prior, padding)
    return [block.layer[0].SelfAttention for block in stack.block]


def test_outputs_are_those_of_the_model():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    buckets = {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 30}
    model = transformers.T5Model(transformers.T5Config(**sizes, **buckets)).eval()
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    tokens, targets = torch.randint(0, 50, (2, 90)), torch.randint(0, 50, (2, 70))
    seen = torch.ones(2, 90, dtype=torch.bool)
    seen[1, 61:] = False
    call = {"input_ids": tokens, "attention_mask": seen.long(), "decoder_input_ids": targets, "use_cache": False}
    with torch.no_grad():
        expected = model(**call)
        replaced = replace_self_attention(model.encoder, ~seen) + replace_self_attention(model.decoder, None)
        output = model(**call)
    assert [layer.served_by for layer in replaced] == ["near_far"] * 4
    assert_close(output.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert_close(output.last_hidden_state, expected.last_hidden_state)
    with torch.no_grad():
        replaced[0].prior.table.add_(torch.randn(4, 12))
        assert (model(**call).encoder_last_hidden_state - expected.encoder_last_hidden_state).abs().max() > 1e-3
