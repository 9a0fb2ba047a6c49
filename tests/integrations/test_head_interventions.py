"""Interventions on small models: what is done is what was asked for, and the report's numbers follow from losses."""

import math

import numpy as np
import pytest
import torch
from families import BY_NAME
from scipy import stats

pytest.importorskip("transformers")

from eotattn import RecencyPrior
from eotattn.integrations import AddPrior, AddSink, HideKey, InterventionReport, ReplaceHeads, attach, intervene
from eotattn.integrations.head_fits import fit_heads
from eotattn.integrations.head_interventions import next_token_losses
from eotattn.integrations.intervention_report import Effect, PairedMean

NAMES = ("model.layers.0.self_attn", "model.layers.1.self_attn")


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].build("sdpa", dtype=torch.float64)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 61, (14 + n,), generator=generator) for n in range(6)]


def losses(model, texts):
    with torch.no_grad():
        return np.array([float(next_token_losses(model, ids[None]).mean()) for ids in texts])


@torch.no_grad()
def test_a_hidden_key_is_seen_by_itself_alone(model, texts):
    """Against the model's own attention under a mask of four axes."""
    heads = [(0, 1), (1, 0), (1, 3)]
    report = intervene(model, texts, [HideKey("hidden", heads, position=2)])
    expected = []
    for ids in texts:
        at = torch.arange(len(ids))
        seen = (at[:, None] >= at)[None, None].repeat(1, 4, 1, 1)

        def masked(module, args, kwargs, seen=seen, at=at):
            chosen = [head for layer, head in heads if layer == module.layer_idx]
            mask = seen.clone()
            mask[:, chosen, :, 2] = (at < 2)[None, None] & mask[:, chosen, :, 2]
            return args, {**kwargs, "attention_mask": mask}

        handles = [layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True) for layer in model.model.layers]
        expected.append(losses(model, [ids])[0])
        for handle in handles:
            handle.remove()
    assert np.allclose(report.base, losses(model, texts), atol=1e-12)
    assert np.allclose(report["hidden"].losses, expected, atol=1e-9)
    assert np.abs(report["hidden"].losses - report.base).max() > 1e-3


def test_hiding_the_first_token_leaves_it_to_itself(model, texts):
    report = intervene(model, texts, [HideKey("hidden")])
    assert np.isfinite(report["hidden"].losses).all()
    assert report["hidden"].random is None, "all heads: no others to draw"
    assert report["hidden"].num_heads == 8


def test_replaced_heads_attend_by_the_prior_fitted_to_other_texts(model, texts):
    chosen = [(1, 2), (0, 0)]
    report = intervene(model, texts, [ReplaceHeads("replaced", chosen)], num_splits=2, num_controls=2)
    assert sorted(np.bincount(report.split)) == [3, 3]
    for part in (0, 1):
        fits = fit_heads(model, [ids[None] for n, ids in enumerate(texts) if report.split[n] != part])
        priors = {
            NAMES[layer]: fits.reports[NAMES[layer]].prior() * tuple(float(head == h) for h in range(4))
            for layer, head in chosen
        }
        with attach(model, priors, positional=True):
            # the content of a replaced head has no say: rows of its query projection may be anything
            weights = [model.model.layers[layer].self_attn.q_proj.weight for layer, _ in chosen]
            kept = [weight.detach().clone() for weight in weights]
            with torch.no_grad():
                for weight, (_, head) in zip(weights, chosen, strict=True):
                    weight[8 * head : 8 * head + 8].normal_()
            expected = losses(model, texts)
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)
        here = report.split == part
        assert np.allclose(report["replaced"].losses[here], expected[here], atol=1e-9)
    assert report["replaced"].random is not None
    assert not np.allclose(report["replaced"].random, report["replaced"].losses)


def test_priors_are_added_and_neutral_ones_do_nothing(model, texts):
    def neutral(heads):
        prior = RecencyPrior(heads)
        torch.nn.init.zeros_(prior.strength)
        return prior

    report = intervene(model, texts, [AddPrior("recent", [NAMES[1]], RecencyPrior), AddPrior("neutral", [1], neutral)])
    with attach(model, RecencyPrior, layers=[1]):
        expected = losses(model, texts)
    assert np.allclose(report["recent"].losses, expected, atol=1e-9)
    assert np.allclose(report["neutral"].losses, report.base, atol=1e-9)
    assert model.config._attn_implementation == "sdpa"


def test_a_sink_is_that_of_the_formula(model, texts):
    """Weights times Z / (Z + exp(logit)): against a key of zeros with that bias, added to the model's own softmax."""
    report = intervene(model, texts, [AddSink("sink", [(1, 2)], logit=1.5)])
    layer = model.model.layers[1].self_attn

    def scaled(module, args):
        (joined,) = args  # output of the heads side by side, before the projection
        seen = torch.tril(torch.ones(joined.shape[1], joined.shape[1], dtype=torch.bool))
        z = (scores[0] * layer.scaling).masked_fill(~seen, -torch.inf).logsumexp(-1)[0, 2]
        head = joined.unflatten(-1, (4, -1)).clone()
        head[:, :, 2] *= (z - torch.logaddexp(z, torch.tensor(1.5)))[None, :, None].exp()
        return (head.flatten(-2),)

    scores = []

    def kept(module, args, kwargs):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        query, key = (
            project(hidden).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (module.q_proj, module.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        scores[:] = [query @ key.repeat_interleave(2, 1).mT]

    handles = [
        layer.register_forward_pre_hook(kept, with_kwargs=True),
        layer.o_proj.register_forward_pre_hook(scaled),
    ]
    expected = losses(model, texts)
    for handle in handles:
        handle.remove()
    assert np.allclose(report["sink"].losses, expected, atol=1e-9)
    assert np.abs(report["sink"].losses - report.base).max() > 1e-4


def test_the_standard_study_takes_one_call(model, texts, monkeypatch):
    ranked = fit_heads(model, [ids[None] for ids in texts]).ranked
    monkeypatch.setattr("eotattn.integrations.head_interventions.EXPLAINED", ranked[len(ranked) // 2][0])
    report = intervene(model, texts, num_splits=3, num_controls=1)
    assert len(report.effects) == 3
    explained, least, _ = report.effects
    assert explained.num_heads == least.num_heads > 0
    table = report.to_dict()
    assert set(table["verdict"]) <= {"better", "worse", "undecided"}
    assert table["change"][0] == pytest.approx((explained.losses - report.base).mean())
    again = intervene(model, texts, num_splits=3, num_controls=1)
    assert np.array_equal(again.effects[1].losses, least.losses)


def test_a_study_that_finds_no_such_heads_says_so(model, texts):
    """Few heads of a model with random weights are explained by position; of none of these, above 0.8."""
    report = intervene(model, texts, num_controls=1)
    assert [effect.num_heads for effect in report.effects] == [0, 0, 8]
    assert report.to_dict()["verdict"][:2] == ["no such heads"] * 2
    rows = repr(report).split("\n")[1:4]
    assert [("no such heads" in row, "+0.000" in row) for row in rows[:2]] == [(True, False)] * 2
    assert "no such heads" not in rows[2]


def test_intervals_are_those_of_students_t():
    values = np.random.default_rng(0).normal(0.3, 1.0, 9)
    low, high = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    interval = PairedMean.of(values)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((values.mean(), low, high))
    assert math.isnan(PairedMean.of(values[:1]).low)
    words = ("down", "up")
    verdicts = [PairedMean(m, m - 1, m + 1).verdict(words) for m in (-2.0, 0.5, 2.0, math.nan)]
    assert verdicts == ["down", "undecided", "up", "undecided"]


def test_the_table_is_read_as_it_is():
    base, up = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.6, 3.7])
    effects = (Effect("one", 3, up, up + 1.0), Effect("all", 8, base + 1e-3 * np.array([1, -1, 0.5]), None))
    report = InterventionReport(base, np.array([0, 1, 1]), effects, 4)
    lines = repr(report).split("\n")
    assert lines[1].split() == [
        "one", "3", "2.600", "+0.600", "[+0.352,", "+0.848]", "worse",
        "3.600", "-1.000", "[-1.000,", "-1.000]", "less", "than", "random",
    ]  # fmt: skip
    assert "undecided" in lines[2]
    assert lines[3].startswith("3 texts, loss 2.000 as the model is")
    assert report.by_split(effects[0]) == [(1.0, 1.5), (2.5, pytest.approx(3.15))]
    frame = pytest.importorskip("pandas") and report.to_frame()
    assert list(frame["intervention"]) == ["one", "all"]
    assert list(frame["against_verdict"]) == ["less than random", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "one"}, "intervene: texts must be a list of texts or ids"),
        ({"texts": ["one", "two"]}, "intervene: tokenizer must be given with texts"),
        ({"texts": [torch.ones(3, dtype=torch.int64)]}, "intervene: texts must be at least two"),
        (
            {"texts": [torch.ones(1, dtype=torch.int64)] * 3},
            "intervene: texts[0] must be one text of at least two tokens",
        ),
        ({"texts": [torch.ones(2, 3, dtype=torch.int64)] * 3}, "intervene: texts[0] must be one text"),
        ({"texts": [torch.ones(3)] * 3}, "intervene: texts[0] must be a text or its ids"),
        ({"num_splits": 7}, "intervene: texts must be enough for 7 parts"),
        ({"num_splits": 1}, "intervene: num_splits must be at least 2"),
        ({"num_controls": -1}, "intervene: num_controls must be at least 0"),
        ({"interventions": []}, "intervene: interventions must be some, each with its name"),
        ({"interventions": [HideKey]}, "intervene: interventions must be some, each with its name; got [<class"),
        ({"interventions": [HideKey(0)]}, "intervene: interventions must be some, each with its name; got [HideKey"),
        ({"interventions": [HideKey("a"), HideKey("a")]}, "intervene: interventions must be some, each with its name"),
        (
            {"interventions": [HideKey("a", position=18)]},
            "intervene: position of 'a' must be a key that a later token of a text sees, below 18; got 18",
        ),
        ({"interventions": [HideKey("a", [(2, 0)])]}, "intervene: heads of 'a' must be (layer, head) pairs"),
        ({"interventions": [HideKey("a", [(0, 4)])]}, "intervene: heads of 'a' must be (layer, head) pairs"),
        (
            {"interventions": [HideKey("a", [0, (0, 1)])]},
            "intervene: heads of 'a' must name at least one, and each once",
        ),
    ],
)
def test_bad_input_is_one_clear_line(model, texts, options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        intervene(model, **{"texts": texts} | options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == "sdpa"


def test_interventions_that_cannot_be_are_refused_when_they_are_made():
    with pytest.raises(TypeError, match="AddPrior: make must make a prior of H heads"):
        AddPrior("a")
    with pytest.raises(TypeError, match="AddSink: logit must be a number; got 'x'"):
        AddSink("a", logit="x")
    with pytest.raises(ValueError, match="HideKey: position must be at least 0"):
        HideKey("a", position=-1)
