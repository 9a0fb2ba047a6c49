"""Figures 1 and 2 at small scale: what their studies measure, what they store, and that they can say no."""

import csv
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from eotattn.experiments import recipes
from eotattn.experiments.figures import draw_copy_mixture, draw_language
from eotattn.experiments.networks import Decoder
from eotattn.experiments.prior_parts import PriorParts
from eotattn.experiments.recipes.language import RateSweep
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.studies import copy_mixture, language
from eotattn.experiments.studies.copy_mixture import CopyMixtureStudy
from eotattn.experiments.studies.language_claims import language_verdict
from eotattn.experiments.studies.language_study import LanguageStudy, mean_formation
from eotattn.experiments.tasks import CopyMixture


def parts_of(key_only, relative):
    """Parts of one head."""
    position = torch.arange(len(key_only))
    lag = position[:, None] - position
    total = (relative[lag.clamp(min=0)] + key_only).masked_fill(lag < 0, -math.inf)
    return PriorParts(key_only[None], relative[None], total[None])


def spike(at, height, length=9):
    return height * torch.nn.functional.one_hot(torch.tensor(at), length).double()


def test_ideal_prior_gets_full_marks():
    ideal = CopyMixture(length=9).ideal_log_prior(floor=1e-6)
    height = math.log((0.5 + 1e-6) / 1e-6)
    found = copy_mixture.measure_head(parts_of(spike(0, height), spike(0, height)), ideal, 0)
    assert found.claim_held
    assert found.correlation == pytest.approx(1.0)
    assert found.total_variation == pytest.approx(0.0, abs=1e-9)
    assert found.copied_mass == pytest.approx(1.0, abs=1e-4)
    assert found.negative_share == 1.0
    assert found.deepest_trough < -1


def test_uniform_prior_fails_the_claim():
    ideal = CopyMixture(length=9).ideal_log_prior()
    found = copy_mixture.measure_head(parts_of(spike(0, 0.0), spike(0, 0.0)), ideal, 0)
    assert not found.claim_held
    assert math.isnan(found.correlation)
    assert found.total_variation == pytest.approx(found.uniform_total_variation)


def test_prior_that_looks_at_the_wrong_key_fails_the_claim():
    ideal = CopyMixture(length=9).ideal_log_prior()
    found = copy_mixture.measure_head(parts_of(spike(4, 3.0), spike(2, 1.0)), ideal, 0)
    assert (found.top_key, found.top_lag, found.claim_held) == (4, 3, False)
    assert found.correlation < 0


def table(folder):
    with (folder.path / f"{folder.figure}.csv").open() as file:
        return list(csv.DictReader(file))


def test_copy_mixture_study_stores_what_it_draws(tmp_path):
    recipe = recipes.copy_mixture("smoke")
    training = replace(recipe.training, steps=12, warmup_steps=2, evaluate_every=6)
    recipe = replace(recipe, training=training, seeds=(0, 1))
    folder = ResultFolder(str(tmp_path), "smoke", "fig1_copy_mixture")
    study = CopyMixtureStudy(recipe, perform(copy_mixture.runs, recipe, folder, jobs=1, report=lambda line: None))
    study.save(folder)
    figure = draw_copy_mixture(study)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sorted(title[:3] for title in titles if title) == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    plt.close(figure)
    rows = table(folder)
    assert {row["panel"] for row in rows} == {"a", "b", "c", "d", "e", "finding", "training"}
    for reader in study.readers:
        drawn = [float(row["value"]) for row in rows if (row["panel"], row["seed"]) == ("a", str(reader.record.seed))]
        assert drawn == pytest.approx(reader.parts.key_only[0].tolist(), rel=1e-5)
        last = [row["value"] for row in reader.record.rows_of("correlation")][-1]
        assert last == pytest.approx(reader.heads[0].correlation)
        assert reader.record.value("best_loss") < reader.record.value("loss") < math.log(16)
    verdict = study.verdict()
    assert ("recovered: held" in verdict) == all(reader.heads[0].claim_held for reader in study.readers)
    assert ("in every seed: held" in verdict) == all(reader.heads[0].correlation > 0.95 for reader in study.readers)
    assert (folder.path / "fig1_copy_mixture.json").exists()


# Language -----------------------------------------------------------------------------------------------------------


def small_recipe(folder):
    """Four steps on small files of counted bytes."""
    for k in range(90):
        (folder / f"text_{k}.txt").write_bytes(bytes((k * j) % 251 for j in range(1200)))
    recipe = recipes.language("smoke")
    training = replace(recipe.training, steps=4, warmup_steps=1, log_every=2, evaluate_every=2)
    sweep = RateSweep((1e-3, 1e-2), replace(recipe.sweep.training, steps=2), windows=2)
    recipe = replace(recipe, corpus=str(folder), contrasts=recipe.contrasts[:1])
    return replace(recipe, training=training, sweep=sweep, curve_windows=2, sink_windows=2)


@pytest.fixture(scope="module")
def small_language(tmp_path_factory):
    folder = ResultFolder(str(tmp_path_factory.mktemp("out")), "smoke", "fig2_language")
    recipe = small_recipe(tmp_path_factory.mktemp("texts"))
    lines = []
    records = perform(language.runs, recipe, folder, jobs=1, report=lines.append)
    assert len(lines) == 12 + 12 + 1  # sweeps, variants by seeds, one contrast
    return LanguageStudy(recipe, records)


def test_language_study_measures_every_variant_seed_and_length(small_language):
    rows = small_language.rows()
    learned = {"paper_goat", "goat", "fast_goat", "local_rotary_goat"}
    for variant in ("rope", "alibi", *learned, "interpolated_rope", "ntk_rope"):
        found = [row for row in rows if (row["panel"], row["quantity"]) == ("a", "bits_per_byte")]
        found = [row for row in found if row["variant"] == variant]
        assert sorted((row["seed"], row["length"]) for row in found) == [
            (s, 32 * f) for s in (0, 1) for f in (1, 2, 4, 8, 16)
        ]
        far = [row["value"] for row in found if row["length"] == 512]
        assert small_language.interval(variant, 512).mean == pytest.approx(sum(far) / 2)
    assert {row["variant"] for row in rows if row["panel"] == "c"} == learned | {"fast_paper_goat"}
    assert {row["variant"] for row in rows if row["panel"] == "sweep"} == {"rope", "alibi"} | learned
    assert len({frozenset(row) for row in rows}) == 1  # one set of columns
    assert len(small_language.curve_table()) == 9 * 5


def test_another_reading_is_the_same_network_and_differs_beyond_the_training_length(small_language):
    near, far = 32, 512
    for kind in ("interpolated_rope", "ntk_rope"):
        assert small_language.bits(kind, near) == small_language.bits("rope", near)
        assert small_language.bits(kind, far) != small_language.bits("rope", far)


def test_every_variant_trains_at_the_rate_that_validation_files_chose(small_language):
    swept = small_language.sweep_table()
    for decoder in small_language.decoders:
        judged = "rope" if decoder.variant == "fast_paper_goat" else decoder.variant
        bits = {row["learning_rate"]: row["bits_per_byte"] for row in swept if row["variant"] == judged}
        training = decoder.record.configuration["training"]
        factor = 10 if decoder.variant.startswith("fast_") else 1
        assert training["learning_rate"] == min(bits, key=bits.get)
        assert training["prior_learning_rate"] == factor * training["learning_rate"]
    assert small_language.movable == "fast_paper_goat"
    fast, slow = (small_language.of(name)[0] for name in ("fast_paper_goat", "rope"))
    assert fast.reach == pytest.approx(10 * slow.reach)  # at the same rate of the content
    assert set(small_language.headline) == {"paper_goat", "goat", "fast_goat", "local_rotary_goat"}
    assert sum(row["chosen"] for row in swept) == 6


def test_unfinished_sweeps_leave_their_variant_out(small_language):
    recipe, records = small_language.recipe, dict(small_language.records)
    del records["rate-alibi-0.01"]
    named = [run.name for run in language.runs(recipe, records)]
    assert "rate-alibi-0.01" in named
    assert "alibi-seed0" not in named
    assert "rope-seed0" in named


def test_sinks_are_watched_from_the_start(small_language):
    for decoder in small_language.decoders:
        steps, mass = decoder.formation
        assert steps.tolist() == [0, 2, 4]
        assert mass.shape == (3, 1, 4)
        assert ((mass > 0) & (mass < 1)).all()
    steps, means = mean_formation(small_language.of("alibi"))
    assert means.shape == (2, 3)
    assert means[1, 2] == pytest.approx(small_language.of("alibi")[1].formation[1][2].mean())


def test_variants_of_one_seed_share_their_start():
    results = {}
    for config in recipes.language("smoke").variants:
        torch.manual_seed(0)
        results[config.attention] = Decoder(config).state_dict()
    for name in ("embedding.weight", "readout.weight", "blocks.0.attention.in_proj.weight"):
        assert all(torch.equal(results["rope"][name], found[name]) for found in results.values())


def test_language_study_saves_and_draws(small_language, tmp_path):
    folder = ResultFolder(str(tmp_path), "smoke", "fig2_language")
    small_language.save(folder)
    figure = draw_language(small_language)
    assert [axes.get_title(loc="left")[:3] for axes in figure.axes] == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    means = [small_language.interval("ntk_rope", length).mean for length in small_language.recipe.lengths]
    assert drawn["RoPE, NTK"].get_ydata().tolist() == pytest.approx(means)
    formed = {line.get_label(): line for line in figure.axes[4].get_lines()}
    assert formed["ALiBi"].get_ydata() == pytest.approx(mean_formation(small_language.of("alibi"))[1].mean(0))
    plt.close(figure)
    assert len(table(folder)) == len(small_language.rows())
    assert small_language.uniform_mass == pytest.approx(sum(1 / n for n in range(17, 33)) / 16)


def test_runs_of_two_corpora_are_not_mixed(small_language):
    records = dict(small_language.records)
    other = records["rope-seed0"]
    origin = other.provenance | {"data": other.provenance["data"] | {"sha256": "another"}}
    records["rope-seed0"] = replace(other, provenance=origin)
    with pytest.raises(ValueError, match="records must come from one corpus"):
        LanguageStudy(small_language.recipe, records)


# Claims: records with invented numbers ------------------------------------------------------------------------------


def invented(study, bits):
    """The study with other bits per byte: name -> (near, far) of both seeds, the lengths between interpolated."""
    records = {}
    for name, record in study.records.items():
        rows = []
        for row in record.rows:
            if row["quantity"] == "bits_per_byte" and row["panel"] == "a" and row["variant"] in bits:
                near, far = (values[record.seed] for values in bits[row["variant"]])
                share = math.log2(row["length"] / 32) / 4
                row = row | {"value": near + share * (far - near)}
            rows.append(row)
        records[name] = replace(record, rows=rows)
    return LanguageStudy(study.recipe, records)


GOOD = {
    "rope": ((2.0, 2.001), (5.0, 5.1)),
    "alibi": ((2.1, 2.101), (2.1, 2.1)),
    "paper_goat": ((1.95, 1.951), (1.94, 1.945)),
    "goat": ((1.95, 1.951), (1.94, 1.945)),
}


def line_of(study, claim):
    (line,) = [line for line in language_verdict(study).splitlines() if f"**{claim}" in line]
    return line


CLAIMS = {
    "gain": "paper_goat: at least 1% below rope",
    "stable": "paper_goat: at 16x no worse than at 1x",
    "far": "paper_goat: at 16x no worse than ALiBi",
    "diverges": "rope diverges",
}


@pytest.mark.parametrize("claim", CLAIMS.values())
def test_claims_hold_where_the_numbers_say_so(small_language, claim):
    assert ": held.**" in line_of(invented(small_language, GOOD), claim)


@pytest.mark.parametrize(
    ("claim", "bad"),
    [
        ("gain", ((1.99, 1.991), (1.94, 1.945))),  # half a percent
        ("gain", ((1.90, 2.00), (1.94, 1.945))),  # intervals overlap
        ("stable", ((1.95, 1.951), (1.96, 1.97))),
        ("far", ((1.95, 1.951), (2.11, 2.12))),
    ],
)
def test_claims_fail_where_the_numbers_say_so(small_language, claim, bad):
    study = invented(small_language, GOOD | {"paper_goat": bad})
    assert ": did NOT hold.**" in line_of(study, CLAIMS[claim])


def test_savings_are_paired_by_seed(small_language):
    study = invented(small_language, GOOD)
    saved = study.saving("paper_goat", over="rope", length=32)
    assert (saved.mean, saved.half_width) == (pytest.approx(0.05), pytest.approx(0.0, abs=1e-9))


def test_four_steps_teach_nothing_and_the_verdict_says_so(small_language):
    assert "did NOT hold" in line_of(small_language, CLAIMS["diverges"])
    assert "2 seeds" in language_verdict(small_language)


def test_a_sink_that_grows_with_the_signal_fails_its_claim(small_language):
    records = dict(small_language.records)
    for falls, says in ((True, "held"), (False, "did NOT hold")):
        for seed in (0, 1):
            record = records[f"paper_goat-seed{seed}"]
            mass = np.linspace(0.1, 0.9, len(record.arrays["sinks.counts"]))
            arrays = dict(record.arrays) | {"sinks.mean_sink_mass": mass[::-1] if falls else mass}
            records[f"paper_goat-seed{seed}"] = replace(record, arrays=arrays)
        line = line_of(LanguageStudy(small_language.recipe, records), "paper_goat: sink mass falls")
        assert f": {says}.**" in line
