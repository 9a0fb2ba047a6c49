"""The project's own decoders through the same door: bytes as tokens, content told apart from prior."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import eotattn
from eotattn.analysis import ByteTokenizer, prior_panels
from eotattn.experiments.networks import Decoder, DecoderConfig

TEXTS = ["def f(x):\n    return x", "for i in range(9): pass", "ä = 'é'"]


def decoder(kind):
    torch.manual_seed(0)
    network = Decoder(DecoderConfig(kind, num_layers=2, embed_dim=16, num_heads=2, train_length=32))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "prior" in name:
                parameter.add_(0.5)
    return network


@pytest.mark.parametrize("kind", ["rope", "alibi", "goat"])
def test_decoders_are_analysed_with_their_priors(kind):
    network = decoder(kind)
    result = eotattn.analyze(network, TEXTS, tokenizer=ByteTokenizer(32))
    mean = result.heads.mean
    np.testing.assert_allclose(mean["margin"], mean["content margin"] + mean["prior margin"], atol=1e-4)
    assert (np.abs(mean["prior margin"]).max() > 0) == (kind != "rope")
    assert result.needs == {}
    assert result.num_texts == 3
    assert np.nanmax(mean["certificate"]) < 1e-5


def test_bytes_are_tokens():
    tokenizer = ByteTokenizer(8)
    assert tokenizer("aä")["input_ids"].tolist() == [[97, 195, 164]]
    assert tokenizer("abc", max_length=2, truncation=True, return_tensors="pt")["input_ids"].tolist() == [[97, 98]]
    assert tokenizer.convert_ids_to_tokens([97, 195, 10]) == ["a", "<195>", "⏎"]
    begins = ByteTokenizer(8, beginning=256)
    assert begins("abc", max_length=2)["input_ids"].tolist() == [[256, 97]]
    assert begins.convert_ids_to_tokens([256, 97]) == ["<begin>", "a"]
    with pytest.raises(ValueError, match=r"ByteTokenizer: options must be among .*; got \['padding'\]"):
        tokenizer("a", padding=True)
    with pytest.raises(ValueError, match=r"analyze: texts\[0\] must fit into the model's 8 positions"):
        eotattn.analyze(decoder("rope"), TEXTS, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["causal", "full", "window"])
def test_panels_show_the_fitted_prior(kind):
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 2, 9, 9, generator=generator, dtype=torch.float64)
    everything = torch.ones(9, 9, dtype=torch.bool)
    future = everything.triu(1) & (kind != "full") | everything.tril(-3) & (kind == "window")
    weights = torch.softmax(score.masked_fill(future, -torch.inf), -1)
    report = next(iter(eotattn.analyze(attention=weights[0]).priors.values()))
    figure = prior_panels(report, 1, length=6)
    panels = figure.axes
    drawn = next(line for line in panels[0].lines if len(line.get_xdata()) == 6)
    np.testing.assert_allclose(drawn.get_ydata(), report.key[1, :6])
    lags = next(line for line in panels[1].lines if len(line.get_xdata()) > 2)
    assert lags.get_xdata()[0] == (-5 if kind == "full" else 0)
    assert lags.get_xdata()[-1] == (2 if kind == "window" else 5)
    assert np.isfinite(lags.get_ydata()).all()
    induced = panels[3].images[0].get_array()
    dense = report.prior().dense(torch.arange(6), torch.arange(6), dtype=torch.float64)[1].detach()
    wanted = torch.softmax(dense.masked_fill(future[:6, :6], -torch.inf), -1).clamp(min=1e-3)
    np.testing.assert_allclose(induced.filled(1e-3), np.where(future[:6, :6], 1e-3, wanted), atol=1e-9)
    plt.close("all")
