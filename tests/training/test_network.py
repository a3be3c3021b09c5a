"""Every recipe's model can begin to learn, and a recipe may go on from a trained one."""

import math

import msgspec
import pytest
import torch

from kvprism.errors import BadInput
from kvprism.integrations.hf import load
from training import attention
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


def test_attention_in_blocks_is_eager_attention() -> None:
    """Logits and gradients, on sequences of several blocks that are longer than the window.

    Both sum in another order: float32 keeps 24 bits, and the deepest sums here have some hundred
    terms, so 1e-5 of the largest value is allowed.
    """
    model = build(Recipe.read("tiny-gemma2"), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.zero_()  # of zeros as they begin, the outputs would hide all attention
    ids = torch.randint(3, 2000, (2, 700), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in (attention.NAME, "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        gradients = {key: value.grad.clone() for key, value in model.named_parameters()}
        found[name] = {"logits": output.logits.detach(), **gradients}
    for key, ours in found[attention.NAME].items():
        eager = found["eager"][key]
        assert (ours - eager).abs().max() <= 1e-5 * eager.abs().max(), key


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
