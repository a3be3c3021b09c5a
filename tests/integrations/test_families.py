"""Which models are supported, the shapes of their caches, the fingerprints that set them apart."""

import json
import shutil

import pytest
import torch
import transformers
from configs import CONFIGS, FULL, LLAMA_3_1, SLIDING, WINDOW
from samples import N_PROMPT, tokens
from transformers import AutoModelForCausalLM

from kvprism.errors import Unsupported
from kvprism.integrations import hf

# Refusals

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_other_architectures_are_refused_by_name(tmp_path):
    gemma = transformers.GemmaConfig(**SMALL, num_key_value_heads=1, intermediate_size=16)
    gpt2 = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    for config, architecture in ((gemma, "GemmaForCausalLM"), (gpt2, "GPT2LMHeadModel")):
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(tmp_path / architecture)
        refusal = f"{architecture}.*LlamaForCausalLM, MistralForCausalLM.*Gemma2ForCausalLM"
        with pytest.raises(Unsupported, match=refusal):
            hf.load(str(tmp_path / architecture))
        with pytest.raises(Unsupported, match=refusal):
            hf.capture(model, torch.tensor([1, 2]))
        with pytest.raises(Unsupported, match=refusal):
            hf.fingerprint(model)
    unnamed = transformers.GemmaConfig(**SMALL)
    with pytest.raises(Unsupported, match="'gemma'"):
        hf.shape_of(unnamed, 5)


def altered(name, **settings):
    """A configuration with settings that its class would not take, as an edited file may hold."""
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict())
    for key, value in settings.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # Its code has no window, its cache would.
        (altered("llama", sliding_window=16), "layer 0 of this Llama.*window: 16.*only full"),
        # One mask serves all of its layers.
        (
            altered("mistral", layer_types=["full_attention"] * 2 + ["sliding_attention"]),
            r"layer 2 of this Mistral.*'sliding_attention' \(sliding window: None\); only full_att",
        ),
        (
            altered("mistral-sliding", layer_types=["sliding_attention"] * 2 + ["full_attention"]),
            r"layer 2 of this Mistral.*'full_attention' \(sliding window: 24\); only sliding_att",
        ),
        (
            altered("qwen3", layer_types=["full_attention", "chunked_attention", "full_attention"]),
            "layer 1 of this Qwen3.*'chunked_attention'.*only full_attention and sliding_attention",
        ),
        (altered("qwen2-sliding", sliding_window=None), "layer 1 of this Qwen2.*window of None"),
        (altered("gemma2", sliding_window=1), "layer 0 of this Gemma2.*window of 1 tokens; at le"),
        (altered("gemma2", use_bidirectional_attention=True), "Gemma2.*attention to later tokens"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_carried_is_refused_by_name(config, message):
    with pytest.raises(Unsupported, match=message):
        hf.shape_of(config, 5)


def test_attention_without_the_models_soft_cap_is_refused(checkpoints):
    model, _ = hf.load(checkpoints["gemma2"])
    assert model.config._attn_implementation == "eager"
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        pytest.skip("this version of transformers refuses sdpa for Gemma-2 itself")
    with pytest.raises(Unsupported, match=r"'sdpa' is not supported for .* soft cap of 4.0.*eager"):
        hf.capture(model, tokens(5))


# Shapes


def test_the_shape_from_the_configuration_is_the_shape_of_the_capture(checkpoints, name):
    model, _ = hf.load(checkpoints[name], torch.bfloat16)
    for n in (1, WINDOW - 1, WINDOW, N_PROMPT):
        kv, _ = hf.capture(model, tokens(n))
        assert hf.shape_of(model.config, n) == hf.shape_of(model, n) == kv.shape()
        assert kv.next_position == kv.shape().next_position == n


def test_a_window_shortens_its_own_layers_only():
    last, full = (N_PROMPT - WINDOW + 1, N_PROMPT), (0, N_PROMPT)
    expected = {
        "mistral": [full, full, full],
        "mistral-sliding": [last, last, last],
        "qwen2-sliding": [full, last, last],
        "gemma2": [last, full, last],
    }
    for name, ranges in expected.items():
        shape = hf.shape_of(CONFIGS[name], N_PROMPT)
        assert [layer.token_range for layer in shape.layers] == ranges


# Fingerprints

# So they depend on no process, hash seed or library version: two ends compare them as bytes.
GOLDEN = {
    "tiny": "423563a44a08d2ecba6ba1929bd6c1830b6d7ee9535af37e81222de644faf637",
    "llama": "a28224c46cc7ef8f999817394662aa8356dc207efaf67de12cccf9086cdc4672",
    "llama-3.1": "ee0217c228f139cc93a392abf7cc35896f64a403d6e52e8b743a35af5d4bba35",
    "mistral": "942ec2ba14ea2b76a45c490cffd97d986197f0efdc6e2e707477dd6ff66fd5e8",
    "qwen2": "684a4fa4ac535fb221a883655df633844b685a580958c15f9252108a83bc98cc",
    "qwen3": "69ddc0c50898cfa47c82034d7990cd5df4101a546b90d97ca161421eb7475c1c",
    "mistral-sliding": "39c9e3088768ef9f9d9640ab6b91e6aff83526c5ec715e99e4d653b01ca66aa8",
    "qwen2-sliding": "f6af34ff919d98e58e24d92ce2e6df3e77716f2a0cd6eddf8aad63c2b007e900",
    "gemma2": "d4aa43926de2cd35300c4ea7f1991ed1171e0e0b8a67ee995215a8cb0272f83f",
}


def test_the_fingerprint_never_changes(checkpoints, name):
    assert hf.fingerprint(*hf.load(checkpoints[name])).hex() == GOLDEN[name]


# As their authors published them, before transformers 5 wrote `rope_parameters` and `layer_types`.
PUBLISHED = {
    "llama-3.1": {
        "rope_theta": LLAMA_3_1["rope_theta"],
        "rope_scaling": {key: value for key, value in LLAMA_3_1.items() if key != "rope_theta"},
    },
    "mistral": {"rope_theta": 10000.0, "sliding_window": None},
    "mistral-sliding": {"rope_theta": 10000.0, "sliding_window": WINDOW},
    "qwen2": {
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 28,
    },
    "gemma2": {"rope_theta": 10000.0, "cache_implementation": "hybrid", "hidden_act": "gelu"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_in_its_published_form_is_the_same_model(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints[name], tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "dtype"):
        config.pop(key, None)
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.44.0", **PUBLISHED[name]}
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = hf.load(str(folder))
    assert hf.fingerprint(model, tokenizer).hex() == GOLDEN[name]
    assert hf.shape_of(hf.load_config(str(folder)), N_PROMPT) == hf.shape_of(
        CONFIGS[name], N_PROMPT
    )
    prompt, options = tokens(N_PROMPT), {"max_new_tokens": 3, "do_sample": False}
    want = hf.load(checkpoints[name])[0].generate(prompt, **options)
    cache = hf.restore(model, hf.capture(model, prompt[:, :-1])[0])
    assert torch.equal(model.generate(prompt, **cache.kwargs, **options), want)


def test_the_fingerprint_knows_what_a_cache_depends_on_and_nothing_else(checkpoints):
    model, tokenizer = hf.load(checkpoints["llama"])
    same, again = hf.load(checkpoints["llama"], torch.bfloat16)
    known = hf.fingerprint(model, tokenizer)
    assert len(known) == 32
    again("cut me short", truncation=True, max_length=2)
    assert hf.fingerprint(same, again) == known
    tokenizer.add_tokens(["kvprism"])
    others = [hf.fingerprint(model, tokenizer), hf.fingerprint(model)]
    others += [hf.fingerprint(same, again, weights="v2"), hf.fingerprint(same, again, adapter="v2")]
    same.config.rope_parameters["rope_theta"] *= 2
    others.append(hf.fingerprint(same, again))
    others.append(hf.fingerprint(hf.load(checkpoints["qwen3"])[0], again))
    assert len({known, *others}) == 7


def fingerprints(name, *settings):
    """Of the family's own configuration, and of one with each of the settings."""
    configs = [CONFIGS[name], *(altered(name, **setting) for setting in settings)]
    return [hf.fingerprint(AutoModelForCausalLM.from_config(config)) for config in configs]


def test_the_families_and_their_windows_have_fingerprints_of_their_own():
    assert len({fingerprints(name)[0] for name in FULL + SLIDING}) == len(FULL + SLIDING)


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen2-sliding", "gemma2"])
def test_another_window_is_another_fingerprint(name):
    assert len(set(fingerprints(name, {"sliding_window": 32}, {"sliding_window": 33}))) == 3


def test_every_setting_of_gemmas_attention_is_in_its_fingerprint():
    settings = [
        {"attn_logit_softcapping": 5.0},
        {"attn_logit_softcapping": None},
        {"query_pre_attn_scalar": 16},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"] * 3},
    ]
    assert len(set(fingerprints("gemma2", *settings))) == 6
    # The cap on the final logits changes no cache.
    assert len(set(fingerprints("gemma2", {"final_logit_softcapping": 9.0}))) == 1


def test_every_setting_of_the_rope_scaling_is_in_the_fingerprint():
    rope = CONFIGS["llama-3.1"].rope_parameters
    numbers = [key for key, value in rope.items() if isinstance(value, int | float)]
    assert len(numbers) == 5
    settings = [{"rope_parameters": rope | {key: rope[key] * 2}} for key in numbers]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}}
    assert len(set(fingerprints("llama-3.1", *settings, plain))) == 7
