"""The ablations: runs on both tasks, values laid out right, an answer that follows from the numbers."""

import itertools

import numpy as np
import pandas
import pytest
import torch

from eotattn.experiments.figures import ablations
from eotattn.experiments.figures.ablations import VARIANTS
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.plotting import OKABE_ITO


def study_of(bits, found, scale="laptop"):
    """A study from (bits per byte, accuracy), each name -> one value a length; others are alike and bad."""
    recipe = ablations.recipe(scale)

    def language(variant):
        values = bits.get(variant, [9.0] * len(recipe.lengths))
        lengths = zip(recipe.lengths, values, strict=True)
        return [{"task": "language", "quantity": "bits_per_byte", "length": n, "value": value} for n, value in lengths]

    def retrieval(variant):
        values = found.get(variant, [0.0] * len(recipe.lengths))
        return [
            {"task": task, "quantity": quantity, "length": n, "depth": depth, "value": value}
            for n, value in zip(recipe.lengths, values, strict=True)
            for task in ("passkey", "needle")
            for quantity in ("exact_match", "token_accuracy")
            for depth in recipe.depths
        ]

    rows = []
    for run in ablations.runs(recipe, {}):
        rows_of = language if run.name.startswith("language") else retrieval
        for variant in (run.configuration.decoder.attention, *run.configuration.also_read_as):
            place = {"run": run.name, "seed": run.configuration.seed, "variant": variant}
            rows += [place | row for row in rows_of(variant)]
    return ablations.AblationStudy(recipe, pandas.DataFrame(rows), {"runs": {}, "data": []})


GOOD = {
    "bits": {"rope": [2.0, 3.0, 5.0], "alibi": [2.1, 2.1, 2.1], "goat": [2.0, 2.0, 2.1], "paper_goat": [1.9, 1.9, 2.2]},
    "found": {
        "rope": [1.0, 0.5, 0.1],
        "alibi": [1.0, 1.0, 0.6],
        "goat": [1.0, 1.0, 0.6],
        "paper_goat": [1.0, 1.0, 1.0],
    },
}


def test_every_variant_runs_on_both_tasks_with_the_tasks_own_vocabulary():
    recipe = ablations.recipe("h200")
    named = {run.name: run.configuration for run in ablations.runs(recipe, {})}
    trained = [decoder for decoder in recipe.decoders if decoder.kind.trained_as is None]
    repeated = len(recipe.repeated) * (len(recipe.seeds) - 1)
    assert len(named) == 2 * (len(trained) + repeated)
    assert named["language-goat-seed0"].decoder.vocabulary_size == 256
    assert named["retrieval-goat-seed0"].decoder.vocabulary_size < 64
    assert {decoder.attention for decoder in recipe.decoders} == set(VARIANTS)
    sizes = {(decoder.num_layers, decoder.embed_dim, decoder.num_heads) for decoder in recipe.decoders}
    assert len(sizes) == 1


def test_values_are_laid_out_by_seed_and_length():
    study = study_of(**GOOD)
    assert study.values("alibi", "language").tolist() == [[2.1, 2.1, 2.1]]
    assert study.values("rope", "needle")[0].tolist() == pytest.approx([1.0, 0.5, 0.1])
    assert study.retrieval("alibi")[0].tolist() == pytest.approx([1.0, 1.0, 0.6])


def test_the_answer_is_as_good_as_rope_near_and_as_alibi_far_on_both_tasks():
    assert study_of(**GOOD).answers() == ["goat"]
    question = "at least as good in distribution as RoPE, on language and on retrieval? By means over seeds: `goat`.**"
    assert question in ablations.verdict(study_of(**GOOD))
    for judge, place, worse in (("bits", 0, 2.01), ("bits", 2, 2.11), ("found", 0, 0.99), ("found", 2, 0.59)):
        values = {name: dict(of) for name, of in GOOD.items()}
        values[judge]["goat"] = [worse if k == place else v for k, v in enumerate(values[judge]["goat"])]
        assert study_of(**values).answers() == [], (judge, place)
    assert "none of these variants.**" in ablations.verdict(study_of(**values))


def test_answers_that_retrieve_far_are_named():
    named = "(ALiBi's is no high bar) with: "
    assert f"{named}none." in ablations.verdict(study_of(**GOOD))  # an accuracy of 0.6, as ALiBi's
    values = {name: dict(of) for name, of in GOOD.items()}
    values["found"]["goat"] = [1.0, 1.0, 0.995]
    assert f"{named}`goat`." in ablations.verdict(study_of(**values))
    values["found"]["goat"] = [1.0, 1.0, 0.985]
    assert f"{named}none." in ablations.verdict(study_of(**values))


def test_a_standing_needs_seeds_and_all_four_margins():
    assert study_of(**GOOD).standing("goat") == "undecided"  # one seed
    bits = GOOD["bits"] | {"goat": [1.9, 2.0, 2.0]}
    assert study_of(bits, GOOD["found"], "h200").standing("goat") == "held"
    assert study_of(bits | {"goat": [1.9, 2.0, 2.2]}, GOOD["found"], "h200").standing("goat") == "refuted"
    found = GOOD["found"] | {"goat": [1.0, 1.0, 0.5]}
    assert study_of(bits, found, "h200").standing("goat") == "refuted"
    margins = study_of(bits, GOOD["found"], "h200").margins("goat")
    assert margins["bits near"].mean == pytest.approx(0.1)
    assert margins["found far"].mean == pytest.approx(0.01)  # what does not count


def test_the_verdict_says_who_ran_with_one_seed():
    assert "- 1 seed at scale `laptop`" in ablations.verdict(study_of(**GOOD))
    last = ablations.verdict(study_of(**GOOD, scale="h200")).splitlines()[-1]
    assert last.startswith("- 3 seeds, one of `none`, `rotary_goat`,")
    assert "`goat`" not in last
    assert "`ntk_rope`" not in last  # read from RoPE's runs


@pytest.mark.parametrize("task", ["language", "retrieval"])
def test_log_priors_of_fast_kinds_train_at_ten_times_the_rate(task):
    recipe = ablations.recipe("h200")
    named = {run.name: run.configuration.training for run in ablations.runs(recipe, {})}
    for name in ("fast_goat", "fast_paper_goat", "goat", "paper_goat", "rope"):
        training, common = named[f"{task}-{name}-seed0"], getattr(recipe, task)
        assert training.learning_rate == common.learning_rate
        factor = 10 if name.startswith("fast_") else 1
        assert training.prior_learning_rate == pytest.approx(factor * common.learning_rate)


@pytest.mark.parametrize(("fast", "slow"), [("fast_goat", "goat"), ("fast_paper_goat", "paper_goat")])
def test_fast_kinds_differ_in_the_rate_alone(fast, slow):
    networks = []
    for name in (fast, slow):
        torch.manual_seed(0)
        networks.append(Decoder(DecoderConfig(name, 8, num_layers=1, embed_dim=16, num_heads=4, train_length=32)))
    left, right = (dict(network.named_parameters()) for network in networks)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_tables_and_figure_are_drawn_from_records_alone(tmp_path):
    study = study_of(**GOOD)
    goat = study.table_of_judges().loc["goat"]
    assert (goat["language 1x"], goat["language 16x"], goat["needle 16x worst seed"]) == (2.0, 2.1, 0.6)
    assert set(study.table.variant) == set(study.variants)
    figure = ablations.draw(study)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "(a) language, training length",
        "(b) language, 16x",
        "(c) retrieval, training length",
        "(d) retrieval, 16x",
    ]
    for axes in figure.axes:
        assert len(axes.get_yticks()) == len(study.variants)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    figure.canvas.draw()
    labels = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert not any(left.overlaps(right) for left, right in itertools.pairwise(labels))


def test_the_figure_has_a_panel_a_number_and_its_bar_in_each():
    values = {name: dict(of) for name, of in GOOD.items()}
    values["found"]["rope"] = [0.9, 0.5, 0.1]  # so that each of the four numbers has another bar
    figure = ablations.draw(study_of(**values))
    rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert rows[:4] == [VARIANTS[name] for name in ("paper_goat", "rope", "goat", "alibi")]
    shown = {"rope": 1, "goat": 2, "alibi": 3}
    expected = {"rope": (2.0, 5.0, 0.9, 0.1), "goat": (2.0, 2.1, 1.0, 0.6), "alibi": (2.1, 2.1, 1.0, 0.6)}
    for k, axes in enumerate(figure.axes):
        (bar,) = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert bar == pytest.approx(expected["alibi" if k % 2 else "rope"][k])
        assert axes.get_xscale() == ("log" if k < 2 else "linear")
        marks = {line.get_ydata()[0]: line for line in axes.lines if line.get_marker() == "o"}
        for name, row in shown.items():
            assert marks[row].get_xdata()[0] == pytest.approx(expected[name][k])
        assert marks[shown["goat"]].get_color() == OKABE_ITO["vermillion"]
        assert marks[shown["rope"]].get_color() == OKABE_ITO["blue"]


@pytest.mark.parametrize("name", ["language-rope-seed0", "retrieval-goat-seed0"])
def test_runs_train_and_measure(name, tmp_path):
    recipe = ablations.recipe("smoke")
    (run,) = [run for run in ablations.runs(recipe, {}) if run.name == name]
    found = run.measure(run.configuration, tmp_path / "run.pt")
    measured = [row for row in found.rows if row["quantity"] in ablations.JUDGES.values()]
    assert {row["length"] for row in measured} == set(recipe.lengths)
    assert all(np.isfinite(row["value"]) for row in found.rows)
    assert found.summary.startswith(("bits per byte", "accuracy"))
