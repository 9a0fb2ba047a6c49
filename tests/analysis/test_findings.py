"""What an analysis says, against attention whose sinks, roles and priors are known by construction."""

import numpy as np
import pytest
import torch

from eotattn.analysis import analyze, findings
from eotattn.analysis.analysis_report import summarize
from eotattn.analysis.figures import figures
from eotattn.analysis.findings import details
from eotattn.analysis.head_kinds import head_kinds
from eotattn.analysis.page import page
from eotattn.analysis.summary import TextFindings
from eotattn.attention.statistics.score_rows import WeightRows
from eotattn.diagnostics import TokenStatistics, TopKeys
from eotattn.diagnostics.strongest_keys import uniform_share
from eotattn.integrations import map_statistics

LENGTH = 48


def causal(scores):
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.double().masked_fill(hidden, -torch.inf).softmax(-1)


def resting_on(key, share, length=LENGTH):
    """Causal attention that gives ``share`` to one key, once it is there, and the rest evenly."""
    even = causal(torch.zeros(length, length))
    rest = torch.eye(length, dtype=torch.float64)[key].expand(length, length)
    mixed = share * rest + (1 - share) * even
    return torch.where((torch.arange(length) >= key)[:, None], mixed, even)


def previous(share, length=LENGTH):
    mixed = share * torch.eye(length, dtype=torch.float64).roll(-1, 1) + (1 - share) * causal(
        torch.zeros(length, length)
    )
    mixed[0] = torch.eye(length)[0]
    return mixed


def text_of(maps, tokens, **kinds):
    ids = torch.tensor([[sorted(set(tokens)).index(token) for token in tokens]])
    sources = {name: WeightRows(weights[None]) for name, weights in maps.items()}
    return TextFindings(
        map_statistics(maps, is_causal=True),
        token_scores={name: TokenStatistics.of(source, ids) for name, source in sources.items()},
        top_keys={name: TopKeys.of(source) for name, source in sources.items()},
        tokens=(tuple(tokens),),
        **kinds,
    )


def known_texts(count, length=LENGTH):
    """One layer: a sink on the first token, one on 'the' at 5, previous token, induction, uniform."""
    tokens = ["<s>", *"abcd", "the", *(f"w{i % 20}" for i in range(length - 6))]
    found = []
    for text in range(count):
        jitter = 0.02 * text
        induction = causal(torch.zeros(length, length))
        for i in range(26, length):  # token i last stood at i - 20
            induction[i] = 0.3 * induction[i] + 0.7 * torch.eye(length, dtype=torch.float64)[i - 19]
        heads = [resting_on(0, 0.8 - jitter), resting_on(5, 0.7 - jitter), previous(0.9 - jitter), induction]
        maps = {"first": torch.stack([*heads, causal(torch.zeros(length, length))])}
        found.append(text_of(maps, tokens))
    return summarize(found, num_given=count)


def test_kinds_of_heads_are_those_that_were_made():
    (kinds,) = head_kinds(known_texts(3))
    without_priors = [tuple(kind for kind in words if kind != "position alone") for words in kinds]
    assert without_priors == [
        ("sink on the first token",),
        ("sink on another token",),
        ("previous token",),
        ("induction",),
        (),
    ]


def test_sinks_are_said_wherever_they_are():
    analysis = known_texts(3)
    sinks, roles, _ = findings(analysis)
    assert sinks.startswith("2 of 5 heads put more than 30% of attention on one token in most texts (2 with the whole")
    assert "the first token ('<s>' in the first text) in 1, in layer 0" in sinks
    assert "another one in 1, in layer 0, first of all 'the' in layer 0 (3 of 3 heads and texts)" in sinks
    assert "1 attends mostly to the previous token, most of all" in roles
    assert "layer 0 head 2" in roles
    assert "1 continues repeats (induction)" in roles
    assert "none looks up earlier copies of the token" in roles
    assert "(one text, so without intervals)" in findings(known_texts(1))[0]


def test_intervals_are_those_of_the_table():
    analysis = known_texts(3)
    name = "previous-token score"
    low, high = (side[name][0, 2] for side in (analysis.heads.low, analysis.heads.high))
    assert f"95% interval {low:.0%} to {high:.0%}" in findings(analysis)[1]
    assert low < high


def test_no_sink_is_told_in_texts_too_short_for_one():
    """Uniform causal attention of 5 tokens gives the first one (1 + 1/2 + ... + 1/5) / 5 = 46%."""
    weights = causal(torch.zeros(2, 5, 5))
    analysis = analyze(attention=weights)
    wanted = "These texts are too short to tell a sink: uniform attention would put up to 46% on their first token."
    assert findings(analysis)[0] == wanted
    assert head_kinds(analysis) == [[(), ()]]
    assert "too short" not in findings(analyze(attention=resting_on(0, 0.8)[None]))[0]


@pytest.mark.parametrize("pattern", ["causal", "full", "window"])
def test_uniform_shares_are_those_of_uniform_attention(pattern):
    length = 9
    everything = torch.ones(length, length, dtype=torch.bool)
    seen = {"causal": everything.tril(), "full": everything, "window": everything.tril() & everything.triu(-3)}[pattern]
    even = seen.double() / seen.sum(-1, keepdim=True)
    (stats,) = map_statistics({"a": even[None]}).values()
    assert float(uniform_share(stats)) == pytest.approx(float(even[:, 0].sum() / seen[:, 0].sum()))


def noise(texts, length):
    """Attention that has nothing to do with positions, and differs from text to text."""
    generator = torch.Generator().manual_seed(0)
    tokens = [f"w{i}" for i in range(length)]
    scores = 3 * torch.randn(texts, 1, 12, length, length, generator=generator)
    return summarize([text_of({"a": causal(text[0])}, tokens) for text in scores], num_given=texts)


def test_fits_that_fail_are_said_and_never_drawn_as_priors():
    analysis = noise(2, 24)
    report = next(iter(analysis.priors.values()))
    fails = report.interval[:, 0] <= 0
    assert fails.sum() > 6  # two short texts estimate nothing
    np.testing.assert_array_equal(analysis.fails()[0], fails)
    words = findings(analysis)[2]
    counted = f"; in {fails.sum()} it is not surely better than uniform, and is not shown; in the others it explains "
    none = "is not surely better than uniform in any of 12 heads, so none is shown"
    assert (none if fails.all() else counted) in words
    assert "-" not in words
    assert "48 rows for" in words
    drawn = dict(figures(analysis))
    titles = [axes.figure.get_suptitle() for axes in drawn.values()] + [axes.get_title() for axes in drawn.values()]
    assert not any("-" in title.split(": ")[-1] and "%" in title for title in titles)
    shown = {name for name in drawn if name.startswith(("prior_", "key_only_"))}
    assert bool(shown) is not fails.all()
    if not fails.all():
        values = drawn["explained"].images[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(values)[0], fails)
        hatches = [patch for patch in drawn["explained"].patches if patch.get_hatch()]
        assert len(hatches) == fails.sum()


def test_one_text_is_said_to_be_in_sample():
    analysis = noise(1, 24)
    assert analysis.is_in_sample
    assert not analysis.fails().any()
    assert findings(analysis)[2].startswith("Fitted to this one text and judged on it, in sample, ")
    drawn = dict(figures(analysis))
    assert "in sample" in drawn["prior_0"].figure.get_suptitle()
    assert "position alone" not in {kind for row in head_kinds(analysis) for words in row for kind in words}


def test_positions_alone_are_found_where_they_are():
    lags = -(torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().double()
    generator = torch.Generator().manual_seed(0)
    tokens, parts = [f"w{i}" for i in range(LENGTH)], []
    for _ in range(4):
        free = 3 * torch.randn(LENGTH, LENGTH, generator=generator, dtype=torch.float64)
        parts.append(text_of({"a": torch.stack([causal(lags), causal(free)])}, tokens))
    analysis = summarize(parts, num_given=4)
    assert ["position alone" in words for words in head_kinds(analysis)[0]] == [True, False]
    assert "explains more than 80% of the attention of 1 of 2 heads" in findings(analysis)[2]


def test_details_say_how_far_the_norm_jumps():
    analysis = known_texts(2)
    assert not any("norm" in sentence for sentence in details(analysis))
    for block, first in (("0", [10.0, 12.0]), ("1", [500.0, 700.0])):
        analysis.residuals.first_token[block] = first
        analysis.residuals.other_tokens[block] = [5.0, 7.0]
        for kind in ("largest", "median", "largest_at"):
            getattr(analysis.residuals, kind)[block] = [1.0, 1.0]
    (sentence,) = (sentence for sentence in details(analysis) if "norm" in sentence)
    assert "grows most in block 1, from 11 to 600; it is then 100 times the mean norm" in sentence
    assert "(100 to 100 over the texts)" in sentence


def test_tables_become_frames_and_show_themselves():
    pytest.importorskip("pandas")
    analysis = known_texts(2)
    frame = analysis.to_frame()
    assert frame.shape[0] == 5
    assert frame["kinds"].iloc[2].startswith("previous token")
    assert analysis.heads.to_frame()["entropy"].tolist() == pytest.approx(analysis.heads.mean["entropy"][0].tolist())
    strongest = analysis.strongest.to_frame()
    assert strongest[strongest["head"] == 1]["token"].tolist() == ["the", "the"]
    report = next(iter(analysis.priors.values()))
    np.testing.assert_array_equal(report.to_frame()["explained"], report.explained)
    for table in (analysis, analysis.heads, analysis.strongest, report):
        assert table._repr_html_().count("<tr>") == 1 + min(table.to_frame().shape[0], table.shown_rows)
    assert "&lt;s&gt;" in analysis.strongest._repr_html_()
    assert "<s>" not in analysis._repr_html_()


def test_other_viewers_get_tokens_and_tables_of_pairs():
    """Shapes as circuitsvis.attention.attention_patterns and bertviz.head_view take them."""
    analysis = known_texts(2)
    found = analysis.to_circuitsvis("first", text=1)
    assert found["tokens"][5] == "the"
    assert found["attention"].shape == (5, LENGTH, LENGTH)
    np.testing.assert_allclose(found["attention"][1, 40, 5], 0.68 + 0.32 / 41, atol=1e-6)
    assert ((found["attention"] > 0).sum(-1) <= 4).all()
    other = analysis.to_bertviz(text=1)
    np.testing.assert_array_equal(other["attention"][0][0].numpy(), found["attention"])
    assert analysis.to_circuitsvis(0)["tokens"] == other["tokens"]
    with pytest.raises(ValueError, match=r"to_circuitsvis: layer must be among \['first'\]; got 7"):
        analysis.to_circuitsvis(7)
    with pytest.raises(ValueError, match="to_circuitsvis: text must name text from 0 to 1"):
        analysis.to_bertviz(text=2)


def test_the_notebook_shows_the_page():
    analysis = known_texts(1)
    shown = analysis.show(height=300)
    assert shown.html == page(analysis)
    assert "height:300px" in shown._repr_html_()
    assert "MB" in repr(shown)
