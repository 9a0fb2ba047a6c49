"""The module with two sides: its limits, its gradients, padding, and what it refuses."""

import math

import pytest
import torch
from tolerances import assert_close

from eotattn.attention import prior_attention
from eotattn.priors import FourierPrior, RecencyPrior, RelativeBiasPrior
from eotattn.transport import SinkhornAttention

INF = math.inf


def layer(key_penalty, *, prior=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return SinkhornAttention(12, 3, key_penalty=key_penalty, prior=prior, **options).to(dtype)


def tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_penalty_is_softmax_attention(is_causal):
    prior = RecencyPrior(3)
    module, x = layer(0.0, prior=prior), tokens(2, 7, 12)
    output, weights = module(x, is_causal=is_causal, need_weights=True)
    heads = [module._heads(one, x) for one in (module.query_proj, module.key_proj, module.value_proj)]
    expected = prior_attention(*heads, prior=prior, is_causal=is_causal)
    assert_close(output, module.out_proj(expected.transpose(1, 2).flatten(2)))
    assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))


def test_an_infinite_penalty_is_doubly_stochastic_and_equals_plain_iterations():
    module, x = layer(INF, tolerance=1e-12, max_iterations=2000), 3 * tokens(2, 6, 12)
    _, weights = module(x, need_weights=True)
    assert_close(weights.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    assert_close(weights.sum(-2), torch.ones(2, 3, 6, dtype=torch.float64), tolerance=1e-10)
    logits = module._heads(module.query_proj, x) @ module._heads(module.key_proj, x).mT / 2
    for _ in range(2000):
        logits = logits.log_softmax(-2).log_softmax(-1)
    assert_close(weights, logits.exp(), tolerance=1e-9)


def test_the_path_between_the_limits():
    x = 3 * tokens(1, 8, 12)
    uneven = []
    for penalty in (0.0, 0.1, 1.0, 10.0, INF):
        _, weights = layer(penalty, tolerance=1e-8)(x, need_weights=True)
        uneven.append(float((weights.detach().sum(-2) - 1).abs().sum()))
    assert uneven == sorted(uneven, reverse=True)
    assert uneven[0] > 0.5
    assert uneven[-1] < 1e-6


def test_padding_changes_nothing_for_the_rest():
    module, x = layer(INF, prior=FourierPrior(3), tolerance=1e-12), tokens(1, 9, 12)
    padding = torch.zeros(1, 9, dtype=torch.bool)
    padding[:, 6:] = True
    assert_close(module(x, key_padding_mask=padding)[0][:, :6], module(x[:, :6])[0], tolerance=1e-9)


def test_training_lowers_a_loss_and_reaches_every_parameter():
    module = layer(2.0, prior=RecencyPrior(3), dtype=torch.float32, tolerance=1e-5)
    x, target = tokens(2, 6, 12, dtype=torch.float32), tokens(2, 6, 12, seed=2, dtype=torch.float32)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (module(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_trained_penalty_has_the_gradient_of_finite_differences():
    module = layer(0.7, prior=RecencyPrior(3), tolerance=1e-12, max_iterations=2000).train_key_penalty()
    x, weight = 3 * tokens(2, 6, 12), tokens(2, 6, 12, seed=2)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])

    def loss():
        return (module(x, key_padding_mask=padding)[0] * weight).sum()

    (found,) = torch.autograd.grad(loss(), module.log_key_penalty)
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            module.log_key_penalty.add_(step)
            values.append(float(loss()))
            module.log_key_penalty.sub_(step)
    assert abs(float(found)) > 1e-3
    assert float(found) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6)
    fixed = layer(0.7, prior=RecencyPrior(3), tolerance=1e-12, max_iterations=2000)
    fixed.load_state_dict(module.state_dict(), strict=False)
    assert_close(module(x)[0], fixed(x)[0], tolerance=1e-10)


def test_a_trained_penalty_finds_the_one_that_made_the_target():
    teacher, x = layer(3.0, tolerance=1e-8), 3 * tokens(2, 8, 12)
    target = teacher(x)[0].detach()
    student = layer(0.3, tolerance=1e-8).train_key_penalty()
    optimizer = torch.optim.Adam([student.log_key_penalty], lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        (student(x)[0] - target).square().mean().backward()
        optimizer.step()
    assert student.key_penalty == pytest.approx(3.0, rel=0.05)
    assert f"key_penalty={student.key_penalty:g}" in repr(student)


def test_cross_attention_sequence_first_and_bfloat16():
    module, x, memory = layer(1.0, tolerance=1e-10), tokens(2, 5, 12), tokens(2, 9, 12, seed=3)
    output, none = module(x, memory)
    assert none is None
    late = layer(1.0, tolerance=1e-10, batch_first=False)
    assert_close(late(x.transpose(0, 1), memory.transpose(0, 1))[0].transpose(0, 1), output)
    narrow = layer(1.0, dtype=torch.bfloat16)(x.bfloat16(), memory.bfloat16())[0]
    assert narrow.dtype == torch.bfloat16
    error = (narrow.double() - output).detach().abs().max() / output.detach().abs().max()
    assert float(error) <= 3e-2


def test_the_solution_is_certified():
    certificate = layer(INF, tolerance=1e-9).transport(tokens(1, 7, 12)).certificate
    assert float(certificate.distance.max()) <= 1e-6
    assert certificate.converged.all()


BAD = [
    (lambda: layer(-1.0), ValueError, "key_penalty must be non-negative"),
    (lambda: layer(INF).train_key_penalty(), ValueError, "key_penalty must be positive and finite"),
    (lambda: layer(0.0).train_key_penalty(), ValueError, "key_penalty must be positive"),
    (lambda: SinkhornAttention(10, 3, key_penalty=1.0), ValueError, "embed_dim must be a multiple of num_heads"),
    (lambda: layer(1.0, prior=RecencyPrior(2)), ValueError, "prior must have lanes and 3 heads"),
    (lambda: layer(1.0, prior=RelativeBiasPrior), TypeError, "prior must be a LogPrior"),
    (lambda: layer(1.0)(tokens(2, 5, 12), is_causal=True), ValueError, "is_causal must be left out under a key"),
    (lambda: layer(1.0)(tokens(2, 5, 11)), ValueError, r"query must have shape \(any, any, 12\)"),
    (
        lambda: layer(1.0)(tokens(2, 5, 12), key_padding_mask=torch.ones(2, 5, dtype=torch.bool)),
        ValueError,
        "key_padding_mask must leave every sample a key",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=f"SinkhornAttention: {message}"):
        call()
