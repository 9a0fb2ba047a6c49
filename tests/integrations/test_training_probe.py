"""Training under a probe is training without it, and the probe sees a sink form."""

import numpy as np
import pytest
import torch
from torch import nn

from eotattn import PriorAttention, SinkPrior
from eotattn.integrations.training_probe import TrainingProbe

L, E, H = 8, 8, 2


def train(probe_every=None, steps=30):
    """Learn to return the first token: attention must find it, and its prior may."""
    torch.manual_seed(0)
    layer = PriorAttention(E, H, prior=SinkPrior(H, 0), dropout=0.1, batch_first=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    probe = TrainingProbe(layer, every=probe_every or 1)
    for step in range(steps):
        tokens = torch.randn(4, L, E)
        if probe_every is None:
            output, _ = layer(tokens, need_weights=False)
        else:
            with probe.step(step):
                output, _ = layer(tokens, need_weights=False)
        optimiser.zero_grad()
        (output - tokens[:, :1]).square().mean().backward()
        optimiser.step()
    return layer, probe


def test_training_does_not_change():
    (plain, _), (probed, probe) = train(), train(probe_every=10)
    for one, other in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sorted(probe.reports) == [0, 10, 20]


def test_a_sink_is_seen_to_form():
    _, probe = train(probe_every=10, steps=61)
    table = probe.to_dict()
    assert table["step"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    mass = table["sink mass of key 0"][:, 0].mean(-1)
    assert mass[0] == pytest.approx(1 / L, abs=0.05)
    assert mass[-1] > 0.5
    assert table["prior margin"][0].max() == 0
    assert table["prior margin"][-1].min() > 0.1
    assert table["sink rate"].shape == (7, 1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"TrainingProbe: every must be at least 1"):
        TrainingProbe(nn.Identity(), every=0)
    probe = TrainingProbe(nn.Identity(), every=2)
    with probe.step(1):
        pass
    assert probe.to_dict()["step"].dtype == np.int64
