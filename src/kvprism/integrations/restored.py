"""Restored caches: layers that know the true position of every token that they hold."""

from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvprism.errors import BadInput, PositionMismatch, ShapeMismatch
from kvprism.integrations.families import first_visible
from kvprism.tensors import LayerKV

_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
# How models call their cache, as an argument and in what they return; renamed in transformers 5.24.
CACHE = next(name for name in ("cache", "past_key_values") if name in _FIELDS)


def empty_cache(model: PreTrainedModel) -> dict[str, Cache]:
    """What a model begins with, as the argument that it takes."""
    return {CACHE: DynamicCache(config=model.config)}


class RestoredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a restored cache.

    Its length is the true next position, not the number of its keys, so that transformers slices
    prompts, counts positions and sizes masks as if no token were missing.

    window: of a layer with a sliding window, how many positions a query sees. Such a layer lets go
    of what its next query cannot see, by position; transformers' own layer counts keys instead,
    and would look back too far once tokens were dropped.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(
        self, kv: LayerKV, next_position: int, model: PreTrainedModel, window: int | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        k, v = (kv.components[name].to(model.device, model.dtype)[None] for name in ("k", "v"))
        self.lazy_initialization(k, v)
        self.keys, self.values = k, v
        self.positions = kv.positions.to(model.device)
        self.held = None if kv.held is None else kv.held.to(model.device)
        self.next_position = next_position
        self.window = window
        self.is_sliding = window is not None  # which of the model's shared masks is sized by it
        self.start = first_visible(window, next_position)  # what came before it is lost for good

    @property
    def held_values(self) -> int:
        """How many values are in memory, padding of heads included."""
        return self.keys.numel() + self.values.numel()

    def get_seq_length(self) -> int:
        return self.next_position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the next mask has, and the first of them."""
        start = first_visible(self.window, self.next_position)
        return self.next_position + query_length - start, start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._let_go()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        stop = self.next_position + key_states.shape[-2]
        new = torch.arange(self.next_position, stop, device=self.positions.device)
        self.positions, self.next_position = torch.cat([self.positions, new]), stop
        if self.held is not None:
            self.held = functional.pad(self.held, (0, len(new)), value=True)
        # Said by an alias: on the stored tensor it would be a cycle that keeps dead caches alive.
        keys = keys.view_as(keys)
        keys.kvprism_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _let_go(self) -> None:
        """Forget what has left the window, as late as possible: a call may be taken back."""
        if self.window is None:
            return
        self.start = first_visible(self.window, self.next_position)
        n_gone = int((self.positions < self.start).sum())
        self.keys, self.values = self.keys[..., n_gone:, :], self.values[..., n_gone:, :]
        self.positions = self.positions[n_gone:]
        self.held = None if self.held is None else self.held[:, n_gone:]

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

    def observe(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        softmax_scale: float,
        softcap: float | None,
    ) -> None:
        """After a call: its queries and their mask, for a layer that learns from them."""

    def mask(self, shared: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        """This layer's own mask: its columns of the shared one, and padding masked head by head.

        shared: `[batch, head, query, position]`, bool or added to the logits, or None; query:
        `[batch, q_head, query, channel]`.
        """
        own = self._columns(shared, query.shape[2])
        if self.held is None:
            return own
        padding = ~self.held.repeat_interleave(query.shape[1] // len(self.held), 0)[None, :, None]
        if own is None:  # both kinds of attention add a mask in the queries' dtype to the logits
            own = query.new_zeros(1, 1, query.shape[2], self.held.shape[1])
        if own.dtype == torch.bool:
            return own & ~padding
        return own.masked_fill(padding, torch.finfo(own.dtype).min)

    def _columns(self, mask: torch.Tensor | None, n_queries: int) -> torch.Tensor | None:
        """This layer's own columns of the shared mask `[batch, head, query, position]`."""
        n_columns = self.next_position - self.start
        if len(self.positions) == n_columns:
            return mask
        if mask is None:
            assert n_queries == 1, "transformers leaves the mask out only when every key is visible"
            return None
        if mask.shape[-1] != n_columns:
            raise ShapeMismatch(
                f"the attention mask has {mask.shape[-1]} columns; a restored cache needs one for "
                f"each of the {n_columns} true positions from {self.start} on, dropped ones "
                "included"
            )
        return mask[..., self.positions - self.start]

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back beyond the beginning, or to where the window shows what was let go."""
        if not -self.next_position <= tokens_to_remove <= 0:
            raise BadInput(
                f"crop takes 0 to -{self.next_position}, the positions to remove, got "
                f"{tokens_to_remove}"
            )
        position = self.next_position + tokens_to_remove
        if position and first_visible(self.window, position) < self.start:
            raise PositionMismatch(
                f"the cache cannot go back from position {self.next_position} to {position}: a "
                f"layer with a sliding window of {self.window} holds nothing before position "
                f"{self.start}; to go on at {position}, capture the first {position} tokens alone"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` *positions*, whether they are still held or not."""
        self.check_crop(tokens_to_remove)
        self.next_position += tokens_to_remove
        self.start = min(self.start, first_visible(self.window, self.next_position))
        n_kept = int((self.positions < self.next_position).sum())
        super().crop(n_kept - len(self.positions))
        self.positions = self.positions[:n_kept]
        # Where nothing is left, a call begins anew, and transformers may leave its causal mask out.
        self.held = None if self.held is None or not n_kept else self.held[:, :n_kept]

    def reset(self) -> None:
        """Forget everything; not in place, because the tensors may still be the caller's."""
        self.crop(-self.next_position)


class RestoredCache(Cache):
    """The restored layers of one request."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    @property
    def kwargs(self) -> "dict[str, RestoredCache]":
        """This cache under the name by which the installed transformers takes one."""
        return {CACHE: self}

    @property
    def held_values(self) -> int:
        """How many values are in memory, padding of heads included."""
        layers: list[Any] = self.layers
        return sum(layer.held_values for layer in layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions, in all layers or, on an error, in none."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
