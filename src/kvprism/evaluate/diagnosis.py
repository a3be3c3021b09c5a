"""What INT8 and INT4 do to one layer: errors under real queries, outlier channels, the setting.

All errors are measured on a cache that went through the wire with every token at one tier.
"""

from collections.abc import Mapping

import msgspec
import torch

from kvprism.profiles import LayerSetting
from kvprism.score import attention_logits
from kvprism.tensors import LayerKV, LayerView

# Relative L2 error of a layer's attention output when all of it is INT4. INT4 values alone make
# 0.10. Measured on two models, layer by layer: 0.10 to 0.16 untouched, 0.56 to 1.28
# where a planted defect makes the needles fail; 0.30 is the geometric middle of 0.16 and 0.56, and
# three times what the values alone make.
ATTENTION_LIMIT = 0.30
# Mean magnitude of a key channel over that of the head's median channel. A row's INT4 step is
# absmax / 7.4: from a ratio of about 8 on, one step is more than all that a median channel holds.
# Two models trained here have 1.4 to 3.0, their planted defects 12 and more.
OUTLIER_RATIO = 8.0


class Errors(msgspec.Struct, frozen=True):
    """What one tier does to one layer when every token takes it, in `kvp.nested/1`.

    keys, values, output: relative L2 errors, output that of softmax(qK)V over all heads and the
    captured queries; kl: mean KL of the attention over (head, query), in nats.
    """

    keys: float
    values: float
    output: float
    kl: float


class Outlier(msgspec.Struct, frozen=True):
    """A key channel whose mean magnitude is `ratio` times that of its head's median channel."""

    layer: int
    head: int
    channel: int
    ratio: float

    def __str__(self) -> str:
        return (
            f"key channel {self.channel} of layer {self.layer} head {self.head}, "
            f"{self.ratio:.1f} times the median channel"
        )


class LayerDiagnosis(msgspec.Struct, frozen=True):
    """One layer: errors per tier, outlier channels (largest first) and the setting for it.

    conditioned: INT4 with conditioned keys, null without a conditioning for this layer.
    """

    layer: int
    int8: Errors
    int4: Errors
    conditioned: Errors | None
    outliers: tuple[Outlier, ...]
    setting: LayerSetting


def diagnose(view: LayerView, sent: Mapping[str, LayerKV], conditioned: bool) -> LayerDiagnosis:
    """One layer as it was captured and as it came back at `int8`, `int4` and, where it is
    `conditioned`, at INT4 with conditioned keys.
    """
    errors = {tier: errors_of(view, kv) for tier, kv in sent.items()}
    remedy = errors["conditioned"] if conditioned else None
    return LayerDiagnosis(
        layer=view.kv.layer_id,
        int8=errors["int8"],
        int4=errors["int4"],
        conditioned=remedy,
        outliers=outliers_of(view.kv),
        setting=setting_of(errors["int4"], remedy),
    )


def setting_of(int4: Errors, conditioned: Errors | None) -> LayerSetting:
    """What a layer's attention errors propose: the mildest setting within `ATTENTION_LIMIT`."""
    if int4.output <= ATTENTION_LIMIT:
        return "plain"
    if conditioned is not None and conditioned.output <= ATTENTION_LIMIT:
        return "conditioned"
    return "no-int4"


def outliers_of(kv: LayerKV) -> tuple[Outlier, ...]:
    """The key channels beyond `OUTLIER_RATIO`, largest first, as they are cached (after RoPE)."""
    magnitude = kv.components["k"].float().abs().mean(dim=1)
    median = magnitude.median(dim=1, keepdim=True).values
    # Over half of the channels may be dead: the ratio stays a number that JSON can hold.
    ratio = magnitude / median.maximum(magnitude.amax(dim=1, keepdim=True) * 2.0**-16)
    found = [
        Outlier(kv.layer_id, head, channel, rounded(float(ratio[head, channel])))
        for head, channel in (ratio > OUTLIER_RATIO).nonzero().tolist()
    ]
    return tuple(sorted(found, key=lambda outlier: -outlier.ratio))


def errors_of(view: LayerView, sent: LayerKV) -> Errors:
    """What the captured queries see of a layer that was sent with all of its tokens."""
    own = view.kv.components
    other = {name: x.to(own[name].device) for name, x in sent.components.items()}
    expected, got = _attention(view, own["k"]), _attention(view, other["k"])
    divergences = (expected.exp() * (expected - got)).sum(dim=-1)
    outputs = [
        weights.exp() @ values.double()[:, None]
        for weights, values in ((expected, own["v"]), (got, other["v"]))
    ]
    return Errors(
        keys=_relative(other["k"], own["k"]),
        values=_relative(other["v"], own["v"]),
        output=_relative(outputs[1], outputs[0]),
        kl=rounded(float(divergences.mean().clamp_min(0))),
    )


def _attention(view: LayerView, keys: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[kv_head, q_head of it, window, token]`.

    In float64: planted biases make logits in the thousands, at INT8 a KL is near 1e-5.
    """
    return attention_logits(view, keys.double()).log_softmax(dim=-1)


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    norm = float(expected.float().norm())
    return rounded(float((got.float() - expected.float()).norm()) / max(norm, 1e-30))


def percent(fraction: float) -> str:
    """Errors of a few percent and of a hundred stand side by side: one digit."""
    return f"{100 * fraction:.1f} %"


def rounded(value: float) -> float:
    """Six digits: reports stay readable, and nothing here resolves more."""
    return float(f"{value:.6g}")
