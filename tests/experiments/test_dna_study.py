"""Figure 4: what its runs measure, and that its verdict can say yes and no."""

import csv
import math
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from eotattn.attention import Rotary
from eotattn.experiments.figures import fig4_claims, fig4_dna
from eotattn.experiments.figures.fig4_claims import DnaStudy
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.networks import Decoder
from eotattn.experiments.rate_sweep import best_rate, run_name
from eotattn.experiments.records import Record
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.study import as_table
from eotattn.experiments.training_speed import FusedRotary, SpeedVariant, measure_training_speed, speed_variants

LEARNED = ("paper_goat", "goat")
SMALL = replace(fig4_dna.recipe("smoke"), learning_rates=(1e-3,))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("dna"))
    perform(fig4_dna.runs, SMALL, ResultFolder(out, "smoke", "fig4_dna"), jobs=1, report=lambda line: None)
    return DnaStudy.read(SMALL, out)


def made_up(*, saved, gc, throughput, memory=None):
    """A study whose GOAT saves ``saved`` nats a seed, and whose GC correlation is better by ``gc`` a seed."""
    rows = []

    def add(variant, seed, **values):
        place = {"run": run_name(variant, 1e-3, seed), "variant": variant, "seed": seed}
        rows.extend(place | {"quantity": name, "value": value} for name, value in values.items())

    for seed in (0, 1):
        rope, follows = 1.3 + 0.1 * seed, 0.3 + 0.1 * seed
        add("rope", seed, loss=rope, bits_per_base=rope / math.log(2), gc_correlation=follows)
        for name in LEARNED:
            loss = rope - saved[seed]
            add(name, seed, loss=loss, bits_per_base=loss / math.log(2), gc_correlation=follows + gc[seed])
    add("generator", 0, loss=1.1, bits_per_base=1.6, gc_correlation=1.0)
    for k, name in enumerate(("RoPE, fused", "GOAT, lanes reserved")):
        more = {} if memory is None else {"peak_memory": memory[k]}
        add(name, 0, throughput=throughput[k], step_seconds=1.0, **more)
    return DnaStudy(SMALL, pandas.DataFrame(rows), {"runs": {}, "data": []})


def test_every_run_is_made_once(study):
    made = {f"{v}-rate0.001-seed{seed}" for v in study.variants for seed in (0, 1)}
    assert set(study.provenance["runs"]) == {"speed", "generator"} | made
    (data,) = [each for each in study.provenance["data"] if each]
    assert len(data["sha256"]) == 64


def record(losses, quantity="training_loss"):
    rows = [{"quantity": quantity, "value": loss} for loss in losses]
    return Record("", {}, 0, rows, "", "cpu", 1.0, {})


def test_reports_wait_for_the_best_rate():
    recipe = fig4_dna.recipe("smoke")
    choices = {f"choose-{v}-rate{rate}-seed0" for v in ("rope", *LEARNED) for rate in ("0.001", "0.003")}
    assert {run.name for run in fig4_dna.runs(recipe, {})} == {"speed", "generator"} | choices
    losses = {("rope", 1e-3): 1.4, ("rope", 3e-3): 1.3, ("paper_goat", 1e-3): 1.2}
    known = {f"choose-{run_name(*which, 0)}": record([9.0, loss]) for which, loss in losses.items()}
    assert best_rate(recipe, as_table(known), "rope") == 3e-3
    assert best_rate(recipe, as_table(known), "paper_goat") is None
    runs = {run.name: run for run in fig4_dna.runs(recipe, known)}
    assert set(runs) == {"speed", "generator", "rope-rate0.003-seed0", "rope-rate0.003-seed1"} | choices
    assert all(run.chooses == (name in choices) for name, run in runs.items())
    assert runs["rope-rate0.003-seed0"].continues is runs["choose-rope-rate0.003-seed0"]
    assert runs["rope-rate0.003-seed0"].configuration == runs["choose-rope-rate0.003-seed0"].configuration
    assert runs["rope-rate0.003-seed1"].continues is None
    assert runs["rope-rate0.003-seed1"].configuration.training.learning_rate == 3e-3


def test_a_report_has_the_numbers_of_a_run_that_was_trained_at_once(tmp_path):
    recipe = replace(SMALL, learning_rates=(1e-3, 3e-3), variants=SMALL.variants[:1], seeds=(0,))
    folder = ResultFolder(str(tmp_path), "smoke", "fig4_dna")
    records = perform(fig4_dna.runs, recipe, folder, jobs=1, report=lambda line: None)
    assert not list((folder.path / ".runs").rglob("*.pt"))
    (name,) = [name for name in records if name.startswith("rope")]
    (run,) = [run for run in fig4_dna.runs(recipe, records) if run.name == name]
    torch.manual_seed(0)
    assert fig4_dna.measure(run.configuration, tmp_path / "new.pt").rows[-1] == records[name].rows[-1]
    assert len(DnaStudy.read(recipe, str(tmp_path)).sweep().columns) == 3


def test_losses_are_those_of_the_network():
    torch.manual_seed(0)
    network = Decoder(SMALL.variants[0]).eval()
    windows = torch.randint(4, (5, 9), generator=torch.Generator().manual_seed(0))
    found = fig4_dna.window_losses(network, windows, batch_tokens=20)
    with torch.no_grad():
        likelihood = network(windows[:, :-1]).double().log_softmax(-1)
    for n in range(5):
        for t in range(8):
            assert float(found[n, t]) == pytest.approx(-float(likelihood[n, t, windows[n, t + 1]]), abs=1e-5)


def test_generator_is_the_floor_that_its_model_states(study):
    task = SMALL.genome.task(SMALL.length)
    surprisal = SMALL.genome.model.surprisal(task.held_out_blocks)[:, 1:]
    assert study.generator("loss") == pytest.approx(float(surprisal.mean()))
    for variant in study.variants:
        assert study.over_seeds("loss", variant).mean > study.generator("loss")
        windows = study.rows("window_loss", variant=variant, seed=1)
        assert windows.value.mean() == pytest.approx(study.of_seeds("loss", variant=variant)[1])


def test_trajectories_are_those_of_the_held_out_windows(study):
    window = SMALL.genome.task(SMALL.length).held_out_windows(SMALL.length, 1)[0]
    share = ((window[16:24] == 1) | (window[16:24] == 2)).double().mean()
    true = study.rows("gc_true", variant="rope", seed=0)
    assert true.value.iloc[0] == pytest.approx(float(share))
    assert len(true) == len(study.rows("gc_sampled", variant="rope", seed=0)) == 2


def test_table_holds_what_is_drawn(study, tmp_path):
    folder = study.save(str(tmp_path))
    with (folder.path / "fig4_dna.csv").open() as file:
        rows = list(csv.DictReader(file))
    at = [float(r["value"]) for r in rows if r["run"] == "rope-rate0.001-seed1" and r["quantity"] == "loss_at_position"]
    assert at == pytest.approx(study.rows("loss_at_position", variant="rope", seed=1).value.tolist(), rel=1e-6)
    assert {"GOAT, lanes reserved", "RoPE, fused"} <= {r["variant"] for r in rows if r["quantity"] == "throughput"}
    figure = fig4_claims.draw(study)
    assert len(figure.axes) == 6
    drawn = figure.axes[3].lines[0].get_ydata()
    parts = [study.rows(f"gc_{name}", variant="rope", seed=0).value for name in ("prompt", "true")]
    assert list(drawn) == pytest.approx(pandas.concat(parts).tolist())
    plt.close(figure)


@pytest.mark.parametrize(
    ("saved", "gc", "word"),
    [
        ((0.05, 0.0501), (0.2, 0.21), "held"),
        ((-0.05, -0.0501), (-0.2, -0.21), "refuted"),
        ((0.05, -0.05), (0.2, -0.2), "undecided"),
    ],
)
def test_a_verdict_has_three_values(saved, gc, word):
    text = fig4_claims.verdict(made_up(saved=saved, gc=gc, throughput=(100.0, 99.0), memory=(100.0, 60.0)))
    assert text.count(f": {word}.**") == 2 * len(LEARNED)
    if word == "held":
        assert "0.0501 ± 0.0006" in text.replace("+", "")
    assert "a second, the fastest RoPE (RoPE, fused) 100: 0.99" in text
    assert "60 MiB (GOAT, lanes reserved) against 100 MiB (RoPE, fused): 0.60" in text


def test_verdict_without_memory_says_so():
    made = made_up(saved=(0.1, 0.1), gc=(0.1, 0.1), throughput=(1.0, 1.0))
    assert "measured on GPUs alone" in fig4_claims.verdict(made)


def test_correlation_leaves_out_windows_without_known_bases():
    true = np.array([[0.1, 0.5, np.nan], [0.9, 0.3, 0.2]])
    assert fig4_dna.correlation(2 * true + 1, true) == pytest.approx(1.0)
    assert fig4_dna.correlation(-true, true) == pytest.approx(-1.0)
    assert math.isnan(fig4_dna.correlation(np.ones((2, 3)), true))


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
    named = {run.name: run.configuration for run in fig4_dna.runs(fig4_dna.recipe("h200"), {})}
    for rate in fig4_dna.recipe("h200").learning_rates:
        for name, factor in (("goat", 1), ("fast_goat", 10)):
            training = named[f"choose-{run_name(name, rate, 0)}"].training
            assert (training.learning_rate, training.prior_learning_rate) == (rate, pytest.approx(factor * rate))


def test_recipes_share_everything_but_the_attention():
    for scale in ("smoke", "laptop", "h200", "paper"):
        recipe = fig4_dna.recipe(scale)
        first, *others = (asdict(variant) for variant in recipe.variants)
        for other in others:
            assert {k for k in first if first[k] != other[k]} == {"attention"}
        assert (first["vocabulary_size"], first["num_frequencies"]) == (5, 2)
        assert recipe.length % (2 * recipe.generation.gc_window) == 0
    assert fig4_dna.recipe("paper").length == fig4_dna.recipe("h200").length == 1024
