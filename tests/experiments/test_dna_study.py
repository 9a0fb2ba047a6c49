"""Figure 4: what its runs measure, and that its verdict can say yes and no."""

import csv
import math
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from eotattn.attention import Rotary
from eotattn.experiments import recipes
from eotattn.experiments.figures import draw_dna
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.networks import Decoder
from eotattn.experiments.rate_sweep import best_rate, run_name
from eotattn.experiments.records import Record
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.studies import dna
from eotattn.experiments.studies.dna_runs import window_losses
from eotattn.experiments.training_speed import FusedRotary, SpeedVariant, measure_training_speed, speed_variants

LEARNED = ("paper_goat", "goat")
SMALL = replace(recipes.dna("smoke"), learning_rates=(1e-3,))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = ResultFolder(str(tmp_path_factory.mktemp("dna")), "smoke", dna.FIGURE)
    return dna.DnaStudy(SMALL, perform(dna.runs, SMALL, folder, jobs=1, report=lambda line: None))


def record(name, rows, arrays=None, seed=0):
    rows = [{"quantity": quantity, "value": value} | where for quantity, value, where in rows]
    return Record(name, {}, seed, rows, arrays or {}, "", "cpu", 1.0, {"date": "", "commit": ""})


def made_up(*, saved, gc, throughput, memory=None):
    """A study whose GOAT saves ``saved`` nats a seed, and whose GC correlation is perfect where ``gc``."""
    noise = np.random.default_rng(0).random((2, 6, 4))
    records = {}
    for seed in (0, 1):
        loss_of = {"rope": 1.3 + 0.1 * seed} | dict.fromkeys(LEARNED, 1.3 + 0.1 * seed - saved[seed])
        for name, loss in loss_of.items():
            follows = name in LEARNED and gc
            arrays = {"gc_true": noise[0], "gc_sampled": noise[0] if follows else noise[1] + seed * noise[0] * 0.01}
            rows = [("loss", loss, {}), ("bits_per_base", loss / math.log(2), {})]
            rows.append(("training_loss", 1.0, {}))
            records[run_name(name, 1e-3, seed)] = record(name, rows, arrays, seed)
    generator = {"gc_true": noise[0], "gc_sampled": noise[0]}
    records["generator"] = record("generator", [("loss", 1.1, {}), ("bits_per_base", 1.6, {})], generator)
    rows = []
    for k, name in enumerate(("RoPE, fused", "GOAT, lanes reserved")):
        rows += [("throughput", throughput[k], {"variant": name}), ("step_seconds", 1.0, {"variant": name})]
        if memory is not None:
            rows.append(("peak_memory", memory[k], {"variant": name}))
    records["speed"] = record("speed", rows)
    return dna.DnaStudy(SMALL, records)


def test_every_run_is_made_once(study):
    assert set(study.records) == {
        "speed",
        "generator",
        *(f"{v}-rate0.001-seed{seed}" for v in study.variants for seed in (0, 1)),
    }


def test_other_seeds_wait_for_the_best_rate_of_the_first():
    recipe = recipes.dna("smoke")
    rates = {f"{v}-rate{rate}-seed0" for v in ("rope", *LEARNED) for rate in ("0.001", "0.003")}
    assert {run.name for run in dna.runs(recipe, {})} == {"speed", "generator"} | rates
    losses = {("rope", 1e-3): 1.4, ("rope", 3e-3): 1.3, ("paper_goat", 1e-3): 1.2}
    known = {
        run_name(*which, 0): record("", [("training_loss", 9.0, {}), ("training_loss", loss, {})])
        for which, loss in losses.items()
    }
    assert best_rate(recipe, known, "rope") == 3e-3
    assert best_rate(recipe, known, "paper_goat") is None
    runs = {run.name: run for run in dna.runs(recipe, known)}
    assert set(runs) == {"speed", "generator", "rope-rate0.003-seed1"} | rates
    assert runs["rope-rate0.003-seed1"].configuration.training.learning_rate == 3e-3
    assert runs["rope-rate0.003-seed1"].configuration.seed == 1


def test_losses_are_those_of_the_network():
    torch.manual_seed(0)
    network = Decoder(SMALL.variants[0]).eval()
    windows = torch.randint(4, (5, 9), generator=torch.Generator().manual_seed(0))
    found = window_losses(network, windows, batch_tokens=20)
    with torch.no_grad():
        likelihood = network(windows[:, :-1]).double().log_softmax(-1)
    for n in range(5):
        for t in range(8):
            assert float(found[n, t]) == pytest.approx(-float(likelihood[n, t, windows[n, t + 1]]), abs=1e-5)


def test_generator_is_the_floor_that_its_model_states(study):
    task = SMALL.genome.task(SMALL.length)
    surprisal = SMALL.genome.model.surprisal(task.held_out_blocks)[:, 1:]
    assert study.generator.value("loss") == pytest.approx(float(surprisal.mean()))
    for variant in study.variants:
        assert study.loss(variant).mean > study.generator.value("loss")


def test_trajectories_are_those_of_the_held_out_windows(study):
    arrays = study.of("rope")[0].arrays
    window = SMALL.genome.task(SMALL.length).held_out_windows(SMALL.length, 1)[0]
    share = ((window[16:24] == 1) | (window[16:24] == 2)).double().mean()
    assert arrays["gc_true"][0, 0] == pytest.approx(float(share))
    assert arrays["gc_sampled"].shape == arrays["gc_true"].shape == (4, 2)


def test_table_holds_what_is_drawn(study, tmp_path):
    folder = ResultFolder(str(tmp_path), "smoke", dna.FIGURE)
    study.save(folder)
    with (folder.path / f"{dna.FIGURE}.csv").open() as file:
        rows = list(csv.DictReader(file))
    at = [float(r["value"]) for r in rows if r["run"] == "rope-rate0.001-seed1" and r["quantity"] == "loss_at_position"]
    assert at == pytest.approx(study.of("rope")[1].arrays["position_loss"].tolist(), rel=1e-6)
    assert {"GOAT, lanes reserved", "RoPE, fused"} <= {r["variant"] for r in rows if r["quantity"] == "throughput"}
    figure = draw_dna(study)
    assert len(figure.axes) == 6
    drawn = figure.axes[3].lines[0].get_ydata()
    arrays = study.of("rope")[0].arrays
    assert list(drawn) == pytest.approx([*arrays["gc_prompt"][0], *arrays["gc_true"][0]])
    plt.close(figure)


def test_verdict_says_yes_where_everything_held():
    text = made_up(saved=(0.05, 0.0501), gc=True, throughput=(100.0, 99.0), memory=(100.0, 60.0)).verdict()
    assert "did NOT" not in text
    assert "0.0501 ± 0.0006" in text.replace("+", "")
    assert "a second, the fastest RoPE (RoPE, fused) 100: 0.99" in text


def test_verdict_says_no_where_nothing_held():
    text = made_up(saved=(0.05, -0.05), gc=False, throughput=(100.0, 90.0), memory=(100.0, 101.0)).verdict()
    assert text.count("did NOT hold") == 2 * len(LEARNED) + 3
    assert "held;" not in text


def test_a_saving_of_less_than_the_papers_is_told_apart():
    text = made_up(saved=(0.05, 0.0501), gc=True, throughput=(100.0, 99.0), memory=(100.0, 90.0)).verdict()
    assert "well-implemented RoPE: held; the paper's saving of 36 %: did NOT hold" in text


def test_verdict_without_memory_says_so():
    assert "measured on GPUs alone" in made_up(saved=(0.1, 0.1), gc=True, throughput=(1.0, 1.0)).verdict()


def test_correlation_leaves_out_windows_without_known_bases():
    true = np.array([[0.1, 0.5, np.nan], [0.9, 0.3, 0.2]])
    assert dna.correlation(2 * true + 1, true) == pytest.approx(1.0)
    assert dna.correlation(-true, true) == pytest.approx(-1.0)
    assert math.isnan(dna.correlation(np.ones((2, 3)), true))


def test_interval_of_seeds_is_students():
    found = SeedInterval.of([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half_width == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    assert f"{SeedInterval.of([1.0]):.1f}" == "1.0 (one seed)"
    with pytest.raises(ValueError, match="values must hold at least one run"):
        SeedInterval.of([])


def test_intervals_cover_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(1).normal(size=(2000, 3))
    covered = [abs(SeedInterval.of(list(row)).mean) < SeedInterval.of(list(row)).half_width for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


# Speed ----------------------------------------------------------------------------------------------------------------


def test_fused_rotary_is_rotary():
    content = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 40, 41, 999, 1023])
    torch.testing.assert_close(FusedRotary(8, max_length=1024)(content, positions), Rotary(8)(content, positions))


def test_timed_variants_differ_in_nothing_but_what_they_say():
    sizes, device = SMALL.speed.network, torch.device("cpu")
    tokens = torch.randint(5, (2, 9))
    outputs = {}
    for variant in speed_variants(compiled=False):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs[variant.name] = variant.build(sizes, device, torch.float32)(tokens)
    torch.testing.assert_close(outputs["RoPE, fused"], outputs["RoPE, naive"], rtol=0, atol=1e-5)
    assert not torch.allclose(outputs["RoPE, fused"], outputs["GOAT, lanes appended"])
    reserved = SpeedVariant("r", "paper_goat", lanes="reserved").build(sizes, device, torch.float32)
    width = sizes.head_dim - reserved.blocks[0].attention.prior.num_lanes(torch.float32)
    assert reserved.blocks[0].attention.content_dim == width


def test_speed_rows_and_failures():
    sizes = SMALL.speed.network
    variants = [SpeedVariant("good", "rope"), SpeedVariant("bad", "goat", backend="flex")]
    rows = measure_training_speed(variants, sizes, batch_size=2, rounds=2, precision="no")
    found = {row["quantity"]: row["value"] for row in rows if row["variant"] == "good"}
    assert found["throughput"] == pytest.approx(2 * sizes.train_length / found["step_seconds"])
    assert found["step_seconds_low"] <= found["step_seconds"] <= found["step_seconds_high"]
    (failure,) = [row for row in rows if row["variant"] == "bad"]
    assert failure["quantity"] == "failure"
    assert "flex" in failure["value"]
    assert {row["panel"] for row in rows} == {"f"}  # where the figure shows them


def test_log_priors_of_fast_kinds_train_at_ten_times_the_rate():
    named = {run.name: run.configuration for run in dna.runs(recipes.dna("h200"), {})}
    for rate in recipes.dna("h200").learning_rates:
        for name, factor in (("goat", 1), ("fast_goat", 10)):
            training = named[run_name(name, rate, 0)].training
            assert (training.learning_rate, training.prior_learning_rate) == (rate, pytest.approx(factor * rate))


def test_recipes_share_everything_but_the_attention():
    for scale in ("smoke", "laptop", "h200", "paper"):
        recipe = recipes.dna(scale)
        first, *others = (asdict(variant) for variant in recipe.variants)
        for other in others:
            assert {k for k in first if first[k] != other[k]} == {"attention"}
        assert (first["vocabulary_size"], first["num_frequencies"]) == (5, 2)
        assert recipe.length % (2 * recipe.generation.gc_window) == 0
    assert recipes.dna("paper").length == recipes.dna("h200").length == 1024
