"""Capture, what is refused, and loading, on real transformers models."""

import json

import pytest
import recompute
import torch
from samples import N_PROMPT, tokens

from kvprism.errors import BadInput, ShapeMismatch, Unsupported
from kvprism.integrations import hf
from kvprism.integrations.restored import CACHE
from kvprism.tensors import LayerKV, RequestKV

# Capture


@pytest.mark.parametrize("window", [1, 32, 1000])
def test_captured_queries_keys_and_values_equal_an_independent_computation(model, window):
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0][0]))
        for i, layer in enumerate(model.model.layers)
    ]
    kv, views = hf.capture(model, tokens(N_PROMPT)[0], window=window)
    for hook in hooks:
        hook.remove()
    assert kv.next_position == N_PROMPT and len(views) == len(inputs)
    for i, (layer, view) in enumerate(zip(kv.layers, views, strict=True)):
        expected = recompute.queries_keys_values(model, model.model.layers[i], inputs[i])
        got = (view.queries, layer.components["k"], layer.components["v"])
        sliding = recompute.windows(model)[i]
        held = N_PROMPT if sliding is None else sliding - 1  # what the next position can see
        assert view.kv is layer
        assert layer.positions.tolist() == list(range(N_PROMPT - held, N_PROMPT))
        assert view.softmax_scale == recompute.softmax_scale(model)
        assert view.softcap == getattr(model.config, "attn_logit_softcapping", None)
        assert view.queries.shape[1] == min(window, held)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y[:, -x.shape[1] :], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_each_layer_is_told_of_in_order_and_is_the_one_that_is_returned(model, dtype):
    expected = hf.capture(model, tokens(N_PROMPT), cache_dtype=dtype)
    told, seen = [], []

    def on_layer(view):
        told.append(view)
        seen.append({name: x.clone() for name, x in view.kv.components.items()})

    kv, views = hf.capture(model, tokens(N_PROMPT), cache_dtype=dtype, on_layer=on_layer)
    assert told == list(views) and [view.kv for view in views] == list(kv.layers)
    for mine, alone, early in zip(views, expected[1], seen, strict=True):
        assert torch.equal(mine.queries, alone.queries)
        assert torch.equal(mine.kv.positions, alone.kv.positions)
        for name, x in alone.kv.components.items():
            # Already what it stays: nothing of the later layers changes what has left.
            assert torch.equal(early[name], x) and torch.equal(mine.kv.components[name], x)


def test_what_a_layers_listener_raises_ends_the_prefill(llama):
    told = []

    def refuse(view):
        told.append(view.kv.layer_id)
        raise BadInput("enough")

    with pytest.raises(BadInput, match="enough"):
        hf.capture(llama, tokens(N_PROMPT), on_layer=refuse)
    assert told == [0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_prefill_ends_with_the_last_layers_keys_and_keeps_what_a_whole_one_does(
    model, attention, dtype
):
    model.set_attn_implementation(attention)
    ran = []
    modules = [*(layer.mlp for layer in model.model.layers), model.model.norm, model.lm_head]
    hooks = [m.register_forward_hook(lambda *_, m=m: ran.append(m)) for m in modules]
    kv, _ = hf.capture(model, tokens(N_PROMPT), cache_dtype=dtype)
    assert ran == modules[:-3]  # neither the last MLP, nor the norm, nor the head
    for hook in hooks:
        hook.remove()
    out = model(tokens(N_PROMPT), use_cache=True)  # a whole call, through transformers alone
    for mine, whole in zip(kv.layers, getattr(out, CACHE).layers, strict=True):
        for name, x in (("k", whole.keys[0]), ("v", whole.values[0])):
            end = x[:, -len(mine.positions) :]
            assert torch.equal(mine.components[name], end.to(dtype or x.dtype))


def test_capturing_twice_gives_the_same_bits(llama):
    first, second = hf.capture(llama, tokens(N_PROMPT)), hf.capture(llama, tokens(N_PROMPT))
    for x, y in zip(first[0].layers, second[0].layers, strict=True):
        assert all(torch.equal(x.components[c], y.components[c]) for c in "kv")
    for x, y in zip(first[1], second[1], strict=True):
        assert torch.equal(x.queries, y.queries)


def test_the_cache_precision_of_the_prefill_side_is_a_choice_of_its_own(llama):
    own, _ = hf.capture(llama, tokens(N_PROMPT))
    half, views = hf.capture(llama, tokens(N_PROMPT), cache_dtype=torch.bfloat16)
    assert views[0].kv is half.layers[0] and views[0].queries.dtype == torch.float32
    for x, y in zip(own.layers, half.layers, strict=True):
        assert all(torch.equal(x.components[c].bfloat16(), y.components[c]) for c in "kv")
    cache = hf.restore(llama, half)
    assert cache.layers[0].keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "0 tokens: this model takes 1 to 256"),
        (torch.zeros(257, dtype=torch.int64), "257 tokens: this model takes 1 to 256"),
        (torch.tensor([5, 2048]), r"must be in \[0, 2048\), got 5 to 2048"),
        (torch.tensor([-1, 7]), "got -1 to 7"),
        (torch.tensor([1.0, 2.0]), "must be int64"),
        (torch.zeros(2, 3, dtype=torch.int64), r"got torch.int64 \[2, 3\]"),
    ],
)
def test_ids_that_the_model_cannot_take_are_refused(llama, ids, message):
    with pytest.raises(BadInput, match=message):
        hf.capture(llama, ids)


def test_a_window_of_nothing_and_a_model_in_training_are_refused(llama):
    with pytest.raises(BadInput, match="window"):
        hf.capture(llama, tokens(5), window=0)
    with pytest.raises(BadInput, match="eval"):
        hf.capture(llama.train(), tokens(5))


# Refusals


def test_a_cache_of_another_shape_is_refused(llama, checkpoints):
    kv, _ = hf.capture(llama, tokens(10))
    with pytest.raises(ShapeMismatch, match=r"layers 0 to 2.*got \[0, 1\]"):
        hf.restore(llama, RequestKV(kv.layers[:2], 10))
    layer = kv.layers[1]
    one_head = LayerKV(1, {c: x[:1] for c, x in layer.components.items()}, layer.positions)
    with pytest.raises(ShapeMismatch, match="layer 1"):
        hf.restore(llama, RequestKV((kv.layers[0], one_head, kv.layers[2]), 10))
    only_keys = LayerKV(1, {"k": layer.components["k"]}, layer.positions)
    with pytest.raises(ShapeMismatch, match="layer 1"):
        hf.restore(llama, RequestKV((kv.layers[0], only_keys, kv.layers[2]), 10))
    with pytest.raises(ShapeMismatch, match="layer 0"):
        hf.restore(hf.load(checkpoints["qwen3"])[0], kv)


def test_a_next_position_beyond_the_model_is_refused(llama):
    kv, _ = hf.capture(llama, tokens(10))
    with pytest.raises(BadInput, match=r"257 tokens.*256"):
        hf.restore(llama, RequestKV(kv.layers, 257))


def test_an_attention_implementation_that_cannot_be_wrapped_is_refused(llama):
    llama.set_attn_implementation("flex_attention")
    with pytest.raises(Unsupported, match=r"flex_attention.*sdpa"):
        hf.capture(llama, tokens(5))


# RoPE


def test_rope_frequencies_are_those_that_turned_the_keys(model):
    found = hf.rope_frequencies(model)
    layer = model.model.layers[0].self_attn
    expected = recompute.frequencies(model.config.rope_parameters, layer.head_dim // 2)
    assert found.dtype == torch.float32
    # theta to the power of -i / half and Llama 3.1's blend: a dozen float32 roundings.
    torch.testing.assert_close(found, expected.float(), rtol=12 * 2**-24, atol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_follow_the_length_are_refused(llama, rope):
    config = llama.config.from_dict(
        llama.config.to_dict() | {"rope_parameters": rope | {"rope_theta": 10000.0}}
    )
    with pytest.raises(Unsupported, match=f"'{rope['rope_type']}'.*length of the prompt"):
        hf.rope_frequencies(type(llama)(config))


def test_frequencies_of_a_part_of_the_channels_or_of_some_layers_are_refused(llama):
    rotary = llama.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[:6]
    with pytest.raises(Unsupported, match="over 12 of 16 channels"):
        hf.rope_frequencies(llama)
    rotary.rope_type = {"full_attention": "default", "sliding_attention": "linear"}
    with pytest.raises(Unsupported, match="one for all layers"):
        hf.rope_frequencies(llama)


# Loading


def test_loading_opens_no_connection(checkpoints, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    model, tokenizer = hf.load(checkpoints["qwen3"], torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer.encode(" 42")) == " 42"


def test_an_unknown_name_says_the_way_out():
    with pytest.raises(BadInput, match=r"'no-such-model'.*tiny.*checkpoint.*pip install"):
        hf.load("no-such-model")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_checkpoint_is_refused(checkpoints, tmp_path, missing):
    for file in hf.Path(checkpoints["llama"]).iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match=f"cannot load '{tmp_path}'"):
        hf.load(str(tmp_path))


def test_damaged_or_absent_weights_are_refused(checkpoints, tmp_path):
    for file in hf.Path(checkpoints["llama"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(BadInput, match="cannot load"):
        hf.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(BadInput, match=r"no weights for \['model.layers.3"):
        hf.load(str(tmp_path))


# A trained model


def test_tiny_answers_a_needle_after_capture_and_restore():
    model, tokenizer = hf.load("tiny")
    hay = " The river runs past the old town and the road goes up the hill to the north ." * 60
    ids = tokenizer.encode(hay)
    needle = tokenizer.encode(" The secret number of Lisbon is 57604 .")
    context = torch.tensor([[tokenizer.bos_token_id, *ids[:400], *needle, *ids[400:1000]]])
    question = torch.tensor([tokenizer.encode(" \n The secret number of Lisbon is")])
    kv, _ = hf.capture(model, context)
    whole = torch.cat([context, question], dim=1)
    out = model.generate(whole, **hf.restore(model, kv).kwargs, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(out[0, whole.shape[1] :]) == " 57604"
