"""Studies at small scale: what they measure, what they store, and that they can say no."""

import csv
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from eotattn.experiments import recipes
from eotattn.experiments.figures import draw_copy_mixture, draw_language
from eotattn.experiments.networks import Decoder
from eotattn.experiments.prior_parts import PriorParts
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.studies import copy_mixture, language
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


def test_copy_mixture_study_stores_what_it_draws(tmp_path):
    recipe = recipes.copy_mixture("smoke")
    study = copy_mixture.run(replace(recipe, training=replace(recipe.training, steps=12)))
    folder = ResultFolder(str(tmp_path), "smoke", "fig1_copy_mixture")
    study.save(folder)
    figure = draw_copy_mixture(study)
    assert [axes.get_title(loc="left")[:3] for axes in figure.axes[:4]] == ["(a)", "(b)", "(c)", "(d)"]
    plt.close(figure)
    with (folder.path / "fig1_copy_mixture.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["panel"] for row in rows} == {"a", "b", "c", "d", "finding", "training"}
    drawn = [float(row["value"]) for row in rows if row["panel"] == "a"]
    assert drawn == pytest.approx(study.parts.key_only[0].tolist(), rel=1e-5)
    assert study.best_loss < study.loss < math.log(16)
    assert "the claim" in study.verdict()
    assert (folder.path / "fig1_copy_mixture.json").exists()


@pytest.fixture(scope="module")
def small_language():
    recipe = recipes.language("smoke")
    training = replace(recipe.training, steps=4, warmup_steps=1, log_every=2)
    lines = []
    study = language.run(replace(recipe, training=training, seeds=(0, 1), curve_windows=2), report=lines.append)
    assert len(lines) == 6
    return study


def test_language_study_measures_every_variant_seed_and_length(small_language):
    rows = small_language.rows()
    for variant in ("rope", "alibi", "goat"):
        found = [row for row in rows if row["quantity"] == "bits_per_byte" and row["variant"] == variant]
        assert [(row["seed"], row["length"]) for row in found] == [
            (s, 32 * f) for s in (0, 1) for f in (1, 2, 4, 8, 16)
        ]
        mean = sum(row["value"] for row in found if row["length"] == 512) / 2
        assert small_language.bits_per_byte(variant)[512] == pytest.approx(mean)
    assert len(small_language.curve_table()) == 30
    assert {row["variant"] for row in rows if row["panel"] == "b"} == {"goat"}
    assert {row["variant"] for row in rows if row["panel"] == "c"} == {"rope", "alibi", "goat"}
    assert len({frozenset(row) for row in rows}) == 1  # one set of columns


def test_variants_of_one_seed_share_their_start():
    results = {}
    for variant in ("rope", "alibi"):
        recipe = recipes.language("smoke")
        config = next(decoder for decoder in recipe.variants if decoder.attention == variant)
        torch.manual_seed(0)
        results[variant] = Decoder(config).state_dict()
    for name in ("embedding.weight", "readout.weight", "blocks.0.attention.in_proj.weight"):
        assert torch.equal(results["rope"][name], results["alibi"][name])


def test_language_study_saves_and_draws(small_language, tmp_path):
    folder = ResultFolder(str(tmp_path), "smoke", "fig2_language")
    small_language.save(folder)
    figure = draw_language(small_language)
    assert len(figure.axes) == 3
    assert len(figure.axes[0].child_axes) == 1  # the enlarged curves
    assert small_language.uniform_mass == pytest.approx(sum(1 / n for n in range(17, 33)) / 16)
    plt.close(figure)
    assert "2 seeds" in small_language.verdict()


def test_language_study_continues_from_its_checkpoints(tmp_path, monkeypatch):
    recipe = recipes.language("smoke")
    training = replace(recipe.training, steps=2, warmup_steps=1, log_every=1)
    recipe = replace(recipe, training=training, curve_windows=2, variants=recipe.variants[-2:])
    expected = language.run(recipe, report=lambda line: None)

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        language.run(recipe, report=interrupt, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["alibi_seed0.pt"]
    batches = []
    batch = language.LanguageTask.batch
    monkeypatch.setattr(language.LanguageTask, "batch", lambda *a, **k: batches.append(k) or batch(*a, **k))
    resumed = language.run(recipe, report=lambda line: None, checkpoints=tmp_path)
    assert len(batches) == 2  # the second decoder alone was trained
    assert list(tmp_path.iterdir()) == []
    for name in ("alibi", "goat"):
        assert resumed.bits_per_byte(name) == expected.bits_per_byte(name)


@pytest.mark.parametrize(("curve", "rise"), [([2.0, 1.8, 2.05], 0.25), ([2.0, 1.9, 1.8], 0.0), ([2.0, 2.1, 2.05], 0.1)])
def test_a_rise_is_measured_from_the_best_shorter_context(curve, rise):
    assert language._largest_rise(curve) == pytest.approx(rise)


def test_the_gain_is_paired_over_windows(small_language):
    goat, alibi = (small_language.of(name)[0].near_bits for name in ("goat", "alibi"))
    gain, error = small_language.paired_gain("goat", over="alibi")
    both = torch.stack([r.near_bits for r in small_language.of("alibi")]).mean(0)
    both = both - torch.stack([r.near_bits for r in small_language.of("goat")]).mean(0)
    assert gain == pytest.approx(both.mean().item())
    assert 0 < error < (goat.std() + alibi.std()).item()


def test_verdict_says_no_when_a_claim_fails(small_language):
    """Four steps teach nothing, so RoPE has nothing to lose beyond its training length."""
    assert "RoPE diverges: did NOT hold" in small_language.verdict()
