"""Figure 5: the transformer, its learned log-prior, and a verdict that can say yes and no."""

import csv
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from eotattn.experiments.figures import fig5_vision
from eotattn.experiments.figures.fig5_vision import VisionStudy, evaluate_images
from eotattn.experiments.grid_prior_parts import describe_grid_log_prior, grid_log_prior
from eotattn.experiments.networks import VisionConfig, VisionTransformer
from eotattn.experiments.rate_sweep import best_rate, run_name, sweep_table
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import perform
from eotattn.experiments.tasks import ImageTask
from eotattn.experiments.tasks.images import StoredImages
from eotattn.priors import FourierPrior, GridPrior, RecencyPrior

SMALL = replace(fig5_vision.recipe("smoke"), learning_rates=(1e-3,))


def transformer(positions, **changes):
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "train_grid": 4}
    return VisionTransformer(VisionConfig(positions, **(sizes | changes))).eval()


def fill_priors(network):
    generator = torch.Generator().manual_seed(1)
    for prior in network.priors:
        for parameter in prior.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return network


# The transformer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kinds_start_with_the_same_content():
    networks = [transformer(positions) for positions in ("goat", "none", "learned", "sinusoidal")]
    plain = networks[1].state_dict()
    for network in networks:
        state = network.state_dict()
        for name, value in plain.items():
            assert torch.equal(state[name], value), name


@torch.no_grad()
def test_goat_starts_as_no_positions_at_all():
    images = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(transformer("goat")(images), transformer("none")(images))


@torch.no_grad()
def test_without_positions_patches_can_be_exchanged_and_with_them_not():
    images = torch.rand(2, 1, 4, 4)
    turned = images.transpose(2, 3)
    torch.testing.assert_close(transformer("none")(images), transformer("none")(turned))
    for network in (transformer("learned"), transformer("sinusoidal"), fill_priors(transformer("goat"))):
        assert not torch.allclose(network(images), network(turned), atol=1e-4)


@torch.no_grad()
def test_units_of_positions():
    """In units of the image, a patch of an image twice as large lies at half its index."""
    network = fill_priors(transformer("goat"))
    assert network._positions(4, 1.0).tolist() == [[-1, -1], *([r, c] for r in range(4) for c in range(4))]
    squeezed = network._positions(8, 0.5)
    assert squeezed[0].tolist() == [-1, -1]
    assert squeezed[1 + 8 * 3 + 6].tolist() == [1.5, 3.0]
    images = torch.rand(2, 1, 8, 8)
    assert not torch.allclose(network(images, unit="image"), network(images, unit="patch"), atol=1e-4)
    base = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(network(base, unit="image"), network(base, unit="patch"))


@torch.no_grad()
def test_sinusoidal_waves_are_stretched_to_the_image():
    """A wave at the centre of the image is the same whatever the number of patches."""
    network = transformer("sinusoidal")
    coarse, fine = network._embedding(4, 1.0)[0], network._embedding(12, 1 / 3)[0]
    assert coarse.shape == (16, 4, 4)
    torch.testing.assert_close(fine[:, 1::3, 1::3], coarse)
    torch.testing.assert_close(network._embedding(12, 1.0)[0][:, :4, :4], coarse)


@torch.no_grad()
def test_learned_table_is_interpolated():
    network = transformer("learned")
    network.table.data = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 16, 4, 4).clone()
    assert network._embedding(4, 1.0) is network.table
    fine = network._embedding(8, 0.5)
    assert fine.shape == (1, 16, 8, 8)
    assert bool((fine.diff(dim=2) > 0).all())
    torch.testing.assert_close(fine.diff(dim=3), torch.zeros(1, 16, 8, 7))


def test_every_parameter_learns_but_the_last_grid_prior():
    network = transformer("goat").train()
    network(torch.rand(3, 1, 4, 4)).square().sum().backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert silent
    assert all(name.startswith("blocks.1.attention.prior.parts.0") for name in silent)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: VisionConfig("rotary", num_classes=2), "positions must be one of 'goat', 'learned'"),
        (lambda: VisionConfig("goat", num_classes=2, unit="pixel"), "unit must be one of 'patch', 'image'"),
        (lambda: VisionConfig("goat", num_classes=2, embed_dim=18), "embed_dim must be a multiple of 4"),
        (lambda: VisionConfig("goat", num_classes=2, num_frequencies=5), "num_frequencies must be even"),
        (lambda: transformer("goat")(torch.rand(1, 1, 4, 6)), "images must be square"),
        (lambda: transformer("goat", patch_size=2)(torch.rand(1, 1, 5, 5)), "multiples of patch_size = 2"),
        (lambda: transformer("goat")(torch.rand(1, 1, 4, 4), unit="mile"), "unit must be one of"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_evaluation_counts_every_held_out_image():
    network = transformer("goat", num_classes=2)
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    task = ImageTask(StoredImages(images, torch.arange(30) % 2, ("a", "b")), size=4)
    accuracy, loss = evaluate_images(network, task, 8, "image")
    held_out = task.indices("held_out")
    with torch.no_grad():
        logits = network(task.source.pixels(held_out, 8), unit="image")
    labels = task.source.labels[held_out]
    assert accuracy["value"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    chosen = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    assert loss["value"] == pytest.approx(-float(chosen.mean()), rel=1e-5)


# The learned log-prior ------------------------------------------------------------------------------------------------


def test_a_prior_of_lags_is_shift_invariant_and_its_map_is_its_formula():
    prior = GridPrior(FourierPrior(2, 2, 2.5, 9.0), FourierPrior(2, 2, 2.5, 9.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    log_prior = grid_log_prior(prior, 3)
    found = describe_grid_log_prior(log_prior, 3)
    assert found.shift_invariance.tolist() == pytest.approx([1.0, 1.0])
    centred = log_prior - log_prior.mean(-1, keepdim=True)
    lag = {(r, c): [] for r in range(-2, 3) for c in range(-2, 3)}
    for i in range(9):
        for j in range(9):
            lag[i // 3 - j // 3, i % 3 - j % 3].append(centred[1, i, j])
    for (r, c), values in lag.items():
        assert float(found.lag_map[1, r + 2, c + 2]) == pytest.approx(float(torch.stack(values).mean()))


def test_a_prior_of_keys_is_not_shift_invariant():
    keys = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 16, 16)
    assert float(describe_grid_log_prior(keys, 4).shift_invariance.max()) < 0.6


def test_locality_is_measured_against_the_uniform_prior():
    distance = torch.cdist(*[torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))] * 2)
    near, far, flat = (describe_grid_log_prior(s * distance[None], 4) for s in (-3.0, 3.0, 0.0))
    assert float(near.distance_ratio) < 0.3
    assert float(far.distance_ratio) > 1.2
    assert float(flat.distance_ratio) == pytest.approx(1.0)
    assert flat.shift_invariance.isnan().all()
    assert float(near.lag_map[0].max()) == float(near.lag_map[0, 3, 3])


def test_the_lag_is_query_minus_key():
    prior = GridPrior(RecencyPrior(1), FourierPrior(1, 1, 4.0, 4.0))  # later keys in a column get more
    lag_map = describe_grid_log_prior(grid_log_prior(prior, 3), 3).lag_map[0]
    assert float(lag_map[0, 2]) > 0 > float(lag_map[4, 2])


# The study ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("vision"))
    perform(fig5_vision.runs, SMALL, ResultFolder(out, "smoke", "fig5_vision"), jobs=1, report=lambda line: None)
    return VisionStudy.read(SMALL, out)


def test_study_measures_every_variant_unit_and_resolution(study):
    found = study.rows("accuracy").groupby(["variant", "positions", "size"]).seed.nunique()
    assert len(found) == 5 + 3 + 5
    assert (found == 2).all()
    assert ("learned", "patch", 16) not in found.index
    assert study.table_of_accuracies().shape == (5, 3)
    assert study.lag_maps().shape == (2, 1, 2, 7, 7)  # seeds, blocks but the last, heads


def test_table_holds_what_is_drawn(study, tmp_path):
    folder = study.save(str(tmp_path))
    with (folder.path / "fig5_vision.csv").open() as file:
        rows = list(csv.DictReader(file))
    maps = [float(r["value"]) for r in rows if r["quantity"] == "log_prior_by_lag"]
    assert np.mean(maps) == pytest.approx(float(study.lag_maps().mean()), abs=1e-6)
    (centre,) = [
        float(r["value"])
        for r in rows
        if (r["run"], r["head"], r["row_lag"], r["column_lag"]) == ("goat-rate0.001-seed1", "1", "0", "-2")
    ]
    assert centre == pytest.approx(float(study.lag_maps()[1, 0, 1, 3, 1]), rel=1e-5)
    figure = fig5_vision.draw(study)
    assert figure.axes[0].get_title(loc="left").startswith("(a)")
    plt.close(figure)


def made_up(*, goat, learned, ratio, invariance, recipe=SMALL):
    """A study with given accuracies (training resolution, higher ones) and shape of the prior."""
    rows = []
    for seed in (0, 1):
        for name, (base, high) in (("goat", goat), ("learned", learned), ("sinusoidal", learned)):
            place = {"run": run_name(name, 1e-3, seed), "variant": name, "seed": seed}
            for size, value in zip(SMALL.sizes, (base, high, high), strict=True):
                for unit in ("image", "patch"):
                    row = {"quantity": "accuracy", "value": value + 1e-4 * seed * (size == 16), "size": size}
                    rows.append(place | row | {"positions": unit})
            shape = {"distance_ratio": ratio + 1e-4 * seed, "strength": 1.0, "shift_invariance": invariance}
            heads = [{"block": b, "head": h} for b in (0, 1) for h in (0, 1)]
            rows += [place | head | {"quantity": q, "value": v} for q, v in shape.items() for head in heads]
    return VisionStudy(recipe, pandas.DataFrame(rows), {"runs": {}, "data": []})


def test_all_seeds_try_all_rates_once_and_log_priors_are_faster():
    recipe = fig5_vision.recipe("h200")
    found = fig5_vision.runs(recipe, {})
    assert len({run.name for run in found}) == len(found) == 3 * len(recipe.learning_rates) * len(recipe.seeds)
    for run in found:
        training = run.configuration.training
        assert training.prior_learning_rate == pytest.approx(recipe.prior_rate_factor * training.learning_rate)
        assert run.chooses
    assert recipe.prior_rate_factor == 10
    assert len(fig5_vision.runs(SMALL, {})) == 3 * 2  # one rate, so there is nothing to choose


def test_rates_are_chosen_on_images_that_training_did_not_see():
    recipe = replace(SMALL, learning_rates=(1e-3, 3e-3))

    def losses(of):
        rows = []
        for (rate, seed), loss in of.items():
            name = {"run": f"choose-{run_name('goat', rate, seed)}", "variant": "goat", "seed": seed}
            rows.append(name | {"quantity": "training_loss", "value": 0.1 if rate == 3e-3 else 1.0})  # by heart
            rows.append(name | {"quantity": "choice_loss", "value": loss})
        return pandas.DataFrame(rows)

    # The first seed alone would choose wrongly.
    found = {(1e-3, 0): 1.5, (1e-3, 1): 1.5, (3e-3, 0): 1.4, (3e-3, 1): 3.0}
    assert best_rate(recipe, losses(found), "goat") == 1e-3
    assert sweep_table(recipe, losses(found), ["goat"]).loc["goat", 3e-3] == pytest.approx(2.2)  # their mean
    assert best_rate(recipe, losses(found | {(1e-3, 1): float("nan")}), "goat") == 3e-3
    del found[3e-3, 1]
    assert best_rate(recipe, losses(found), "goat") is None


def test_verdict_says_yes_where_everything_held():
    text = fig5_vision.verdict(made_up(goat=(0.95, 0.94), learned=(0.95, 0.6), ratio=0.5, invariance=0.99))
    assert text.count(": held.**") == 4 * 2 + 2
    assert "0.340" in text


def test_verdict_says_no_where_nothing_held():
    text = fig5_vision.verdict(made_up(goat=(0.95, 0.6), learned=(0.95, 0.7), ratio=1.1, invariance=0.2))
    assert text.count(": refuted.**") == 4 * 2 + 2


def test_recipes_share_everything_but_the_positions():
    for scale in ("smoke", "laptop", "h200", "paper"):
        recipe = fig5_vision.recipe(scale)
        first, *others = (asdict(variant) for variant in recipe.variants)
        for other in others:
            assert {k for k in first if first[k] != other[k]} == {"positions"}
        assert first["num_frequencies"] == 16
        assert first["train_grid"] * first["patch_size"] == recipe.sizes[0]
    assert fig5_vision.recipe("paper").sizes == (224, 384, 512)
