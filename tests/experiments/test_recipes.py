"""Recipes: frozen, complete for every scale, and what the text says of them."""

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from eotattn.experiments.figures import fig1_copy_mixture, fig2_language
from eotattn.experiments.scales import SCALES


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", [fig1_copy_mixture.recipe, fig2_language.recipe])
def test_every_figure_has_every_scale_and_is_frozen(recipe, scale):
    found = recipe(scale)
    assert found.scale == scale
    for field in fields(found):
        with pytest.raises(FrozenInstanceError):
            setattr(found, field.name, None)
    assert hash(found) == hash(recipe(scale))  # frozen to the leaves


@pytest.mark.parametrize("scale", SCALES)
def test_language_variants_differ_in_attention_alone_and_reach_sixteen_fold(scale):
    recipe = fig2_language.recipe(scale)
    sizes = [
        {k: v for k, v in asdict(decoder).items() if k != "attention"} for decoder in recipe.variants + recipe.contrasts
    ]
    assert all(size == sizes[0] for size in sizes)
    assert {"rope", "alibi", "paper_goat", "goat"} <= {decoder.attention for decoder in recipe.variants}
    assert recipe.lengths[0] == recipe.train_length
    assert recipe.lengths[-1] == 16 * recipe.train_length
    assert recipe.sweep.training.batch_size == recipe.training.batch_size


def test_numbers_to_quote_come_from_three_seeds():
    assert len(fig2_language.recipe("h200").seeds) >= 3
    assert all(len(fig1_copy_mixture.recipe(scale).seeds) >= 3 for scale in SCALES)


def test_paper_scale_has_the_papers_numbers():
    recipe = fig2_language.recipe("paper")
    decoder = recipe.variants[0]
    assert (decoder.num_layers, decoder.num_heads, decoder.embed_dim, decoder.train_length) == (12, 12, 768, 2048)
    tokens = recipe.training.steps * recipe.training.batch_size * recipe.train_length
    assert tokens == pytest.approx(4e9, rel=1e-3)
    assert recipe.training.precision == "bf16"


@pytest.mark.parametrize("recipe", [fig1_copy_mixture.recipe, fig2_language.recipe])
def test_unknown_scales_are_refused(recipe):
    with pytest.raises(ValueError, match="scale must be one of"):
        recipe("desktop")
