"""Every recipe's model can begin to learn, and a recipe may go on from a trained one."""

import math

import msgspec
import pytest
import torch

from kvprism.errors import BadInput
from kvprism.integrations.hf import load
from training.network import build
from training.recipe import FOLDER, Recipe

RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_model_begins_even_and_can_learn(name: str) -> None:
    """Nothing but the embeddings speaks at first, so that every token is about as likely."""
    recipe = Recipe.read(name)
    model = build(recipe, seed=1)
    ids = torch.arange(4, 68)[None]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    first = loss.item()
    assert math.isfinite(first) and moved
    if not isinstance(recipe.start, str):
        assert abs(first - math.log(recipe.vocabulary)) < 0.5


def test_a_recipe_may_go_on_from_a_trained_model() -> None:
    recipe = Recipe.read("tiny-llama31")
    assert recipe.start == "tiny"
    given, _ = load("tiny")
    model = build(recipe, seed=1)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    for name, weight in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    wider = msgspec.structs.replace(recipe, model=recipe.model | {"intermediate_size": 512})
    with pytest.raises(BadInput, match=r"tiny does not fit .*mlp"):
        build(wider, seed=1)
