"""The study of books: chosen on validation documents, read whole and through windows, and judged by intervals."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from eotattn.experiments.evaluation import sliding_pieces
from eotattn.experiments.figures import language_books
from eotattn.experiments.figures.language_books import Arm, BooksStudy, Option
from eotattn.experiments.interventions import target_losses
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig
from eotattn.experiments.networks.rotations import YarnRotary
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.study import as_table
from eotattn.experiments.tasks.token_text import TokenText

SMOKE = language_books.recipe("smoke")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    draw = np.random.default_rng(0)
    documents = {part: list(draw.integers(256, size=(4, 700))) for part in ("validation", "test")}
    text = TokenText(draw.integers(256, size=3000), documents, 256, 257, {"sha256": "small"})
    out, lines = str(tmp_path_factory.mktemp("books")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenText, "open", lambda corpus: text)
        folder = ResultFolder(out, "smoke", "fig_books")
        perform(language_books.runs, SMOKE, folder, jobs=1, report=lines.append)
    made = [line.startswith("choose-") for line in lines]
    assert made == [True] * 6 + [False] * 4 + [True] * 2 + [False]  # rope, alibi_goat, two seeds; rope_2x
    assert not list(folder.path.rglob("*.pt"))
    return BooksStudy.read(SMOKE, out)


def test_arms_and_options_are_those_of_the_plan():
    recipe = language_books.recipe("gpu")
    assert {arm.attention for arm in recipe.arms} <= ATTENTION_KINDS.keys()
    assert [len(recipe.options(Arm(name))) for name in ("rope", "goat", "kerple", "forgetting")] == [3, 6, 6, 3]
    first = language_books.runs(recipe, {})
    assert [run.chooses for run in first] == [True] * (3 + 3 * 6)  # the other arms wait for the headline's reports
    named = {run.name: run for run in language_books.runs(replace(recipe, headline=recipe.arms), {})}
    longer = named["choose-rope_8x-rate0.001-prior1"].configuration
    assert (longer.decoder.train_length, longer.training.batch_size) == (8192, 16)
    fast = named["choose-goat-rate0.001-prior10"].configuration.training
    assert (fast.learning_rate, fast.prior_learning_rate) == (1e-3, pytest.approx(1e-2))
    tokens = {run.configuration.training.batch_size * run.configuration.decoder.train_length for run in named.values()}
    assert len(tokens) == 1


def test_reports_take_what_validation_chose(study):
    for name in study.arms:
        rows = study.rows("choice_loss", arm=name)
        best = rows.loc[rows.value.idxmin()]
        assert study.option(name) == Option(best.rate, best.prior_factor)
        assert set(study.rows("test_loss", arm=name).rate) == {best.rate}
    assert set(study.rows("test_loss", arm="rope").seed) == {0, 1}
    assert set(study.rows("test_loss", arm="rope_2x").seed) == {0}


def test_every_arm_is_read_whole_and_through_windows(study):
    for name in study.arms:
        for where, longest in (("near", 128), ("far", 256)):
            rows = study.rows("test_loss", arm=name, where=where)
            assert set(rows[rows.reading == "whole"].length) == {n for n in SMOKE.lengths if n <= longest}
            assert {"sliding window", "first and recent"} <= set(rows.reading)
            assert rows[rows.reading == "whole"].groupby(["seed", "length"]).document.nunique().eq(4).all()
    assert {"ntk_rope", "yarn_rope"} <= set(study.rows("test_loss", arm="rope").reading)
    near = study.mean_loss("rope", 32)
    assert near.mean == pytest.approx(math.log(257), rel=0.05)  # untrained, on noise


def test_tables_verdict_and_picture_follow(study, tmp_path):
    assert "undecided" in language_books.verdict(study)
    assert "8 x" not in language_books.verdict(study)
    study.save(str(tmp_path))
    again = BooksStudy.read(SMOKE, str(tmp_path))
    assert language_books.verdict(again) == language_books.verdict(study)
    assert list(study.table_of_arms().index) == ["RoPE", "GOAT, ALiBi slopes", "RoPE, trained on 2x"]
    figure = language_books.draw(study)
    assert len(figure.axes[0].lines) == 2 * 3
    plt.close(figure)


def made_up(saved):
    """Nats that an arm saves over RoPE, one number a seed; two documents."""
    rows = []
    for seed, value in enumerate(saved):
        for arm in ("rope", "alibi_goat"):
            for length, reading, where in (
                (32, "whole", "near"),
                (256, "whole", "far"),
                (256, "sliding window", "far"),
            ):
                place = {"arm": arm, "seed": seed, "length": length, "reading": reading, "where": where}
                for document in (0, 1):
                    loss = 3.0 + document - (value if arm == "alibi_goat" and length == 32 else 0.0)
                    rows.append(place | {"quantity": "test_loss", "document": document, "value": loss})
    return BooksStudy(SMOKE, pandas.DataFrame(rows), {"runs": {}, "data": []})


@pytest.mark.parametrize(
    ("saved", "word"), [((0.099, 0.1), "held"), ((0.01, 0.02), "undecided"), ((0.01, 0.011), "refuted")]
)
def test_a_gain_is_asked_for(saved, word):
    text = language_books.verdict(made_up(saved))
    assert f"GOAT, ALiBi slopes predicts better than RoPE at 32 tokens, by at least 0.05 nats: {word}." in text
    assert "RoPE read through a sliding window at 256 tokens: undecided.** Nats a token saved: +0.0000" in text


def test_choices_wait_for_all_options():
    assert language_books.best_option(SMOKE, as_table({}), Arm("rope")) is None


# Readings -----------------------------------------------------------------------------------------------------------


def test_a_sliding_window_scores_every_target_once():
    torch.manual_seed(0)
    network = Decoder(DecoderConfig("rope", 11, num_layers=1, embed_dim=8, num_heads=2, train_length=8)).eval()
    windows = torch.randint(11, (3, 25))
    pieces = sliding_pieces(windows, num_targets=8, length=8, stride=4)
    found = target_losses(network, pieces, length=8, num_targets=4, beginning=None).view(3, 2).mean(-1)
    for n in range(3):
        losses = []
        for k in range(8):  # by hand: the pieces end after four and after eight targets
            end = 25 - 8 + (4 if k < 4 else 8)
            piece = windows[n, end - 9 : end]
            with torch.no_grad():
                logits = network(piece[None, :-1])[0].log_softmax(-1)
            losses.append(-float(logits[4 + k % 4, piece[5 + k % 4]]))
        assert float(found[n]) == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_streaming_keeps_the_first_tokens():
    pieces = sliding_pieces(torch.arange(30)[None], num_targets=4, length=10, stride=4, keep_first=3)
    assert pieces.tolist() == [[0, 1, 2, *range(22, 30)]]
    with pytest.raises(ValueError, match="stride must divide num_targets = 4 and be at most 7"):
        sliding_pieces(torch.arange(30)[None], num_targets=4, length=10, stride=3, keep_first=3)
    with pytest.raises(ValueError, match="length must leave 32 <= 29"):
        sliding_pieces(torch.arange(30)[None], num_targets=4, length=30, stride=2)


def test_yarn_is_its_formula():
    """By hand: waves of more than 32 turns in the training length stay, those of less than one stretch."""
    rotary, stretch = YarnRotary(64, train_length=1024), 4.0
    for r in range(32):
        theta = 10_000 ** (-2 * r / 64)
        turns = 1024 * theta / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 31))
        expected = (1 - kept) * theta / stretch + kept * theta
        assert float(rotary.frequencies(stretch)[r]) == pytest.approx(expected, rel=1e-12)
    content = torch.randn(1, 2, 8, 4)
    short, whole = (YarnRotary(4, train_length=n)(content).norm(dim=-1) for n in (2, 8))
    torch.testing.assert_close(short, whole * (0.1 * math.log(4) + 1))  # scores sharpen, norms else stay
    plain = Decoder(DecoderConfig("rope", 11, num_layers=1, embed_dim=8, num_heads=2, train_length=8)).eval()
    tokens = torch.randint(11, (1, 12))
    with torch.no_grad():
        assert torch.allclose(plain(tokens[:, :8]), plain.read_as("yarn_rope")(tokens[:, :8]), atol=1e-5)
        assert not torch.allclose(plain(tokens), plain.read_as("yarn_rope")(tokens), atol=1e-3)


@pytest.mark.parametrize("attention", ["t5", "kerple"])
def test_other_relative_biases_learn(attention):
    torch.manual_seed(0)
    network = Decoder(DecoderConfig(attention, 11, num_layers=1, embed_dim=8, num_heads=2, train_length=8))
    network(torch.randint(11, (2, 8))).square().sum().backward()
    gradients = [p.grad for p in network.blocks[0].attention.prior.parameters()]
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in gradients)


def test_a_decoder_that_is_too_short_for_the_documents_fails_before_training(tmp_path, monkeypatch):
    text = TokenText(np.zeros(200), {"test": [np.zeros(100)], "validation": [np.zeros(300)]}, 256, 257, {})
    monkeypatch.setattr(TokenText, "open", lambda corpus: text)
    (run, *_) = language_books.runs(replace(SMOKE, headline=SMOKE.headline[:1]), {})
    with pytest.raises(ValueError, match="fit into a document of the test part, of 100 tokens at most; got 256"):
        run.measure(run.configuration, tmp_path / "none.pt")
