"""Parameters of content and of log-priors, told apart for an optimiser."""

from torch import nn

from eotattn import PriorAttention, goat_prior, split_parameters
from eotattn.priors import HeadsPrior, RecencyPrior, SinkPrior


def test_every_trainable_parameter_is_on_one_side():
    shared = RecencyPrior(4)
    priors = (shared, shared + SinkPrior(4), goat_prior(4))
    layers = [PriorAttention(16, num_heads=4, prior=prior, batch_first=True) for prior in priors]
    model = nn.Sequential(nn.Linear(16, 16), *layers)
    content, priors = split_parameters(model)
    assert {id(p) for p in content} | {id(p) for p in priors} == {id(p) for p in model.parameters()}
    assert len(content) + len(priors) == len(list(model.parameters()))
    assert sum(p is next(shared.parameters()) for p in priors) == 1
    assert all(id(p) in {id(q) for layer in layers for q in layer.prior.parameters()} for p in priors)


def test_frozen_parameters_are_on_neither_side():
    layer = PriorAttention(16, num_heads=4, prior=HeadsPrior(SinkPrior(1), [0] * 4).freeze(), batch_first=True)
    content, priors = split_parameters(layer)
    assert priors == []
    assert content == [p for p in layer.parameters() if p.requires_grad]


def test_a_prior_alone_is_all_prior():
    content, priors = split_parameters(goat_prior(4))
    assert content == []
    assert len(priors) == len(list(goat_prior(4).parameters()))
