"""transformers models at both ends: capture K/V and queries on prefill, restore them and go on.

Nothing is monkey-patched. `wrap_attention` registers a function around the attention that the model
already uses, with the same mask function, and selects it. The function does two things and passes
everything else through, so that any other call of the model stays bit-identical:

- a recorder that comes down as an extra keyword of the forward call sees each layer's queries;
- keys that come from a restored layer say so, and attend through that layer's columns of the mask.

The mask is shared by all layers, or by all with a sliding window and all without, and is made for
the *true* length, because a restored cache answers with the true next position when it is asked for
its length. A layer that lost tokens holds fewer keys than the mask has columns: the columns of the
positions that it still holds are its own mask. Where heads hold different tokens, each is padded to
what any of them holds, and the padding is masked head by head.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from kvprism.core import STATE
from kvprism.errors import BadInput, ShapeMismatch, UnknownName, Unsupported
from kvprism.integrations import tiny
from kvprism.integrations.families import (
    architecture_of,
    channels_of,
    check_length,
    fingerprint,
    first_visible,
    shape_of,
    softcap_of,
    windows_of,
)
from kvprism.integrations.restored import RestoredCache, RestoredLayer
from kvprism.integrations.retaining import RetainingLayer
from kvprism.retention import FULL_KV, Decode, Retention, per_layer
from kvprism.score.accumulated import attention_mass
from kvprism.score.expected import query_statistics
from kvprism.score.output import output_norms
from kvprism.tensors import LayerKV, LayerView, RequestKV, Signal

__all__ = [
    "architecture_of",
    "capture",
    "fingerprint",
    "load",
    "load_config",
    "load_tokenizer",
    "restore",
    "rope_frequencies",
    "shape_of",
    "wrap_attention",
]

ATTENTIONS = ("sdpa", "eager")
PREFIX = "kvprism_"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


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
        config = AutoConfig.from_pretrained(path, **LOCAL)
        architecture_of(config)
        tokenizer = AutoTokenizer.from_pretrained(path, **LOCAL)
        # Left to themselves, some versions of transformers choose sdpa, which has no soft cap.
        choice = {} if softcap_of(config) is None else {"attn_implementation": "eager"}
        with _no_progress_bar():
            model, report = auto_model.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **choice,
                **LOCAL,
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


def wrap_attention(model: PreTrainedModel) -> None:
    """Select attention that can record queries and serve restored caches; once is enough.

    Raises:
        Unsupported: the model uses an attention implementation other than `sdpa` or `eager`, or
            one that leaves out the model's soft cap.
    """
    name = model.config._attn_implementation
    softcap = softcap_of(model)
    built = ATTENTIONS if softcap is None else ("eager",)
    if name in [PREFIX + known for known in built]:
        return
    if name not in built:
        capped = "" if softcap is None else f" for a model with a soft cap of {softcap}"
        raise Unsupported(
            f"attention implementation {name!r} is not supported{capped}; call "
            f"model.set_attn_implementation with one of {list(built)} first"
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
    kvprism_recorder: "Recorder | None" = None,
    **kwargs: Any,
) -> Any:
    if kvprism_recorder is not None:
        kvprism_recorder.record(Attention(module, query, key, value, kwargs))
        if kvprism_recorder.complete:
            raise Complete
    layer: RestoredLayer | None = getattr(key, "kvprism_layer", None)
    if layer is not None:
        if module.layer_idx == 0:  # one check, and one wait for the device, per forward call
            layer.check_positions(kwargs.get("position_ids"))
        attention_mask = layer.mask(attention_mask, query)
    out = _attention(name, module)(module, query, key, value, attention_mask, **kwargs)
    if layer is not None:
        layer.observe(query, attention_mask, float(kwargs["scaling"]), kwargs.get("softcap"))
    return out


def _attention(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """What the model would have called itself: `eager` is each modeling file's own function."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


class Attention(NamedTuple):
    """What a layer's attention was called with: post-RoPE `[1, head, token, channel]` each."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kwargs: dict[str, Any]

    def recorded(self) -> dict[str, Any]:
        """What a view of the layer holds of it, but for its queries."""
        return {
            "softmax_scale": float(self.kwargs["scaling"]),
            "softcap": self.kwargs.get("softcap"),
        }


class Recorder(Protocol):
    """Sees every layer of a forward call that is given one, until it has all that it wants."""

    @property
    def complete(self) -> bool: ...

    def record(self, call: Attention) -> None: ...


class Complete(Exception):
    """Every layer's keys and values exist: what the model still computes, no cache holds."""


class _Recorder:
    """Collects one prefill's layers: K/V, and post-RoPE queries `[q_head, window, channel]`.

    windows: of each layer, how many positions a query sees, or None; frequencies: the model's RoPE,
    for the signal `future_queries`; on_layer, cache_dtype: as in `capture`.
    """

    def __init__(
        self,
        window: int,
        signals: Collection[Signal],
        windows: Sequence[int | None],
        frequencies: torch.Tensor | None,
        on_layer: Callable[[LayerView], None] | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.window = window
        self._signals, self._windows, self._frequencies = signals, windows, frequencies
        self._on_layer, self._cache_dtype = on_layer, cache_dtype
        self.views: dict[int, LayerView] = {}

    @property
    def complete(self) -> bool:
        return len(self.views) == len(self._windows)

    def _view(self, kv: LayerKV, recorded: dict[str, Any]) -> LayerView:
        """A captured layer with its signals: what is of its own tokens, at most."""
        own = {
            name: recorded[name][:, -len(kv.positions) :]
            for name in ("queries", "mass", "output_norms")
            if name in recorded
        }
        return LayerView(kv, **(recorded | own))

    def record(self, call: Attention) -> None:
        module, query, key, value, _ = call
        window, recorded = self._windows[module.layer_idx], call.recorded()
        if "mass" in self._signals:
            scale, softcap = recorded["softmax_scale"], recorded["softcap"]
            recorded["mass"] = attention_mass(query[0], key[0], scale, softcap, window)
        # A view would keep all queries alive.
        recorded["queries"] = query[0, :, -self.window :].clone()
        if self._frequencies is not None:
            recorded["future_queries"] = query_statistics(query[0], self._frequencies)
        if "output_norms" in self._signals:
            recorded["output_norms"] = output_norms(value[0], module.o_proj.weight)
        layer_id: int = module.layer_idx
        start = first_visible(window, key.shape[-2])
        x = key[0, :, start:], value[0, :, start:]
        kv = cast_layer(layer_id, *x, (start, key.shape[-2]), self._cache_dtype)
        self.views[layer_id] = self._view(kv, recorded)
        if self._on_layer is not None:
            self._on_layer(self.views[layer_id])


def capture(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    window: int = 32,
    cache_dtype: torch.dtype | None = None,
    signals: Collection[Signal] = (),
    on_layer: Callable[[LayerView], None] | None = None,
) -> tuple[RequestKV, tuple[LayerView, ...]]:
    """Prefill `ids` in one unperturbed call; keep each layer's K/V and the last queries.

    The call ends when the last layer's keys and values exist: its attention, its MLP and the head
    would change no cache.

    ids: int64 `[token]` or `[1, token]`; window: how many last positions give their post-RoPE
    queries (as many as the layer has tokens when it has fewer); cache_dtype: the precision in which
    the prefill side keeps its cache, by default the model's own. Queries stay in the model's. A
    layer with a sliding window holds the tokens that the next position can see.

    signals: what some policies need besides (`policies.signals_of` says which), at a price: `mass`
    computes the attention of the whole prompt a second time, in chunks of queries;
    `future_queries` takes mean and covariance of all queries; `output_norms` projects all values by
    the output matrix once more for each query head.

    on_layer: called with each layer as soon as its keys and values exist, before its own attention
    and the layers after it are computed, so that it can leave meanwhile; what it raises ends the
    prefill. The views that it saw are those that are returned.

    Raises:
        UnknownName: no such signal.
        BadInput: no ids, ids outside the vocabulary, more than the model has positions for, a
            window below 1, or a model in training mode (dropout would perturb the prefill).
        Unsupported: see `architecture_of` and `wrap_attention`; for `future_queries` also
            `rope_frequencies`.
    """
    sliding_windows = windows_of(model)
    if window < 1:
        raise BadInput(f"window must be at least 1 position, got {window}")
    ids = made_ready(model, ids)
    frequencies = _frequencies(model, signals)
    recorder = _Recorder(window, signals, sliding_windows, frequencies, on_layer, cache_dtype)
    with torch.no_grad(), suppress(Complete):
        model(ids, use_cache=True, logits_to_keep=1, kvprism_recorder=recorder)
    views = tuple(recorder.views[i] for i in range(len(sliding_windows)))
    return RequestKV(tuple(view.kv for view in views), ids.shape[1]), views


def _frequencies(model: PreTrainedModel, signals: Collection[Signal]) -> torch.Tensor | None:
    """The model's RoPE if a signal needs it; `UnknownName` for a signal that there is not."""
    for signal in signals:
        if signal not in get_args(Signal):
            raise UnknownName("signal", signal, list(get_args(Signal)))
    return rope_frequencies(model) if "future_queries" in signals else None


def cast_layer(
    layer_id: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_range: tuple[int, int],
    dtype: torch.dtype | None,
) -> LayerKV:
    """Keys and values `[head, token, channel]` in the dtype in which a cache is kept."""
    components = {"k": keys, "v": values}
    kept = {name: x.to(dtype or x.dtype).contiguous() for name, x in components.items()}
    return LayerKV(layer_id, kept, torch.arange(*token_range, device=keys.device))


def made_ready(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """`ids` as `[1, token]` on its device, and the model ready for them; errors as `capture`."""
    if model.training:
        raise BadInput("the model is in training mode, where dropout acts; call model.eval() first")
    ids = _check_ids(model, ids)
    wrap_attention(model)
    return ids


def _check_ids(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """`ids` as `[1, token]` on the model's device."""
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != 1):
        raise BadInput(
            f"token ids must be int64 [token] or [1, token], got {ids.dtype} {list(ids.shape)}; "
            "requests are captured one at a time"
        )
    config: Any = model.config
    check_length(config, ids.numel())
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        raise BadInput(
            f"token ids must be in [0, {config.vocab_size}), got {lowest} to {highest}; was the "
            "prompt cut by another model's tokenizer?"
        )
    return ids.reshape(1, -1).to(model.device)


def rope_frequencies(model: PreTrainedModel) -> torch.Tensor:
    """The model's RoPE in radians per position, float32 `[channel // 2]` on the CPU.

    From its own rotary embedding, so that whatever scales the frequencies (Llama 3.1) is in them.
    YaRN's factor on cosine and sine is not: it scales all keys alike.

    Raises:
        Unsupported: see `architecture_of`; frequencies that follow the length of the prompt, that
            differ between layers, or that turn only a part of the channels.
    """
    name, channels = architecture_of(model), channels_of(model.config)
    rotary: list[Any] = [m for m in model.modules() if hasattr(m, "rope_type")]
    kinds = [m.rope_type for m in rotary]
    if len(kinds) != 1 or not isinstance(kinds[0], str):
        raise Unsupported(
            f"{name} with RoPE types {kinds} is not supported: expected one for all layers"
        )
    if "dynamic" in kinds[0] or kinds[0] == "longrope":
        raise Unsupported(
            f"{name} with RoPE type {kinds[0]!r} is not supported: its frequencies change with the "
            "length of the prompt"
        )
    frequencies: torch.Tensor = rotary[0].inv_freq.detach().float().cpu()
    if list(frequencies.shape) != [channels // 2]:
        raise Unsupported(
            f"{name} with RoPE over {2 * frequencies.numel()} of {channels} channels is not "
            "supported: expected all"
        )
    return frequencies


def restore(model: PreTrainedModel, kv: RequestKV, decode: Decode = FULL_KV) -> RestoredCache:
    """A cache that `model` continues at the true next position, `kv.next_position`.

    It goes wherever transformers takes a cache, as `**cache.kwargs` (the argument's name depends on
    the version): in a forward call with one or many new tokens, and in `generate` with the *whole*
    ids (prompt and anything after it). To generate from
    the prompt alone, let the model compute the last prompt position again: `cache.crop(-1)` first.
    A layer with a sliding window that is full cannot go back: capture the prompt without its last
    token instead. A continuation that starts elsewhere raises `PositionMismatch` and leaves the
    cache as it was.

    decode: the decode phase, one `Retention` for all layers or one for each: after every call a
    layer evicts what is beyond its budget of tokens. It evicts once a call, so that a call of many
    tokens holds them all until it ends. Such a cache cannot go back to before its last call.

    K/V are cast to the model's dtype and are never written to, so several questions can each have
    their own `restore` of one `kv`; what they share is not copied before the first new token.

    Raises:
        ShapeMismatch: layers, heads or channels are not this model's.
        BadInput: the next position is beyond the model's last, or a number of retentions that is
            not that of the layers.
        Unsupported: see `architecture_of` and `wrap_attention`.
    """
    windows = windows_of(model)
    _check_fits(model, kv)
    wrap_attention(model)
    retentions = per_layer(decode, len(windows))
    layers = [
        _restored(layer, retention, kv.next_position, model, window)
        for layer, retention, window in zip(kv.layers, retentions, windows, strict=True)
    ]
    return RestoredCache(layers)


def _restored(layer: LayerKV, retention: Retention, *restored: Any) -> RestoredLayer:
    if retention == FULL_KV:
        return RestoredLayer(layer, *restored)
    return RetainingLayer(layer, retention, *restored)


def _check_fits(model: PreTrainedModel, kv: RequestKV) -> None:
    config: Any = model.config
    check_length(config, kv.next_position)
    layer_ids = [layer.layer_id for layer in kv.layers]
    if layer_ids != list(range(config.num_hidden_layers)):
        raise ShapeMismatch(
            f"{type(model).__name__} needs its layers 0 to {config.num_hidden_layers - 1}, each "
            f"once and in order; got {layer_ids}"
        )
    expected = {name: (config.num_key_value_heads, channels_of(config)) for name in ("k", "v")}
    for layer in kv.layers:
        cache = {name: x for name, x in layer.components.items() if name not in STATE}
        got = {name: (x.shape[0], x.shape[2]) for name, x in cache.items()}
        if got != expected:
            raise ShapeMismatch(
                f"layer {layer.layer_id}: {type(model).__name__} has (heads, channels) {expected}, "
                f"got {got}"
            )
