"""The model families whose caches kvprism carries: what their layers hold, what makes two alike.

Everything here is read from the configuration; no weights are needed.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvprism.core import KVShape
from kvprism.errors import BadInput, Unsupported

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"
FINGERPRINT_TAG = "kvprism.kv-fingerprint/1"
# Two tokenizers that agree on the vocabulary may still cut text differently: this text tells.
TOKENIZER_PROBE = "The  quick brown fox: Naïve café № 42, 1234 don't\n\tif (x != 3.1) y(); 你好 🙂"


def architecture_of(config_or_model: PreTrainedConfig | PreTrainedModel) -> str:
    """The architecture's class name, once it is sure that its cache is one kvprism can carry.

    Raises:
        Unsupported: another architecture, attention that is not causal, or a layer with anything
            but full or sliding-window attention.
    """
    config = config_of(config_or_model)
    name = (config.architectures or [ARCHITECTURES.get(config.model_type, config.model_type)])[0]
    if isinstance(config_or_model, PreTrainedModel):
        name = type(config_or_model).__name__
    if name not in ARCHITECTURES.values():
        supported = ", ".join(ARCHITECTURES.values())
        raise Unsupported(f"architecture {name!r} is not supported; supported: {supported}")
    if getattr(config, "is_heterogeneous", False):
        raise Unsupported(f"{name} with settings that differ from layer to layer is not supported")
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if bidirectional or not getattr(config, "is_causal", True):
        raise Unsupported(f"{name} with attention to later tokens is not supported")
    _check_layers(str(name), config)
    return str(name)


def _check_layers(name: str, config: Any) -> None:
    """Refuse layers in which the model's own code would not do what its configuration says."""
    window, kinds = getattr(config, "sliding_window", None), _kinds(config)
    built = [FULL, SLIDING]
    if name == "LlamaForCausalLM":
        built = [FULL]
    if name == "MistralForCausalLM":  # one mask for all layers, whatever `layer_types` says
        built = [FULL if window is None else SLIDING]
    for layer_id, kind in enumerate(kinds):
        if kind not in built:
            raise Unsupported(
                f"layer {layer_id} of this {name} is of type {kind!r} (sliding window: {window}); "
                f"only {' and '.join(built)} can be carried here"
            )
        # A window of 1 leaves nothing to cache, and transformers' own cache then keeps everything.
        if kind == SLIDING and not (isinstance(window, int) and window > 1):
            raise Unsupported(
                f"layer {layer_id} of this {name} has a sliding window of {window} tokens; at "
                "least 2 are needed"
            )


def _kinds(config: Any) -> list[str]:
    """The attention of every layer, as transformers' own cache reads the configuration."""
    unset = FULL if getattr(config, "sliding_window", None) is None else SLIDING
    return list(getattr(config, "layer_types", None) or [unset] * config.num_hidden_layers)


def windows_of(config_or_model: PreTrainedConfig | PreTrainedModel) -> tuple[int | None, ...]:
    """Each layer's sliding window: a query sees so many tokens, itself included; None: all before.

    Raises:
        Unsupported: see `architecture_of`.
    """
    architecture_of(config_or_model)
    config = config_of(config_or_model)
    return tuple(config.sliding_window if kind == SLIDING else None for kind in _kinds(config))


def first_visible(window: int | None, position: int) -> int:
    """The first position that a query at `position` can see; a cache holds none before it."""
    return 0 if window is None else max(0, position - window + 1)


def softcap_of(config_or_model: PreTrainedConfig | PreTrainedModel) -> float | None:
    """The soft cap on attention logits, if the model has one."""
    softcap: float | None = getattr(config_of(config_or_model), "attn_logit_softcapping", None)
    return softcap


def shape_of(
    config_or_model: PreTrainedConfig | PreTrainedModel, n_tokens: int, dtype: str = "bfloat16"
) -> KVShape:
    """The cache that `n_tokens` would make: a layer with a window holds the last window - 1.

    Raises:
        Unsupported: see `architecture_of`.
        BadInput: no token, or more than the model has positions for.
    """
    windows, config = windows_of(config_or_model), config_of(config_or_model)
    check_length(config, n_tokens)
    dense = KVShape.dense(
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        channels=channels_of(config),
        tokens=n_tokens,
        dtype=dtype,
    )
    starts = [first_visible(window, n_tokens) for window in windows]
    return KVShape(
        tuple(
            replace(layer, token_range=(start, n_tokens))
            for layer, start in zip(dense.layers, starts, strict=True)
        )
    )


def fingerprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter: str = "",
    weights: str = "",
) -> bytes:
    """32 bytes that two workers must share before one may continue on the other's cache.

    SHA-256 over tagged, length-prefixed fields: architecture, layer shapes, RoPE parameters,
    tokenizer, the operator's own ids of the adapter and of the weights, and, where the model has
    them, sliding windows, soft cap and query scale. Compatibility, not proof of the weights;
    independent of the dtype, because the two ends choose theirs apart.

    Raises:
        Unsupported: see `architecture_of`.
    """
    architecture, config = architecture_of(model), config_of(model)
    fields = {
        "architecture": architecture,
        "layers": [config.num_hidden_layers, config.num_key_value_heads, channels_of(config)],
        "rope": _floats(_rope_of(config)),
        "tokenizer": None if tokenizer is None else _describe_tokenizer(tokenizer),
        "adapter": adapter,
        "weights": weights,
        **_attention_fields(config),
    }
    digest = hashlib.sha256(FINGERPRINT_TAG.encode())
    for tag, value in fields.items():
        for part in (tag.encode(), json.dumps(value, sort_keys=True).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _rope_of(config: Any) -> dict[str, Any]:
    rope = {key: value for key, value in config.rope_parameters.items() if value is not None}
    if rope.get("rope_type", "default") != "default":  # the scaled types derive from it
        rope["max_position_embeddings"] = config.max_position_embeddings
    return rope


def _attention_fields(config: Any) -> dict[str, Any]:
    """What plain attention does not have; a model without it has no such field."""
    windows = windows_of(config)
    fields = {
        "windows": windows if any(windows) else None,
        "softcap": softcap_of(config),
        "query_scalar": getattr(config, "query_pre_attn_scalar", None),
    }
    return {tag: _floats(value) for tag, value in fields.items() if value is not None}


def _floats(value: Any) -> Any:
    """Every number as a float: 500000 and 500000.0 are one theta."""
    return json.loads(json.dumps(value), parse_int=float)


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    probe = tokenizer.encode(TOKENIZER_PROBE, truncation=False, padding=False)
    return [sorted(tokenizer.get_vocab().items()), probe]


def config_of(config_or_model: PreTrainedConfig | PreTrainedModel) -> Any:
    if isinstance(config_or_model, PreTrainedModel):
        return config_or_model.config
    return config_or_model


def channels_of(config: Any) -> int:
    """Channels per head."""
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def check_length(config: Any, n_tokens: int) -> None:
    """Raises `BadInput` unless the model has positions for so many tokens."""
    if not 1 <= n_tokens <= config.max_position_embeddings:
        raise BadInput(
            f"{n_tokens} tokens: this model takes 1 to {config.max_position_embeddings} "
            "(max_position_embeddings in its config.json)"
        )
