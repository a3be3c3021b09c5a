"""What a value becomes in the layer's output: the projection by its output matrix."""

import torch

from kvprism.errors import MissingSignal
from kvprism.tensors import LayerView


def output_norms(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """CriticalKV's ||v W_o||_1 (arXiv 2502.03805), float32 `[head, token]`.

    values: `[head, token, channel]`; weight: the output matrix as a linear layer holds it,
    `[width, q_head * channel]`. Each query head has its own part W_o of it; mean over the query
    heads of a KV head. One query head at a time: memory is O(token * width).
    """
    heads, tokens, channels = values.shape
    parts = weight.float().T.reshape(heads, -1, channels, weight.shape[0])
    norms = torch.zeros(heads, tokens, device=values.device)
    for head, own in enumerate(parts):
        for part in own:
            norms[head] += (values[head].float() @ part).abs().sum(dim=-1)
    return norms / parts.shape[1]


def relative_output_norms(view: LayerView) -> torch.Tensor:
    """The captured norms over the layer's mean, so that heads compare and layers are on one scale.

    Raises:
        MissingSignal: the capture was not asked for them.
    """
    if view.output_norms is None:
        raise MissingSignal(
            f"layer {view.kv.layer_id}: this scorer needs the norms of projected values, which "
            "were not captured; capture with signals={'output_norms'}, or choose ada-kv, which "
            "needs the last window only"
        )
    norms = torch.nan_to_num(view.output_norms)
    return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
