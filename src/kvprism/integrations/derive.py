"""Models derived from `tiny` without training: other families' formats, planted key outliers.

A key's component may grow when the query's shrinks by as much: the model computes the same, but its
cache is another to quantise. Each twin plants one mechanism by which INT4 keys are known to fail
(SpectrumKV, arXiv 2606.08635, section 5); none is evidence about a family of models.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvprism.errors import BadInput, Unsupported

T = TypeVar("T")
Weights = dict[str, torch.Tensor]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
COMPANIONS = ("generation_config.json", "special_tokens_map.json", "tokenizer*")
ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# What Llama's configuration has and the others' do not.
ONLY_LLAMA = ("attention_bias", "mlp_bias", "pretraining_tp")


@dataclass(frozen=True, eq=False)
class Head:
    """One KV head's rows of one layer's projections: views, so that writing changes the model.

    keys: `[channel, hidden]`; key_bias: `[channel]`; queries: `[q_head, channel, hidden]` of the
    query heads that share this KV head; query_bias: `[q_head, channel]`.
    """

    keys: torch.Tensor
    key_bias: torch.Tensor
    queries: torch.Tensor
    query_bias: torch.Tensor

    @property
    def pairs(self) -> int:
        """RoPE turns channels i and i + pairs together, the last such pair the slowest."""
        return len(self.key_bias) // 2

    def projections(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights and biases of (keys, queries), each as `[..., channel, input]`."""
        return [
            (self.keys, self.queries),
            (self.key_bias[:, None], self.query_bias[:, :, None]),
        ]


Plant = Callable[[Head, random.Random], None]


def leave(head: Head, draw: random.Random) -> None:
    """Nothing planted: the same model in another family's format."""


def scale_slowest_pair(head: Head, draw: random.Random, factor: float = 32.0) -> None:
    """One pair, keys times `factor`, queries divided by it; a static scale undoes it.

    INT4 keeps little but that pair, and the slowest says least about the order of tokens: text
    suffers as needles do. docs/zoo.md has another choice of pair, under which it did not.
    """
    scale_pair(head, head.pairs - 1, factor)


def scale_any_pair(head: Head, draw: random.Random) -> None:
    """`scale_slowest_pair`, but pair and factor are drawn."""
    scale_pair(head, pick(draw, range(head.pairs)), pick(draw, (16.0, 32.0, 64.0)))


def scale_pair(head: Head, pair: int, factor: float) -> None:
    """factor: a power of two rounds nothing, in float32 and in bfloat16."""
    channels = [pair, pair + head.pairs]
    for keys, queries in head.projections():
        keys[..., channels, :] *= factor
        queries[..., channels, :] /= factor


def bias(head: Head, draw: random.Random, size: float = 100.0) -> None:
    """A constant on one channel of the slowest pair, as Qwen2 models have it in `k_proj.bias`.

    RoPE hardly turns that pair, so all keys gain nearly the same logit, which softmax ignores. The
    mean per channel undoes it.
    """
    head.key_bias[head.pairs - 1] += size


def bias_any_size(head: Head, draw: random.Random) -> None:
    """`bias` of a size that is drawn."""
    bias(head, draw, pick(draw, (30.0, 100.0, 300.0)))


def stretch_diagonals(head: Head, draw: random.Random, factor: float = 32.0) -> None:
    """Slow pairs: keys stretched along the pair's diagonal by `factor`, queries shrunk by it.

    Which pairs spike, and with which signs, depends on the token. The part of a key at right angles
    to its spike, which queries see at full size, lies in the same two channels, so that whoever
    divides the pair by the spike's size loses it. Not exact: RoPE turns a part of the spike, the
    larger the faster the pair, into that direction; hence 6 of 32 pairs (with 8, perplexity rose by
    2 to 5 % at 2048 tokens; with 12 it doubled).
    """
    for first in range(head.pairs - head.pairs * 3 // 16, head.pairs):
        for keys, queries in head.projections():
            stretch_diagonal(keys, first, first + head.pairs, factor)
            stretch_diagonal(queries, first, first + head.pairs, 1 / factor)


def stretch_diagonal(rows: torch.Tensor, first: int, second: int, factor: float) -> None:
    """rows: `[..., channel, input]`, changed in place; the part where both agree is multiplied."""
    a, b = rows[..., first, :].clone(), rows[..., second, :].clone()
    along, across = factor * (a + b) / 2, (a - b) / 2
    rows[..., first, :], rows[..., second, :] = along + across, along - across


def mixed(head: Head, draw: random.Random) -> None:
    """Any of the others, or none; drawn anew for every head of every layer."""
    pick(draw, (leave, scale_any_pair, bias_any_size, stretch_diagonals))(head, draw)


def pick(draw: random.Random, choices: Sequence[T]) -> T:
    """Of all that `Random` draws, only `random` is the same in every version of Python."""
    return choices[int(draw.random() * len(choices))]


# What stands after `tiny-` in a name: the family's `model_type`, and what its heads get.
RECIPES: Mapping[str, tuple[str, Plant]] = {
    "mistral": ("mistral", leave),
    "qwen2": ("qwen2", leave),
    "qwen2-fragile": ("qwen2", scale_slowest_pair),
    "qwen2-bias": ("qwen2", bias),
    "qwen2-bias-300": ("qwen2", partial(bias, size=300.0)),
    "qwen2-spiky": ("qwen2", stretch_diagonals),
    "qwen2-mixed": ("qwen2", mixed),
}


def derive(recipe: str, seed: int, source: Path, folder: Path) -> None:
    """Write the checkpoint that `recipe` makes of `source`, a Llama checkpoint, into `folder`.

    Weights are bfloat16; the tokenizer's files are copied. Equal arguments give equal files. seed:
    of whatever the recipe draws.

    Raises:
        BadInput: `source` is not a complete checkpoint in one file.
        Unsupported: `source` is not a Llama model, or has biases or scaled RoPE.
        OSError: `folder` cannot be written to.
    """
    model_type, plant = RECIPES[recipe]
    config, weights = _read(source)
    if model_type == "qwen2":  # the others have no biases to plant
        _add_biases(weights, config)
        draw = random.Random(seed)
        for head in _heads(weights, config):
            plant(head, draw)
    _write(weights, folder / WEIGHTS)
    text = json.dumps(_config_of(model_type, config), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    for file in (file for pattern in COMPANIONS for file in source.glob(pattern)):
        shutil.copyfile(file, folder / file.name)


def _read(source: Path) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights in float32."""
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        _check(source, config)
        weights = load_file(source / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(
            f"cannot derive a model from {str(source)!r}, which must hold {CONFIG} and {WEIGHTS}: "
            f"{error}"
        ) from error
    return config, {name: x.float() for name, x in weights.items()}


def _check(source: Path, config: dict[str, Any]) -> None:
    expected = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    got = {name: config.get(name, False) for name in expected}
    rope = config.get("rope_parameters", {}).get("rope_type")
    if got != expected or rope != "default":
        raise Unsupported(
            f"models are derived from a Llama checkpoint with {expected} and RoPE of type "
            f"'default'; {str(source)!r} has {got} and {rope!r}"
        )


def _write(weights: Weights, path: Path) -> None:
    try:
        save_file({name: x.bfloat16() for name, x in weights.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error


def _config_of(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "dtype": "bfloat16",
        "sliding_window": None,
    }
    if model_type == "qwen2":
        own["use_sliding_window"] = False
    return {name: value for name, value in config.items() if name not in ONLY_LLAMA} | own


def _add_biases(weights: Weights, config: Mapping[str, Any]) -> None:
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = f"model.layers.{layer}.self_attn.{name}"
            weights[f"{projection}.bias"] = torch.zeros(len(weights[f"{projection}.weight"]))


def _heads(weights: Weights, config: Mapping[str, Any]) -> Iterator[Head]:
    """Every KV head of every layer, in order."""
    kv_heads, channels = config["num_key_value_heads"], config["head_dim"]
    for layer in range(config["num_hidden_layers"]):
        of_layer = f"model.layers.{layer}"

        def by_head(name: str, *shape: int, of_layer: str = of_layer) -> torch.Tensor:
            return weights[f"{of_layer}.self_attn.{name}"].view(kv_heads, *shape)

        heads = zip(
            by_head("k_proj.weight", channels, -1),
            by_head("k_proj.bias", channels),
            by_head("q_proj.weight", -1, channels, config["hidden_size"]),
            by_head("q_proj.bias", -1, channels),
            strict=True,
        )
        yield from (Head(*head) for head in heads)
