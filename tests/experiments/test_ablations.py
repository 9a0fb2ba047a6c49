"""The ablations: runs on both tasks, values laid out right, an answer that follows from the numbers."""

import numpy as np
import pytest

from eotattn.experiments import figures, recipes
from eotattn.experiments.recipes.ablations import VARIANTS
from eotattn.experiments.records import Record
from eotattn.experiments.studies import ablations


def record(name, seed, variants, rows_of):
    where = {"date": "2026-01-01", "device": "cpu", "wall_seconds": 1.0, "commit": "0", "packages": {}}
    rows = [row | {"variant": variant} for variant in variants for row in rows_of(variant)]
    return Record(name, {}, seed, rows, {}, "", "cpu", 1.0, where)


def study_of(bits, found, scale="laptop"):
    """A study from (bits per byte, accuracy), each name -> one value a length; others are alike and bad."""
    recipe = recipes.ablations(scale)

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

    records = {}
    for run in ablations.runs(recipe, {}):
        variants = (run.configuration.decoder.attention, *run.configuration.also_read_as)
        rows_of = language if run.name.startswith("language") else retrieval
        records[run.name] = record(run.name, run.configuration.seed, variants, rows_of)
    return ablations.AblationStudy(recipe, records)


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
    recipe = recipes.ablations("h200")
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
    assert (
        "at least as good in distribution as RoPE, on language and on retrieval? `goat`.**"
        in study_of(**GOOD).verdict()
    )
    for judge, place, worse in (("bits", 0, 2.01), ("bits", 2, 2.11), ("found", 0, 0.99), ("found", 2, 0.59)):
        values = {name: dict(of) for name, of in GOOD.items()}
        values[judge]["goat"] = [worse if k == place else v for k, v in enumerate(values[judge]["goat"])]
        assert study_of(**values).answers() == [], (judge, place)
    assert "None of these variants.**" in study_of(**values).verdict()


def test_answers_that_retrieve_far_are_named():
    assert study_of(**GOOD).keepers() == []  # an accuracy of 0.6, as ALiBi's
    assert "(ALiBi's is no high bar) with: none." in study_of(**GOOD).verdict()
    values = {name: dict(of) for name, of in GOOD.items()}
    values["found"]["goat"] = [1.0, 1.0, 0.995]
    assert study_of(**values).keepers() == ["goat"]


def test_tables_and_figure_are_drawn_from_records_alone(tmp_path):
    study = study_of(**GOOD)
    (goat,) = [row for row in study.table() if row["variant"] == "goat"]
    assert (goat["language 1x"], goat["language 16x"], goat["needle 16x worst seed"]) == (2.0, 2.1, 0.6)
    assert {row["variant"] for row in study.rows()} == set(study.variants)
    figure = figures.draw_ablations(study)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "(a) language, training length",
        "(b) language, 16x",
        "(c) retrieval, training length",
        "(d) retrieval, 16x",
    ]
    for axes in figure.axes:
        assert len(axes.get_yticks()) == len(study.variants)
    figure.savefig(tmp_path / "figure.png", dpi=40)


@pytest.mark.parametrize("name", ["language-rope-seed0", "retrieval-goat-seed0"])
def test_runs_train_and_measure(name, tmp_path):
    recipe = recipes.ablations("smoke")
    (run,) = [run for run in ablations.runs(recipe, {}) if run.name == name]
    found = run.measure(run.configuration, tmp_path / "run.pt")
    measured = [row for row in found.rows if row["quantity"] != "training_loss"]
    assert {row["length"] for row in measured} == set(recipe.lengths)
    assert all(np.isfinite(row["value"]) for row in found.rows)
    assert found.summary.startswith(("bits per byte", "accuracy"))
