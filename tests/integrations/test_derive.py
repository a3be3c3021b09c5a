"""Models derived from `tiny`: the same function, other keys; made once, kept by name."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from configs import MODELS
from safetensors.torch import load_file, save_file
from samples import tokens

from kvprism.codec.condition import condition, restore
from kvprism.codec.reference import nested_codes, nested_scale
from kvprism.errors import BadInput, UnknownName, Unsupported
from kvprism.evaluate.haystack import sentences
from kvprism.integrations import hf, tiny
from kvprism.integrations.families import windows_of
from kvprism.tensors import KeyConditioning, LayerView

EXACT = ["tiny-mistral", "tiny-qwen2", "tiny-qwen2-fragile"]
SCALE = 32


@pytest.fixture(scope="module", autouse=True)
def _kept(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tiny.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield
        load.cache_clear()
        views.cache_clear()


@cache
def load(name: str, dtype: torch.dtype = torch.float32):
    return hf.load(name, dtype)


@cache
def views(name: str) -> tuple[LayerView, ...]:
    """What a generated text makes of every layer."""
    model, tokenizer = load(name)
    ids = tokenizer.encode(sentences(np.random.default_rng(7), 60))
    return hf.capture(model, torch.tensor(ids[:512]), window=128)[1]


def nll(name: str) -> float:
    """Nats per token of generated text, in windows of 512."""
    model, tokenizer = load(name)
    ids = torch.tensor(tokenizer.encode(sentences(np.random.default_rng(8), 300)))
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[:4]
    logits = model(windows, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(tiny.find(name) / "model.safetensors")


# The function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_the_same_function_to_the_last_bit(name, dtype):
    ids = tokens(300)
    expected = load("tiny", dtype)[0](ids).logits
    assert torch.equal(load(name, dtype)[0](ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("tiny-mistral", "MistralForCausalLM"), ("tiny-qwen2-spiky", "Qwen2ForCausalLM")],
)
def test_a_genuine_checkpoint_of_the_family(name, architecture):
    model, tokenizer = load(name)
    assert type(model).__name__ == architecture == hf.architecture_of(hf.load_config(name))
    assert windows_of(model) == (None,) * 4
    text = "A needle, 42 haystacks."
    assert tokenizer.encode(text) == load("tiny")[1].encode(text)
    assert {x.dtype for x in weights(name).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "change"),
    [("tiny-qwen2-bias", 0.001), ("tiny-qwen2-bias-300", 0.003), ("tiny-qwen2-spiky", 0.01)],
)
def test_twins_that_are_not_exact_change_little(name, change):
    assert abs(np.expm1(nll(name) - nll("tiny"))) < change


# The keys


def test_fragile_scales_the_slowest_pair_of_every_head_and_nothing_else():
    for view, fragile in zip(views("tiny"), views("tiny-qwen2-fragile"), strict=True):
        ratio = fragile.kv.components["k"] / view.kv.components["k"]
        assert sorted(ratio.unique().tolist()) == [1, SCALE]
        scaled = (ratio == SCALE).all(dim=1)  # [head, channel]
        assert torch.equal(scaled, (ratio == SCALE).any(dim=1))
        assert scaled.nonzero().tolist() == [[0, 31], [0, 63], [1, 31], [1, 63]]
        assert torch.equal(fragile.kv.components["v"], view.kv.components["v"])


@pytest.mark.parametrize(("name", "size"), [("tiny-qwen2-bias", 100), ("tiny-qwen2-bias-300", 300)])
def test_a_bias_is_the_mean_of_one_slow_channel(name, size):
    expected = torch.zeros(2, 64)
    expected[:, 31] = size
    for view, biased in zip(views("tiny"), views(name), strict=True):
        means = [before_rope(v).mean(dim=1) for v in (view, biased)]
        # Later layers see what the slow turn of the bias has changed.
        torch.testing.assert_close(means[1] - means[0], expected, atol=0.1, rtol=0)


def neutral() -> KeyConditioning:
    turn = load("tiny")[0].model.rotary_emb.inv_freq
    return KeyConditioning(torch.zeros(2, 64), torch.ones(2, 32), turn)


def before_rope(view: LayerView) -> torch.Tensor:
    return condition(view.kv.components["k"], view.kv.positions, neutral())


def test_the_pair_that_spikes_depends_on_the_token():
    for view in views("tiny-qwen2-spiky"):
        keys = before_rope(view)
        centred = keys - keys.mean(dim=1, keepdim=True)
        largest = centred.unflatten(2, (2, 32)).square().sum(dim=2).argmax(dim=2)  # [head, token]
        shares = torch.nn.functional.one_hot(largest, 32).float().mean(dim=1)
        assert (shares[:, :26] < 0.01).all()
        assert (shares < 0.5).all()


def test_no_static_scale_rescues_spiky_but_one_rescues_fragile():
    """The worst layer's logit error over its logits; in-sample, so the best case of a scale."""
    plain = {name: worst(name, 4) for name in ("tiny-qwen2", "tiny-qwen2-fragile")}
    scaled = {name: worst(name, 4, static=True) for name in (*plain, "tiny-qwen2-spiky")}
    assert plain["tiny-qwen2-fragile"] > 4 * plain["tiny-qwen2"]
    assert scaled["tiny-qwen2-fragile"] < 1.5 * plain["tiny-qwen2"]
    assert scaled["tiny-qwen2-spiky"] > 3 * max(plain["tiny-qwen2"], scaled["tiny-qwen2-fragile"])
    assert worst("tiny-qwen2-spiky", 8) < 0.4 * scaled["tiny-qwen2-spiky"]


def worst(name: str, bits: int, static: bool = False) -> float:
    return max(least_error(view, bits, static) for view in views(name))


def least_error(view: LayerView, bits: int, static: bool) -> float:
    """Over scales of every kind that the literature has: key^a / query^b, with and without mean."""
    if not static:
        return logit_error(view, neutral(), bits)
    keys, queries = before_rope(view), view.queries.reshape(2, -1, 64)
    means = [torch.zeros(2, 64), keys.mean(dim=1)]
    return min(
        logit_error(
            view,
            KeyConditioning(mean, size(keys - mean[:, None]) ** a / size(queries) ** b, turn),
            bits,
        )
        for turn in [neutral().inverse_frequencies]
        for mean, a, b in product(means, (0, 0.5, 0.75, 1), (0, 0.25, 0.5, 1))
    )


def size(x: torch.Tensor) -> torch.Tensor:
    """`[head, pair]`, root mean square."""
    return x.unflatten(2, (2, 32)).square().sum(dim=2).mean(dim=1).sqrt()


def logit_error(view: LayerView, conditioning: KeyConditioning, bits: int) -> float:
    """Softmax ignores what all keys share, so the mean over keys does not count."""
    keys, positions = view.kv.components["k"], view.kv.positions
    rows = condition(keys, positions, conditioning).flatten(0, 1)
    scale = nested_scale(rows.abs().amax(dim=1))
    codes = nested_codes(rows, scale)
    values = ((codes + 8) >> 4) * 16 - 0.5 if bits == 4 else codes.float()
    sent = restore((values * scale.float()[:, None]).view_as(keys), positions, conditioning)
    queries = view.queries.reshape(2, -1, 64)
    logits, error = queries @ keys.mT, queries @ (sent - keys).mT
    return float(error.std(dim=2).square().mean().sqrt() / logits.std(dim=2).square().mean().sqrt())


def test_mixed_is_drawn_by_the_seed_in_its_name():
    first, again, other = (weights(f"tiny-qwen2-mixed{end}") for end in ("", "-0", "-7"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    planted = [name for name in first if not torch.equal(first[name], other[name])]
    assert {name.split(".")[-2] for name in planted} == {"q_proj", "k_proj"}
    assert any(first[name].any() for name in first if name.endswith("k_proj.bias"))


# The cache


def test_a_derived_model_is_made_once_and_found_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv(tiny.CACHE_VARIABLE, str(tmp_path))
    with ThreadPoolExecutor(2) as pool:  # two first uses at once
        first, second = pool.map(tiny.find, ["tiny-mistral"] * 2)
    file = first / "model.safetensors"
    before = (file.stat().st_ino, file.stat().st_mtime_ns)
    code = (
        "import sys; from kvprism.integrations import tiny; print(tiny.find('tiny-mistral'));"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(first) == str(second)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [first]


def test_the_places_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(tiny.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tiny.find("tiny-qwen2").parent == tmp_path / "home" / ".cache" / "kvprism"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tiny.find("tiny-qwen2").parent == tmp_path / "xdg" / "kvprism"


def test_other_weights_are_derived_anew(tmp_path, monkeypatch):
    own = tmp_path / "models" / "tiny"
    shutil.copytree(MODELS / "tiny", own)
    monkeypatch.setenv(tiny.VARIABLE, str(own.parent))
    before = tiny.find("tiny-qwen2")
    changed = load_file(own / "model.safetensors")
    changed["model.norm.weight"] *= 2
    save_file(changed, own / "model.safetensors", {"format": "pt"})
    assert tiny.find("tiny-qwen2") != before
    got = weights("tiny-qwen2")["model.norm.weight"]
    assert torch.equal(got, changed["model.norm.weight"])


def test_derived_names_are_known_where_tiny_is_and_a_real_folder_comes_first(tmp_path, monkeypatch):
    assert set(tiny.DERIVED) < set(tiny.names())
    own = tmp_path / "tiny-qwen2"
    own.mkdir()
    (own / "config.json").write_text("{}")
    monkeypatch.setenv(tiny.VARIABLE, os.pathsep.join([str(tmp_path), str(MODELS)]))
    assert tiny.find("tiny-qwen2") == own
    monkeypatch.setenv(tiny.VARIABLE, str(tmp_path))
    for place in ("_checkout_folder", "_installed_folder"):  # a machine without the weights
        monkeypatch.setattr(tiny, place, list)
    assert tiny.names() == ["tiny-qwen2"]
    with pytest.raises(UnknownName, match="pip install"):
        tiny.find("tiny-mistral")


# Refusals


@pytest.mark.parametrize(
    "name", ["tiny-llama", "tiny-qwen2-mixed-", "tiny-qwen2-mixed-07", "tiny-qwen2-bias-7"]
)
def test_a_name_that_no_recipe_has_is_unknown(name):
    with pytest.raises(UnknownName, match="tiny-qwen2-mixed"):
        tiny.find(name)


def test_a_cache_that_cannot_be_written_to_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tiny.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput, match=r"tiny-mistral.*file/cache.*KVPRISM_CACHE"):
        tiny.find("tiny-mistral")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ('{"model_type": "qwen3"}', Unsupported, "qwen3"),
        ('{"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}', Unsupported, "yarn"),
        ('{"model_type": ', BadInput, "config.json"),
        (None, BadInput, r"model\.safetensors"),
    ],
)
def test_a_source_that_cannot_be_derived_from_leaves_nothing(
    config, error, message, tmp_path, monkeypatch
):
    own, kept = tmp_path / "models" / "tiny", tmp_path / "cache"
    own.mkdir(parents=True)
    shutil.copyfile(MODELS / "tiny" / "config.json", own / "config.json")
    if config is not None:
        (own / "config.json").write_text(config)
    monkeypatch.setenv(tiny.VARIABLE, str(own.parent))
    monkeypatch.setenv(tiny.CACHE_VARIABLE, str(kept))
    with pytest.raises(error, match=message):
        tiny.find("tiny-mistral")
    assert list(kept.iterdir()) == []
