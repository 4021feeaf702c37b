"""Recipes: overrides, refusals, and what the published ones say."""

import pytest

from training.recipe import Recipe, RecipeError
from training.recipes import RECIPES


def test_overrides_take_the_type_of_the_field():
    """Text from a command line becomes numbers, tuples, booleans, None."""
    recipe = RECIPES["ride-cifar100"].override(
        {
            "epochs": "20",
            "lr": "0.05",
            "lr_drops": "0.5,0.75",
            "compile": "false",
            "mean": "none",
            "std": "none",
            "data": "x",
        }
    )

    assert (recipe.epochs, recipe.lr, recipe.lr_drops, recipe.compile) == (20, 0.05, (0.5, 0.75), False)
    assert (recipe.mean, recipe.std, recipe.data) == (None, None, "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "1"}, "learning_rate: no such recipe field; valid are name, method, loss"),
        ({"epochs": "many"}, "epochs=many: must be a whole number"),
        ({"lr": "fast"}, "lr=fast: must be a number"),
        ({"epochs": "0"}, "epochs=0: must be from 1"),
        ({"lr": "-0.1"}, "lr=-0.1: must be from"),
        ({"lr": "nan"}, "lr=nan: must be from"),
        ({"n_experts": "7"}, "n_experts=7: must be from 1 to 6"),
        ({"method": "magic"}, "method='magic': must be one of ride, single"),
        ({"profile": "log"}, "profile='log': must be one of exp, step, natural"),
        ({"compile": "maybe"}, "compile=maybe: must be true or false"),
        ({"lr_drops": "0.9,0.8"}, "must be ascending shares"),
        ({"lr_drops": "160,180"}, "must be ascending shares"),
        ({"mean": "none"}, "mean and std: give both"),
        ({"mean": "0.5"}, "must be three numbers"),
        ({"std": "0,1,1"}, "must be positive"),
        ({"method": "single"}, "method 'single' trains one expert"),
        ({"loss": "ldam", "n_experts": "1", "classifier": "linear"}, "need the cosine classifier"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    """The message names the field, the value and what is possible."""
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        RECIPES["ride-cifar100"].override(settings)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_survives_its_checkpoint(recipe):
    """JSON and back gives the same recipe."""
    import json

    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_ride_recipe_is_the_published_one():
    """What is most easily got wrong: drops at 160 and 180 by 0.01, DRW at 160, rotation, Nesterov, weight decay."""
    from training.methods.method import scheduled_lr

    recipe = RECIPES["ride-cifar100"]

    assert [recipe.epoch_of(share) for share in (*recipe.lr_drops, recipe.deferred_from)] == [160, 180, 160]
    rates = [scheduled_lr(recipe, epoch) for epoch in (0, 4, 5, 159, 160, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.1, 1e-3, 1e-5])
    assert (recipe.nesterov, recipe.weight_decay, recipe.rotation) == (True, 5e-4, 15)
    assert (RECIPES["ldam-drw-cifar100"].weight_decay, RECIPES["ldam-drw-cifar100"].rotation) == (2e-4, 0)
