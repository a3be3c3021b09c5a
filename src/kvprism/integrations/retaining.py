"""The decode phase on a restored cache: a layer that evicts again after every call."""

from typing import Any

import torch
from torch.nn import functional

from kvprism.core import MASS_CHANNELS
from kvprism.errors import PositionMismatch
from kvprism.integrations.restored import RestoredLayer
from kvprism.retention import Retention, retained
from kvprism.score.accumulated import attention_paid
from kvprism.score.attention import WINDOW
from kvprism.state import mass_of
from kvprism.tensors import LayerKV, LayerView


class RetainingLayer(RestoredLayer):  # type: ignore[no-untyped-call]
    """A restored layer under a `Retention`: after a call no head holds more than its budget.

    The tokens of a call see everything that was held before it; what is evicted is decided after
    it, with the queries of this call and of the last ones before it, and with the attention that
    tokens got so far where the policy counts that: from the prompt's queries on if their mass came
    with the cache, else from the first call on.
    """

    def __init__(self, kv: LayerKV, retention: Retention, *restored: Any) -> None:
        super().__init__(kv, *restored)
        self._layer_id, self._retention = kv.layer_id, retention
        self._queries: torch.Tensor | None = None
        # [head, token] of what is held, where the policy needs it.
        self._mass: torch.Tensor | None = None
        if retention.needs_mass:
            came = mass_of(kv)
            none = torch.zeros(kv.components["k"].shape[:2])
            self._mass = (none if came is None else came).to(self.keys.device)
        self._seen = 0  # the position after the last query that was observed

    @property
    def held_values(self) -> int:
        """As a restored layer, and the mass as it travels: two values a row."""
        mass = 0 if self._mass is None else MASS_CHANNELS * self._mass.numel()
        return super().held_values + mass

    def observe(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        softmax_scale: float,
        softcap: float | None,
    ) -> None:
        """A call's queries `[1, q_head, query, channel]` attended under `mask`; evict now."""
        queries, keys = query[0].detach(), self.keys[0]
        if self._mass is not None:
            own = None if mask is None else mask[0]
            paid = attention_paid(queries, keys, softmax_scale, softcap, own)
            self._mass = paid + functional.pad(self._mass, (0, len(keys[0]) - len(self._mass[0])))
        earlier = [] if self._queries is None else [self._queries]
        self._queries = torch.cat([*earlier, queries], dim=1)[:, -WINDOW:]
        self._seen = self.next_position
        kv = LayerKV(self._layer_id, {"k": keys, "v": self.values[0]}, self.positions, self.held)
        seen_by = self._queries[:, -len(keys[0]) :]
        view = LayerView(kv, seen_by, softmax_scale, softcap, self._mass)
        if (after := retained(self._retention, view)) is not None:
            self._hold(*after)

    def _hold(self, kv: LayerKV, kept: torch.Tensor) -> None:
        self.keys, self.values = kv.components["k"][None], kv.components["v"][None]
        self.positions, self.held = kv.positions, kv.held
        if self._mass is not None:
            self._mass = (self._mass * kept)[:, kept.any(dim=0)]

    def _let_go(self) -> None:
        before = len(self.positions)
        super()._let_go()
        if self._mass is not None:
            self._mass = self._mass[:, before - len(self.positions) :]

    def check_crop(self, tokens_to_remove: int) -> None:
        """As a restored layer; and what a query has been counted for cannot be taken back."""
        super().check_crop(tokens_to_remove)
        position = self.next_position + tokens_to_remove
        if 0 < position < self._seen:
            raise PositionMismatch(
                f"the cache cannot go back from position {self.next_position} to {position}: it "
                f"evicts while it decodes ({self._retention}) and has seen position "
                f"{self._seen - 1}; restore it again"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; all of them begins anew."""
        super().crop(tokens_to_remove)
        if self._mass is not None:
            self._mass = self._mass[:, : len(self.positions)]
        if not self.next_position:
            self._queries, self._seen = None, 0
