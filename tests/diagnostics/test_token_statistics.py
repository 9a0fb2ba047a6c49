"""Duplicate-token and induction scores, and the strongest keys, against loops over the definitions."""

import math

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import nn

from eotattn import PriorAttention
from eotattn.attention.statistics import score_rows, weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.attention.statistics.score_rows import ScoreRows, WeightRows
from eotattn.diagnostics import TokenStatistics, head_report, strongest_keys
from eotattn.integrations import capture

N, H, L, D = 3, 2, 13, 4
IDS = torch.tensor([[1, 2, 3] * 4 + [1], [5, 5, 5, 6, 7, 8, 5, 6, 9, 9, 1, 2, 5], list(range(20, 33))])


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, N, H, L, D, generator=generator, dtype=torch.float64)


def weights_of(scores, is_causal):
    score = scores[0] @ scores[1].mT
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    return torch.softmax(score.masked_fill(future, -math.inf) if is_causal else score, -1)


def by_loops(weights, ids, counted):
    """(2, N, H): duplicate-token and induction scores."""
    means = torch.full((2, N, H), math.nan, dtype=torch.float64)
    for n, x in enumerate(ids.tolist()):
        for h in range(H):
            p = weights[n, h].tolist()
            duplicate, induction = [], []
            for i in range(L):
                earlier = [j for j in range(i) if x[j] == x[i]]
                if earlier and counted[n, i]:
                    duplicate.append(sum(p[i][j] for j in earlier))
                    induction.append(sum(p[i][j + 1] for j in earlier))
            for kind, found in enumerate((duplicate, induction)):
                if found:
                    means[kind, n, h] = sum(found) / len(found)
    return means


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("blocks", [1, 2**19])
def test_token_scores_equal_loops(scores, is_causal, blocks, monkeypatch):
    monkeypatch.setitem(score_rows.BLOCK_ELEMENTS, "cpu", blocks)
    weights = weights_of(scores, is_causal)
    counted = torch.ones(N, L, dtype=torch.bool)
    counted[0, -3:] = False
    expected = by_loops(weights, IDS, counted)
    assert expected[:, 2].isnan().all(), "no token of the last text repeats"
    for source in (ScoreRows(scores[0], scores[1], 1.0, is_causal=is_causal), WeightRows(weights)):
        found = TokenStatistics.of(source, IDS, counted=counted)
        for ours, theirs in zip((found.duplicate, found.induction), expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert_close(ours.nan_to_num(), theirs.nan_to_num(), tolerance=1e-10)
    both = found + found
    assert both.induction.shape == (2 * N, H)
    report = head_report(
        {"a": SequenceStatistics.of(weight_statistics(weights))}, token_scores={"a": found}, num_bootstraps=3
    )
    np.testing.assert_allclose(report.mean["induction score"][0], expected[1, :2].mean(0), atol=1e-10)


class Reader(nn.Module):
    """Reads token ids."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8, dtype=torch.float64)
        self.attention = PriorAttention(8, H, batch_first=True, dtype=torch.float64)

    def forward(self, ids):
        return self.attention(3 * self.embed(ids), need_weights=True, is_causal=True, average_attn_weights=False)


def test_capture_reads_the_ids_that_the_model_is_given():
    torch.manual_seed(0)
    model = Reader().eval()
    with torch.no_grad(), capture(model, token_scores=True, heads=[1]) as captured:
        _, weights = model(IDS)
    (found,) = captured.token_scores.values()
    expected = by_loops(weights, IDS, torch.ones(N, L, dtype=torch.bool))[:, :, [1]]
    assert_close(found.duplicate[:2], expected[0, :2], tolerance=1e-10)
    assert_close(found.induction[:2], expected[1, :2], tolerance=1e-10)
    with torch.no_grad(), capture(model) as without:
        model(IDS)
    assert without.token_scores == {}


def planted_sinks():
    """Causal maps of four texts whose sink is key 0 in one head and key 5 in the other, once it is there."""
    weights = torch.zeros(4, 2, L, L, dtype=torch.float64)
    for i in range(L):
        weights[:, 0, i, 0] += 0.6
        weights[:, 1, i, 5 if i >= 5 else i] += 0.6
        weights[:, :, i, i] += 0.4
    return weights


def test_the_strongest_key_is_found_wherever_it_is():
    stats = {"layer": SequenceStatistics.of(weight_statistics(planted_sinks()))}
    tokens = [[f"{text}-{k}" if k != 5 else " the" for k in range(L)] for text in range(4)]
    found = strongest_keys(stats, tokens=tokens)
    assert found.position[0].tolist() == [[0, 5]] * 4
    assert found.token[0][:, 1].tolist() == [" the"] * 4
    np.testing.assert_allclose(found.mass[0][:, 0], (0.6 * L + 0.4) / L)
    np.testing.assert_allclose(found.mass[0][:, 1], (0.6 * (L - 5) + 0.4) / (L - 5))
    assert found.sink_rate.tolist() == [1.0]
    assert found.first_rate.tolist() == [0.5]
    assert found.common(0) == [("' the'", 4), ("first token", 4)]
    assert "1.00           0.50  ' the' (4 of 4), first token (4 of 4)" in str(found)
    columns = found.to_dict()
    assert [len(values) for values in columns.values()] == [8] * 6
    assert columns["text"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert strongest_keys(stats, threshold=0.99).common(0) == []
    assert strongest_keys(stats).common(0) == [("first token", 4), ("key 5", 4)]
    with pytest.raises(ValueError, match=r"strongest_keys: tokens must name the tokens of 4 sequences"):
        strongest_keys(stats, tokens=tokens[:2])
