"""Figures 1 and 2 at small scale: what their studies measure, what they store, and that they can say no."""

import csv
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from eotattn.experiments.figures import fig1_copy_mixture, fig2_claims, fig2_language
from eotattn.experiments.figures.fig2_claims import LanguageStudy
from eotattn.experiments.figures.fig2_language import RateSweep
from eotattn.experiments.networks import Decoder
from eotattn.experiments.prior_parts import PriorParts
from eotattn.experiments.records import Record
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.tasks import CopyMixture


def parts_of(key_only, relative):
    """Parts of one head."""
    position = torch.arange(len(key_only))
    lag = position[:, None] - position
    total = (relative[lag.clamp(min=0)] + key_only).masked_fill(lag < 0, -math.inf)
    return PriorParts(key_only[None], relative[None], total[None])


def spike(at, height, length=9):
    return height * torch.nn.functional.one_hot(torch.tensor(at), length).double()


def table(folder):
    with (folder.path / f"{folder.figure}.csv").open() as file:
        return list(csv.DictReader(file))


def test_ideal_prior_gets_full_marks():
    ideal = CopyMixture(length=9).ideal_log_prior(floor=1e-6)
    height = math.log((0.5 + 1e-6) / 1e-6)
    found = fig1_copy_mixture.measure_head(parts_of(spike(0, height), spike(0, height)), ideal, 0)
    assert (found["top_key"], found["top_lag"]) == (0, 1)
    assert found["correlation"] == pytest.approx(1.0)
    assert found["total_variation"] == pytest.approx(0.0, abs=1e-9)
    assert found["copied_mass"] == pytest.approx(1.0, abs=1e-4)
    assert found["negative_share"] == 1.0
    assert found["deepest_trough"] < -1


def test_uniform_prior_shows_nothing():
    ideal = CopyMixture(length=9).ideal_log_prior()
    found = fig1_copy_mixture.measure_head(parts_of(spike(0, 0.0), spike(0, 0.0)), ideal, 0)
    assert found["key_gap"] == found["deepest_trough"] == 0.0
    assert math.isnan(found["correlation"])
    assert found["total_variation"] == pytest.approx(found["uniform_total_variation"])


@pytest.fixture(scope="module")
def small_mixture(tmp_path_factory):
    recipe = fig1_copy_mixture.recipe("smoke")
    training = replace(recipe.training, steps=12, warmup_steps=2, evaluate_every=6)
    recipe = replace(recipe, training=training, seeds=(0, 1))
    out = str(tmp_path_factory.mktemp("mixture"))
    folder = ResultFolder(out, "smoke", "fig1_copy_mixture")
    perform(fig1_copy_mixture.runs, recipe, folder, jobs=1, report=lambda line: None)
    return fig1_copy_mixture.CopyMixtureStudy.read(recipe, out)


def changed(study, quantity, value):
    """The study with another number in place of a finding of all heads."""
    table = study.table.copy()
    table.loc[(table.quantity == quantity) & (table.panel == "finding"), "value"] = value
    return replace(study, table=table)


def test_looking_at_the_wrong_key_or_lag_refutes_the_claim(small_mixture):
    found = small_mixture
    for quantity, right, gap in (("top_key", 0.0, "key_gap"), ("top_lag", 1.0, "lag_gap")):
        what = "first token" if quantity == "top_key" else "lag one"
        for value, word in ((right, "held"), (right + 3, "refuted")):
            study = changed(changed(found, quantity, value), gap, 2.0)
            assert f"highest at {'the ' if quantity == 'top_key' else ''}{what}: {word}.**" in (
                fig1_copy_mixture.verdict(study)
            )


def test_copy_mixture_study_stores_what_it_draws(small_mixture, tmp_path):
    study = small_mixture
    folder = study.save(str(tmp_path))
    figure = fig1_copy_mixture.draw(study)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sorted(title[:3] for title in titles if title) == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    plt.close(figure)
    rows = table(folder)
    assert {row["panel"] for row in rows} == {"a", "b", "c", "d", "e", "finding", "training"}
    curves = study.rows("correlation", panel="e")
    for seed in (0, 1):
        last = curves[curves.seed == seed].value.iloc[-1]
        assert last == pytest.approx(study.findings().correlation[seed, 0])
        assert study.of_seeds("best_loss")[seed] < study.of_seeds("loss")[seed] < math.log(16)
    assert (folder.path / "fig1_copy_mixture.json").exists()


# Language -----------------------------------------------------------------------------------------------------------


def small_recipe(folder):
    """Four steps on small files of counted bytes."""
    for k in range(90):
        (folder / f"text_{k}.txt").write_bytes(bytes((k * j) % 251 for j in range(1200)))
    recipe = fig2_language.recipe("smoke")
    training = replace(recipe.training, steps=4, warmup_steps=1, log_every=2, evaluate_every=2)
    sweep = RateSweep((1e-3, 1e-2), replace(recipe.sweep.training, steps=2), windows=2)
    recipe = replace(recipe, corpus=str(folder), contrasts=recipe.contrasts[:1])
    return replace(recipe, training=training, sweep=sweep, curve_windows=2, sink_windows=2)


@pytest.fixture(scope="module")
def small_language(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("out"))
    folder = ResultFolder(out, "smoke", "fig2_language")
    recipe = small_recipe(tmp_path_factory.mktemp("texts"))
    lines = []
    perform(fig2_language.runs, recipe, folder, jobs=1, report=lines.append)
    assert len(lines) == 12 + 12 + 1  # sweeps, variants by seeds, one contrast
    assert all(line.startswith("rate-") for line in lines[:12])  # all choices before any test data
    return LanguageStudy.read(recipe, out)


def test_language_study_measures_every_variant_seed_and_length(small_language):
    learned = {"paper_goat", "goat", "fast_goat", "local_rotary_goat"}
    for variant in ("rope", "alibi", *learned, "interpolated_rope", "ntk_rope"):
        found = small_language.rows("bits_per_byte", panel="a", variant=variant)
        assert sorted(zip(found.seed, found.length, strict=True)) == [
            (s, 32 * f) for s in (0, 1) for f in (1, 2, 4, 8, 16)
        ]
        far = small_language.bits(variant, 512)
        assert small_language.mean_bits(variant, 512).mean == pytest.approx(sum(far.values()) / 2)
        windows = small_language.rows("window_bits", variant=variant, length=512, seed=1)
        assert windows.value.mean() == pytest.approx(far[1])
    panels = small_language.table.groupby("panel").variant.unique()
    assert set(panels["c"]) == learned | {"fast_paper_goat"}
    assert set(panels["sweep"]) == {"rope", "alibi"} | learned
    assert small_language.curves().shape == (9, 5)


def test_another_reading_is_the_same_network_and_differs_beyond_the_training_length(small_language):
    near, far = 32, 512
    for kind in ("interpolated_rope", "ntk_rope"):
        assert small_language.bits(kind, near) == small_language.bits("rope", near)
        assert small_language.bits(kind, far) != small_language.bits("rope", far)


def test_every_variant_trains_at_the_rate_that_validation_files_chose(small_language):
    records = dict.fromkeys(small_language.provenance["runs"])
    swept = small_language.sweep()
    for name, bits in swept.iterrows():
        assert bits.taken == bits[[1e-3, 1e-2]].astype(float).idxmin()
        assert f"{name}-seed1" in records
    assert fig2_claims.LanguageStudy.rate(small_language, "fast_paper_goat") == swept.taken["rope"]
    assert small_language.reach("fast_paper_goat") == pytest.approx(10 * small_language.reach("rope"))
    assert set(small_language.headline) == {"paper_goat", "goat", "fast_goat", "local_rotary_goat"}


def test_unfinished_sweeps_leave_their_variant_out(tmp_path):
    recipe = small_recipe(tmp_path)
    folder = ResultFolder(str(tmp_path), "smoke", "fig2_language")
    with pytest.raises(ValueError, match="LanguageStudy: folder must hold runs or a table"):
        LanguageStudy.read(recipe, str(tmp_path))
    only = ["rate-rope-*", "rope-seed0", "rate-alibi-0.001"]
    lines = []
    records = perform(fig2_language.runs, recipe, folder, jobs=1, only=only, report=lines.append)
    assert list(records) == ["rate-rope-0.001", "rate-rope-0.01", "rate-alibi-0.001"]
    assert lines[-1] == "some runs wait for choices that are not stored"
    named = [run.name for run in fig2_language.runs(recipe, records)]
    assert "rate-alibi-0.01" in named
    assert "alibi-seed0" not in named
    assert "rope-seed0" in named
    with pytest.raises(ValueError, match=r"LanguageStudy: folder must hold \d+ runs; got '3, without rate-alibi-0\.01"):
        LanguageStudy.read(recipe, str(tmp_path))


def test_sinks_are_watched_from_the_start(small_language):
    for name in ("rope", "alibi", "goat"):
        mass = small_language.formation(name)
        assert mass.index.tolist() == [0, 2, 4]
        assert mass.columns.tolist() == [0, 1]
        assert ((mass > 0) & (mass < 1)).all(axis=None)


def test_variants_of_one_seed_share_their_start():
    results = {}
    for config in fig2_language.recipe("smoke").variants:
        torch.manual_seed(0)
        results[config.attention] = Decoder(config).state_dict()
    for name in ("embedding.weight", "readout.weight", "blocks.0.attention.in_proj.weight"):
        assert all(torch.equal(results["rope"][name], found[name]) for found in results.values())


def test_language_study_saves_and_draws(small_language, tmp_path):
    folder = small_language.save(str(tmp_path))
    figure = fig2_claims.draw(small_language)
    assert [axes.get_title(loc="left")[:3] for axes in figure.axes] == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    means = [small_language.mean_bits("ntk_rope", length).mean for length in small_language.recipe.lengths]
    assert drawn["RoPE, NTK"].get_ydata().tolist() == pytest.approx(means)
    formed = {line.get_label(): line for line in figure.axes[4].get_lines()}
    assert formed["ALiBi"].get_ydata() == pytest.approx(small_language.formation("alibi").mean(axis=1).to_numpy())
    plt.close(figure)
    assert len(table(folder)) == len(small_language.table)
    assert small_language.uniform_mass == pytest.approx(sum(1 / n for n in range(17, 33)) / 16)


def test_runs_of_two_corpora_are_not_mixed(tmp_path):
    recipe = replace(small_recipe(tmp_path), variants=(), contrasts=())
    origin = {"data": {"sha256": "one"}}
    records = {name: Record(name, {}, 0, [], "", "cpu", 1.0, origin) for name in ("a", "b")}
    records["b"] = replace(records["b"], provenance={"data": {"sha256": "another"}})
    with pytest.raises(ValueError, match="records must come from one corpus"):
        LanguageStudy.of(recipe, records)


# Claims: tables with invented numbers -------------------------------------------------------------------------------


def invented(study, bits):
    """The study with other bits per byte: name -> (near, far) of both seeds, the lengths between interpolated."""
    table = study.table.copy()
    at = (table.quantity == "bits_per_byte") & (table.panel == "a")
    for variant, (near, far) in bits.items():
        for seed in (0, 1):
            mine = at & (table.variant == variant) & (table.seed == seed)
            share = np.log2(table.loc[mine, "length"] / 32) / 4
            table.loc[mine, "value"] = near[seed] + share * (far[seed] - near[seed])
    return replace(study, table=table)


GOOD = {
    "rope": ((2.0, 2.001), (5.0, 5.1)),
    "alibi": ((2.1, 2.101), (2.1, 2.1)),
    "paper_goat": ((1.95, 1.951), (1.94, 1.941)),
    "goat": ((1.95, 1.951), (1.94, 1.941)),
}


def line_of(study, claim):
    (line,) = [line for line in fig2_claims.verdict(study).splitlines() if f"**{claim}" in line]
    return line


CLAIMS = {
    "gain": "paper_goat: at least 1% below rope",
    "stable": "paper_goat: at 16x better than at 1x",
    "far": "paper_goat: at 16x better than ALiBi",
    "diverges": "rope diverges",
}


@pytest.mark.parametrize("claim", CLAIMS.values())
def test_claims_hold_where_the_numbers_say_so(small_language, claim):
    assert ": held.**" in line_of(invented(small_language, GOOD), claim)


@pytest.mark.parametrize(
    ("claim", "bad", "word"),
    [
        ("gain", ((1.99, 1.991), (1.94, 1.945)), "refuted"),  # half a percent
        ("gain", ((1.90, 2.00), (1.94, 1.945)), "undecided"),  # the interval holds one percent
        ("stable", ((1.95, 1.951), (1.96, 1.961)), "refuted"),
        ("stable", ((1.95, 1.951), (1.94, 1.97)), "undecided"),
        ("far", ((1.95, 1.951), (2.11, 2.111)), "refuted"),
    ],
)
def test_claims_fail_or_stay_open_where_the_numbers_say_so(small_language, claim, bad, word):
    study = invented(small_language, GOOD | {"paper_goat": bad})
    assert f": {word}.**" in line_of(study, CLAIMS[claim])


def test_savings_are_paired_by_seed(small_language):
    study = invented(small_language, GOOD)
    saved = study.saving("paper_goat", over="rope", length=32)
    assert (saved.mean, saved.half_width) == (pytest.approx(0.05), pytest.approx(0.0, abs=1e-9))


def test_four_steps_teach_nothing_and_the_verdict_says_so(small_language):
    assert "refuted" in line_of(small_language, CLAIMS["diverges"])
    assert "2 seeds" in fig2_claims.verdict(small_language)


@pytest.mark.parametrize(("sign", "word"), [(-1, "held"), (1, "refuted")])
def test_a_sink_that_grows_with_the_signal_fails_its_claim(small_language, sign, word):
    table = small_language.table.copy()
    mine = (table.quantity == "sink_mass") & (table.panel == "d") & (table.variant == "paper_goat")
    table.loc[mine, "value"] = 0.5 + sign * 0.01 * table.loc[mine, "score_range"]
    table.loc[mine & (table.seed == 1), "value"] += sign * 1e-3 * table.loc[mine, "score_range"]
    line = line_of(replace(small_language, table=table), "paper_goat: sink mass falls")
    assert f": {word}.**" in line
