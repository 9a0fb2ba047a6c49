"""Vision, speech and encoder-decoder models by what their processors make; texts of one length in batches."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "integrations"))

from families import BY_NAME, Family

from eotattn.analysis import ByteTokenizer, analyze, compare, findings

SOUND = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
SOUND |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
SOUND |= {"max_source_positions": 10, "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = Family("whisper", "WhisperModel", "WhisperConfig", {**SOUND, "decoder_start_token_id": 1}, gain=4.0)


def samples(name):
    """Three samples of a family, each as its processor would return it, and the model's own maps of them."""
    family = WHISPER if name == "whisper" else BY_NAME[name]
    model, inputs = family.build("eager"), family.inputs()
    inputs.pop("attention_mask", None)
    if name == "whisper":
        sound = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
        inputs = {"input_features": sound, "decoder_input_ids": inputs["input_ids"]}
    each = [{key: value[n : n + 1] for key, value in inputs.items()} for n in range(3)]
    with torch.no_grad():
        outputs = [model(**sample, output_attentions=True) for sample in each]
    return model, each, outputs


def share_of_first(maps):
    """(H,) mean weight on the first key, over the queries of a map (1, H, Q, K) that may see it."""
    return maps[0, :, :, 0].double().mean(-1).numpy()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vit", {"": "attentions"}),
        ("bart", {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}),
        ("whisper", {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}),
    ],
)
def test_shares_are_those_of_the_models_own_maps(name, parts):
    model, each, outputs = samples(name)
    result = analyze(model, each)
    found = dict(zip(result.heads.layers, result.heads.mean["sink mass of key 0"], strict=True))
    expected = [np.mean([[share_of_first(m) for m in out[key]] for out in outputs], 0) for key in parts.values()]
    kinds = {
        "cross": [name for name in found if "encoder_attn" in name],
        "encoder": [name for name in found if name.startswith("encoder")],
        "decoder": [name for name in found if name.startswith("decoder") and "encoder_attn" not in name],
        "": list(found),
    }
    for part, numbers in zip(parts, expected, strict=True):
        np.testing.assert_allclose([found[layer] for layer in kinds[part]], numbers, atol=1e-5)
    assert result.num_texts == result.heads.num_sequences == 3
    assert result.tokens == ()
    assert not any("encoder_attn" in layer for layer in result.priors), "lags mean nothing between two sequences"
    assert "attention" in findings(result)[0]
    assert compare(result, result).change("entropy").mean == 0
    assert "report.js" not in result.show().html


def test_texts_of_one_length_run_together_and_nothing_changes():
    model = BY_NAME["llama"].build("sdpa", dtype=torch.float64)
    texts = ["".join(chr(3 + (7 * n + n * n * t) % 50) for n in range(12 + (t == 2))) for t in range(6)]
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    one, some = (analyze(model, texts, tokenizer=ByteTokenizer(64), batch_size=size) for size in (1, 4))
    handle.remove()
    assert calls == [1] * 6 + [1, 1, 1, 3], "neighbours of one length, the first apart"
    assert one.tokens == some.tokens
    for part in ("mean", "low", "high"):
        for name, grid in getattr(one.heads, part).items():
            np.testing.assert_allclose(getattr(some.heads, part)[name], grid, rtol=1e-6, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(some.loss, one.loss, rtol=1e-5)
    assert np.isfinite(some.loss).all()
    for a in range(2):
        assert np.array_equal(one.strongest.position[a], some.strongest.position[a])
    assert (some.num_texts, some.num_given, some.is_complete) == (6, 6, True)
    with pytest.raises(ValueError, match="analyze: batch_size must be at least 1"):
        analyze(model, texts, tokenizer=ByteTokenizer(64), batch_size=0)


def test_what_does_not_fit_is_one_clear_line():
    model, each, _ = samples("bart")
    with pytest.raises(
        ValueError, match=r"analyze: model must be an encoder or a decoder, not both; .*decoder_input_ids"
    ):
        analyze(model, ["a text", "b text"], tokenizer=ByteTokenizer(64))
    whole = {name: torch.cat([sample[name] for sample in each]) for name in each[0]}
    for wrong in (whole, {}, {"input_ids": [1, 2]}):
        with pytest.raises(ValueError, match=r"analyze: texts\[1\] must hold tensors of one sample"):
            analyze(model, [each[0], wrong])
    with pytest.raises(ValueError, match=r"analyze: max_length must not be given with texts\[0\]"):
        analyze(model, each, max_length=4)
