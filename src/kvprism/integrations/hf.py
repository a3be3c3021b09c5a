"""transformers models at both ends: capture K/V and queries on prefill, restore them and go on.

Nothing is monkey-patched. `wrap_attention` registers a function around the attention that the model
already uses, with the same mask function, and selects it. The function does two things and passes
everything else through, so that any other call of the model stays bit-identical:

- a recorder that comes down as an extra keyword of the forward call sees each layer's queries;
- keys that come from a restored layer say so, and attend through that layer's columns of the mask.

The mask is shared by all layers and is made for the *true* length, because a restored cache answers
with the true next position when it is asked for its length. A layer that lost tokens holds fewer
keys than the mask has columns: the columns of the positions that it still holds are its own mask.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from kvprism.core import KVShape
from kvprism.errors import BadInput, PositionMismatch, ShapeMismatch, Unsupported
from kvprism.integrations import tiny
from kvprism.tensors import LayerKV, LayerView, RequestKV

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ATTENTIONS = ("sdpa", "eager")
PREFIX = "kvprism_"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
FINGERPRINT_TAG = "kvprism.kv-fingerprint/1"
# Two tokenizers that agree on the vocabulary may still cut text differently: this text tells.
TOKENIZER_PROBE = "The  quick brown fox: Naïve café № 42, 1234 don't\n\tif (x != 3.1) y(); 你好 🙂"


def load(
    name_or_path: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A built-in model by name, or a local checkpoint directory, with its tokenizer; no network.

    Raises:
        UnknownName: neither a built-in name nor a directory.
        BadInput: the directory holds no complete safetensors checkpoint with a tokenizer.
        Unsupported: the architecture is not built here.
    """
    path = _locate(name_or_path)
    auto_model: Any = AutoModelForCausalLM
    with _reading(path):
        architecture_of(AutoConfig.from_pretrained(path, **LOCAL))
        tokenizer = AutoTokenizer.from_pretrained(path, **LOCAL)
        with _no_progress_bar():
            model, report = auto_model.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL
            )
    # transformers fills absent weights with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise BadInput(f"cannot load {str(path)!r}: there are no weights for {missing}")
    return model, tokenizer


def load_config(name_or_path: str) -> Any:
    """A supported model's configuration alone; errors as in `load`."""
    path = _locate(name_or_path)
    with _reading(path):
        config = AutoConfig.from_pretrained(path, **LOCAL)
    architecture_of(config)
    return config


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; errors as in `load`."""
    path = _locate(name_or_path)
    with _reading(path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **LOCAL)
    return tokenizer


def _locate(name_or_path: str) -> Path:
    path = Path(name_or_path)
    return tiny.find(name_or_path) if name_or_path in tiny.names() or not path.is_dir() else path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise BadInput(
            f"cannot load {str(path)!r}, which must hold config.json, safetensors weights and a "
            f"tokenizer: {str(error).strip().partition(chr(10))[0]}"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The command line shows its own progress."""
    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def architecture_of(config_or_model: PreTrainedConfig | PreTrainedModel) -> str:
    """The architecture's class name, once it is sure that its cache is one kvprism can carry.

    Raises:
        Unsupported: another architecture, or a layer with anything but full dense attention.
    """
    config = _config(config_or_model)
    name = (config.architectures or [ARCHITECTURES.get(config.model_type, config.model_type)])[0]
    if isinstance(config_or_model, PreTrainedModel):
        name = type(config_or_model).__name__
    if name not in ARCHITECTURES.values():
        supported = ", ".join(ARCHITECTURES.values())
        raise Unsupported(f"architecture {name!r} is not supported; supported: {supported}")
    if getattr(config, "is_heterogeneous", False):
        raise Unsupported(f"{name} with settings that differ from layer to layer is not supported")
    window = getattr(config, "sliding_window", None)
    unset = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [unset] * config.num_hidden_layers
    for layer_id, kind in enumerate(kinds):
        if kind != "full_attention":
            raise Unsupported(
                f"layer {layer_id} of this {name} is of type {kind!r} (sliding window: {window}); "
                "only full attention in every layer is supported"
            )
    return str(name)


def shape_of(
    config_or_model: PreTrainedConfig | PreTrainedModel, n_tokens: int, dtype: str = "bfloat16"
) -> KVShape:
    """The cache that `n_tokens` would make, from the configuration alone: no weights are needed.

    Raises:
        Unsupported: see `architecture_of`.
        BadInput: no token, or more than the model has positions for.
    """
    architecture_of(config_or_model)
    config = _config(config_or_model)
    _check_length(config, n_tokens)
    return KVShape.dense(
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        channels=_channels(config),
        tokens=n_tokens,
        dtype=dtype,
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
    tokenizer, and the operator's own ids of the adapter and of the weights. Compatibility, not
    proof of the weights; independent of the dtype, because the two ends choose theirs apart.

    Raises:
        Unsupported: see `architecture_of`.
    """
    architecture, config = architecture_of(model), _config(model)
    rope = {key: value for key, value in config.rope_parameters.items() if value is not None}
    if rope.get("rope_type", "default") != "default":  # the scaled types derive from it
        rope["max_position_embeddings"] = config.max_position_embeddings
    fields = {
        "architecture": architecture,
        "layers": [config.num_hidden_layers, config.num_key_value_heads, _channels(config)],
        "rope": json.loads(json.dumps(rope), parse_int=float),  # 500000 and 500000.0 are one theta
        "tokenizer": None if tokenizer is None else _describe_tokenizer(tokenizer),
        "adapter": adapter,
        "weights": weights,
    }
    digest = hashlib.sha256(FINGERPRINT_TAG.encode())
    for tag, value in fields.items():
        for part in (tag.encode(), json.dumps(value, sort_keys=True).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    probe = tokenizer.encode(TOKENIZER_PROBE, truncation=False, padding=False)
    return [sorted(tokenizer.get_vocab().items()), probe]


def _config(config_or_model: PreTrainedConfig | PreTrainedModel) -> Any:
    if isinstance(config_or_model, PreTrainedModel):
        return config_or_model.config
    return config_or_model


def _channels(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def _check_length(config: Any, n_tokens: int) -> None:
    if not 1 <= n_tokens <= config.max_position_embeddings:
        raise BadInput(
            f"{n_tokens} tokens: this model takes 1 to {config.max_position_embeddings} "
            "(max_position_embeddings in its config.json)"
        )


def wrap_attention(model: PreTrainedModel) -> None:
    """Select attention that can record queries and serve restored caches; once is enough.

    Raises:
        Unsupported: the model uses an attention implementation other than `sdpa` or `eager`.
    """
    name = model.config._attn_implementation
    if name in [PREFIX + known for known in ATTENTIONS]:
        return
    if name not in ATTENTIONS:
        raise Unsupported(
            f"attention implementation {name!r} is not supported; call "
            f"model.set_attn_implementation with one of {list(ATTENTIONS)} first"
        )
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, partial(_attend, name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(PREFIX + name)


def _attend(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kvprism_recorder: "_QueryRecorder | None" = None,
    **kwargs: Any,
) -> Any:
    if kvprism_recorder is not None:
        kvprism_recorder.record(module.layer_idx, query, kwargs)
    layer: RestoredLayer | None = getattr(key, "kvprism_layer", None)
    if layer is not None:
        if module.layer_idx == 0:  # one check, and one wait for the device, per forward call
            layer.check_positions(kwargs.get("position_ids"))
        attention_mask = layer.columns(attention_mask, query.shape[2])
    return _attention(name, module)(module, query, key, value, attention_mask, **kwargs)


def _attention(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """What the model would have called itself: `eager` is each modeling file's own function."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


class _QueryRecorder:
    """Collects one prefill's post-RoPE queries `[q_head, window, channel]`, layer by layer."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.views: dict[int, dict[str, Any]] = {}

    def record(self, layer_id: int, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.views[layer_id] = {
            "queries": query[0, :, -self.window :].clone(),  # a view would keep all queries alive
            "softmax_scale": float(kwargs["scaling"]),
            "softcap": kwargs.get("softcap"),
        }


def capture(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    window: int = 32,
    cache_dtype: torch.dtype | None = None,
) -> tuple[RequestKV, tuple[LayerView, ...]]:
    """Prefill `ids` in one unperturbed call; keep each layer's K/V and the last queries.

    ids: int64 `[token]` or `[1, token]`; window: how many last positions give their post-RoPE
    queries (all of them when the prompt is shorter); cache_dtype: the precision in which the
    prefill side keeps its cache, by default the model's own. Queries stay in the model's.

    Raises:
        BadInput: no ids, ids outside the vocabulary, more than the model has positions for, a
            window below 1, or a model in training mode (dropout would perturb the prefill).
        Unsupported: see `architecture_of` and `wrap_attention`.
    """
    architecture_of(model)
    if window < 1:
        raise BadInput(f"window must be at least 1 position, got {window}")
    if model.training:
        raise BadInput("the model is in training mode, where dropout acts; call model.eval() first")
    ids = _check_ids(model, ids)
    wrap_attention(model)
    recorder = _QueryRecorder(window)
    with torch.no_grad():
        out = model(ids, use_cache=True, logits_to_keep=1, kvprism_recorder=recorder)
    layers = []
    for layer_id, layer in enumerate(out.past_key_values.layers):
        components = {"k": layer.keys[0], "v": layer.values[0]}
        kept = {name: x.to(cache_dtype or x.dtype) for name, x in components.items()}
        layers.append(LayerKV(layer_id, kept, torch.arange(ids.shape[1], device=ids.device)))
    views = tuple(LayerView(kv, **recorder.views[kv.layer_id]) for kv in layers)
    return RequestKV(tuple(layers), ids.shape[1]), views


def _check_ids(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """`ids` as `[1, token]` on the model's device."""
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != 1):
        raise BadInput(
            f"token ids must be int64 [token] or [1, token], got {ids.dtype} {list(ids.shape)}; "
            "requests are captured one at a time"
        )
    config: Any = model.config
    _check_length(config, ids.numel())
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        raise BadInput(
            f"token ids must be in [0, {config.vocab_size}), got {lowest} to {highest}; was the "
            "prompt cut by another model's tokenizer?"
        )
    return ids.reshape(1, -1).to(model.device)


def restore(model: PreTrainedModel, kv: RequestKV) -> Cache:
    """A cache that `model` continues at the true next position, `kv.next_position`.

    It goes wherever transformers takes `past_key_values`: in a forward call with one or many new
    tokens, and in `generate` with the *whole* ids (prompt and anything after it). To generate from
    the prompt alone, let the model compute the last prompt position again: `cache.crop(-1)` first.
    A continuation that starts elsewhere raises `PositionMismatch` and leaves the cache as it was.

    K/V are cast to the model's dtype and are never written to, so several questions can each have
    their own `restore` of one `kv`; what they share is not copied before the first new token.

    Raises:
        ShapeMismatch: layers, heads or channels are not this model's.
        BadInput: the next position is beyond the model's last.
        Unsupported: see `architecture_of` and `wrap_attention`.
    """
    architecture_of(model)
    _check_fits(model, kv)
    wrap_attention(model)
    return Cache(layers=[RestoredLayer(layer, kv.next_position, model) for layer in kv.layers])


def _check_fits(model: PreTrainedModel, kv: RequestKV) -> None:
    config: Any = model.config
    _check_length(config, kv.next_position)
    layer_ids = [layer.layer_id for layer in kv.layers]
    if layer_ids != list(range(config.num_hidden_layers)):
        raise ShapeMismatch(
            f"{type(model).__name__} needs its layers 0 to {config.num_hidden_layers - 1}, each "
            f"once and in order; got {layer_ids}"
        )
    expected = {name: (config.num_key_value_heads, _channels(config)) for name in ("k", "v")}
    for layer in kv.layers:
        got = {name: (x.shape[0], x.shape[2]) for name, x in layer.components.items()}
        if got != expected:
            raise ShapeMismatch(
                f"layer {layer.layer_id}: {type(model).__name__} has (heads, channels) {expected}, "
                f"got {got}"
            )


class RestoredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a restored cache; knows the true position of every token that it holds.

    Its length is the true next position, not the number of its keys, so that transformers slices
    prompts, counts positions and sizes masks as if no token were missing.
    """

    def __init__(self, kv: LayerKV, next_position: int, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        k, v = (kv.components[name].to(model.device, model.dtype)[None] for name in ("k", "v"))
        self.lazy_initialization(k, v)
        self.keys, self.values = k, v
        self.positions = kv.positions.to(model.device)
        self.next_position = next_position

    def get_seq_length(self) -> int:
        return self.next_position

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        stop = self.next_position + key_states.shape[-2]
        new = torch.arange(self.next_position, stop, device=self.positions.device)
        self.positions, self.next_position = torch.cat([self.positions, new]), stop
        # Said by an alias: on the stored tensor it would be a cycle that keeps dead caches alive.
        keys = keys.view_as(keys)
        keys.kvprism_layer = self  # type: ignore[attr-defined]
        return keys, values

    def check_positions(self, position_ids: torch.Tensor | None) -> None:
        """Refuse queries that are not at the newest positions, and take their keys out again."""
        if position_ids is None:
            return
        n_new = position_ids.shape[-1]
        if bool((position_ids == self.positions[-n_new:]).all()):
            return
        self.crop(-n_new)
        raise PositionMismatch(
            f"the cache goes on at position {self.next_position}, but the call starts at "
            f"{int(position_ids.flatten()[0])}; pass only the tokens that come after it, and to "
            "generate from the prompt alone call cache.crop(-1) first"
        )

    def columns(self, mask: torch.Tensor | None, n_queries: int) -> torch.Tensor | None:
        """This layer's own columns of the shared mask `[batch, head, query, position]`."""
        if len(self.positions) == self.next_position:
            return mask
        if mask is None:
            assert n_queries == 1, "transformers leaves the mask out only when every key is visible"
            return None
        if mask.shape[-1] != self.next_position:
            raise ShapeMismatch(
                f"the attention mask has {mask.shape[-1]} columns; a restored cache needs one for "
                f"each of the {self.next_position} true positions, dropped ones included"
            )
        return mask[..., self.positions]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` *positions*, whether they are still held or not."""
        if not -self.next_position <= tokens_to_remove <= 0:
            raise BadInput(
                f"crop takes 0 to -{self.next_position}, the positions to remove, got "
                f"{tokens_to_remove}"
            )
        self.next_position += tokens_to_remove
        n_kept = int((self.positions < self.next_position).sum())
        super().crop(n_kept - len(self.positions))
        self.positions = self.positions[:n_kept]

    def reset(self) -> None:
        """Forget everything; not in place, because the tensors may still be the caller's."""
        self.crop(-self.next_position)
