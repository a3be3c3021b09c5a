"""The queries of a prompt's last tokens, caught on their way into the attention.

vLLM hands a connector keys and values, not queries. Every layer's attention implementation is
wrapped, on the object itself and in this process alone, by a function that remembers what it was
last asked. Nothing is copied but the last `WINDOW` rows of a request.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from kvprism.errors import Unsupported
from kvprism.score.attention import WINDOW


class Attention(Protocol):
    """What is used of an attention implementation; queries are `[token, q_head, channel]`."""

    scale: float
    forward: Callable[..., Any]


class QueryTap:
    """Wraps the attention of all layers; layer id -> its implementation.

    Raises:
        Unsupported: an implementation whose `forward` cannot be replaced, or that states no scale.
    """

    def __init__(self, layers: Mapping[int, Attention]) -> None:
        self._latest: dict[int, torch.Tensor] = {}
        self.scales: dict[int, float] = {}
        for layer, attention in layers.items():
            try:
                self.scales[layer] = float(attention.scale)
                attention.forward = self._remembering(layer, attention.forward)
            except (AttributeError, TypeError) as error:
                raise Unsupported(
                    f"importance: {type(attention).__name__} of layer {layer} cannot be asked for "
                    f"its queries ({error}); choose importance position or norm"
                ) from error

    def window(
        self, layer: int, slots: Sequence[int], slot_mapping: torch.Tensor
    ) -> torch.Tensor | None:
        """The queries `[q_head, window, channel]` of a request's last tokens in this step.

        slots: where the last tokens of the request are in the cache, in order; slot_mapping: where
        each token of the step is. Tokens that an earlier step or a prefix cache computed have no
        query here; None when the last one is among them.
        """
        queries = self._latest.get(layer)
        if queries is None:
            return None
        wanted = torch.as_tensor(slots, device=slot_mapping.device)[:, None]
        rows = [row.nonzero() for row in wanted == slot_mapping[None]]
        found: list[int] = []
        for row in reversed(rows):
            if not len(row):
                break
            found.append(int(row[0]))
        if not found:
            return None
        return queries[found[::-1]].transpose(0, 1).contiguous().cpu()

    def _remembering(self, layer: int, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(attention: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._latest[layer] = query
            return inner(attention, query, *args, **kwargs)

        return forward


def last_slots(blocks: Sequence[int], start: int, stop: int, slots: int) -> list[int]:
    """Where the last `WINDOW` of the tokens `[start, stop)` are, by a request's blocks.

    Example:
        >>> last_slots([7, 2], 30, 34, 32)
        [254, 255, 64, 65]
    """
    positions = range(max(start, stop - WINDOW), stop)
    return [blocks[i // slots] * slots + i % slots for i in positions]
