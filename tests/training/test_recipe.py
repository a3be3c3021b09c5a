"""Recipes are read strictly; the shipped ones train what the card promises."""

from pathlib import Path

import pytest

from kvprism.errors import BadInput
from kvprism.evaluate.tasks import KINDS
from training.recipe import FOLDER, Recipe

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_use_known_kinds_and_end_at_full_length(name: str):
    recipe = Recipe.read(name)
    assert recipe.name == name
    for stage in recipe.stages:
        assert set(stage.mixture) <= {"text", "echo", "copy", "dense", "hidden"}
        assert set(stage.tasks) <= set(KINDS)
        assert set(stage.gate) <= {*KINDS, "text loss", "echo loss", "copy loss"}
        assert stage.tokens[0] <= stage.tokens[1]
        assert stage.length <= recipe.model["max_position_embeddings"]
    taught = recipe.start is not None or recipe.stages[0].required
    assert taught, "without recall, later stages teach nothing"
    assert recipe.stages[-1].length == recipe.model["max_position_embeddings"]
    assert set(recipe.stages[-1].tasks) == set(KINDS)


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(BadInput, match=f"no recipe 'huge'; known: {', '.join(NAMES)}"):
        Recipe.read("huge")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 1", "sead = 1", "sead"),
        ("length = 64", "length = 0", "length"),
        ("vocabulary = 400", "", "vocabulary"),
        ("[model]", "[model", "is no recipe"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_field(recipe_file: Path, old, new, message):
    recipe_file.write_text(recipe_file.read_text().replace(old, new, 1))
    with pytest.raises(BadInput, match=message):
        Recipe.read(str(recipe_file))
