"""The FlexAttention backend through PyTorch's own uncompiled form, which runs anywhere: same call, same numbers."""

from functools import lru_cache

import pytest
import torch
from tolerances import assert_close
from torch.nn.attention.flex_attention import flex_attention

from eotattn.attention import PackedDocuments, explain, prior_attention
from eotattn.kernels import flex
from eotattn.priors import GridPrior, RecencyPrior, RelativeBiasPrior, SinkPrior, goat_prior, grid_positions

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
H, LENGTH = 4, 12


def randomise(prior):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return prior


AXES = RelativeBiasPrior(H, 2), RelativeBiasPrior(H, 3)
PADDING = torch.zeros(2, LENGTH, dtype=torch.bool)
PADDING[0, 9:] = True
CALLS = {
    "no prior": {"is_causal": True},
    "table": {"prior": randomise(RelativeBiasPrior(H, 3))},
    "goat, causal": {"prior": randomise(goat_prior(H, num_frequencies=2, length_scale=16.0)), "is_causal": True},
    "sum": {"prior": RecencyPrior(H) + randomise(SinkPrior(H)), "is_causal": True},
    "padding": {"prior": RecencyPrior(H), "is_causal": True, "key_padding_mask": PADDING},
    "window": {"prior": randomise(RelativeBiasPrior(H, 3)), "is_causal": True, "window": 3},
    "padding in a window": {"is_causal": True, "window": 5, "key_padding_mask": PADDING},
    "documents": {"prior": randomise(RelativeBiasPrior(H, 3)), "documents": PackedDocuments([5, 7, 12])},
    "causal documents": {"is_causal": True, "window": 4, "documents": PackedDocuments([5, 7, 12])},
    "chunk": {"is_causal": True, "query_positions": range(3, 15), "key_positions": range(1, 13)},
    "mask": {
        "prior": randomise(RelativeBiasPrior(H, 3)),
        "attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(),
    },
    "positions": {
        "prior": randomise(RelativeBiasPrior(H, 5)),
        "query_positions": torch.arange(LENGTH).flip(0),
        "key_positions": torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) + 2]),
        "is_causal": True,
    },
    "grid": {
        "prior": randomise(GridPrior(*AXES)),
        "query_positions": grid_positions(3, 4),
        "key_positions": grid_positions(3, 4),
    },
}


@pytest.fixture
def uncompiled(monkeypatch):
    torch._dynamo.reset()  # the uncompiled form is traced too, and what other tests traced counts against a limit
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(flex, "refusal", lambda query, **_: None)


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_flex_equals_the_reference(uncompiled, arguments, kv_heads):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, H, LENGTH, 16), (2, kv_heads, LENGTH, 16), (2, kv_heads, LENGTH, 16))
    content = [torch.randn(shape, generator=generator) for shape in shapes]
    with torch.no_grad():  # FlexAttention has no backward on the CPU
        output = prior_attention(*content, **arguments, backend="flex")
        expected = prior_attention(*content, **arguments, backend="reference")
    assert_close(output, expected)


@pytest.mark.parametrize(
    ("prior", "learned"),
    [
        (RelativeBiasPrior(H, 3), False),
        (RecencyPrior(H), True),
        (RelativeBiasPrior(H, 3) + RecencyPrior(H), True),
        (0.5 * SinkPrior(H), True),
        (RecencyPrior(H).freeze(), False),
        (None, False),
    ],
)
def test_it_is_told_of_learned_numbers_that_it_cannot_differentiate(monkeypatch, prior, learned):
    """PyTorch's compiler refuses a backward pass that reads one learned tensor twice; the call is refused instead."""
    told = []
    monkeypatch.setattr(flex, "refusal", lambda query, **named: told.append(named["learned"]))
    content = [torch.zeros(2, H, LENGTH, 16)] * 3
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            explain(*content, prior=prior, backend="flex")
        assert told[-1] == (learned and recording)
    monkeypatch.undo()
    on_gpu = torch.empty(1, 1, 2, 4, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"), raising=False)
    assert "freeze them" in flex.refusal(on_gpu, mask=None, dropout_p=0.0, learned=True)
    assert flex.refusal(on_gpu, mask=None, dropout_p=0.0, learned=False) is None


def test_blocks_of_a_pattern_are_found_once(uncompiled, monkeypatch):
    """Those of a band or of documents; a tensor of the caller may change, so its blocks are found every time."""
    made, blocks = [], flex._blocks
    monkeypatch.setattr(flex, "_blocks_once", lru_cache(lambda *a: made.append("once") or blocks(*a)))
    monkeypatch.setattr(flex, "_blocks", lambda *a: made.append("again") or blocks(*a))
    content = [torch.zeros(2, H, LENGTH, 16)] * 3
    documents, others = PackedDocuments([5, 7, 12]), PackedDocuments([12, 7, 5])
    calls = [{"documents": documents}, {"documents": others}, {"window": 3}, {"window": 4}]
    with torch.no_grad():
        for arguments in (*calls, *calls):
            prior_attention(*content, is_causal=True, backend="flex", **arguments)
        assert made == ["once"] * 4
        for _ in range(2):
            prior_attention(*content, is_causal=True, backend="flex", key_padding_mask=PADDING)
    assert made[4:] == ["again"] * 2
