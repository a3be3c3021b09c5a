"""Caches whose heads hold different tokens: padded in memory, and the padding masked."""

import pytest
import recompute
import torch
from samples import N_PROMPT, tokens

from kvprism.codec.stream import decode, encode
from kvprism.core import Capability
from kvprism.errors import ShapeMismatch
from kvprism.integrations import hf
from kvprism.planning import plan
from kvprism.policies import signals_of
from kvprism.tensors import LayerKV, RequestKV

ATOL = 1e-4  # of logits in float32: the project's definition of "dropping equals masked attention"


def by_head(kv: RequestKV, seed: int = 1) -> RequestKV:
    """Every head of every layer holds other tokens, and another number of them."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in kv.layers:
        shape = layer.components["k"].shape[:2]
        share = torch.tensor([0.2, 0.6, 0.4, 0.8])[: shape[0], None]
        held = torch.rand(shape, generator=generator) < share
        present = held.any(dim=0)
        rows = {name: (x * held[..., None])[:, present] for name, x in layer.components.items()}
        layers.append(LayerKV(layer.layer_id, rows, layer.positions[present], held[:, present]))
    return RequestKV(tuple(layers), kv.next_position)


def masks_of(model, kv: RequestKV, n_tokens: int) -> list[torch.Tensor]:
    """`[q_head, query, position]` for every layer: rows after the prompt miss what was dropped."""
    kept = [layer.positions for layer in kv.layers]
    masks = []
    shared = recompute.masks_after_dropping(model, kept, N_PROMPT, n_tokens)
    for layer, mask in zip(kv.layers, shared, strict=True):
        group = model.config.num_attention_heads // len(layer.held)
        mask = mask.repeat(model.config.num_attention_heads, 1, 1)
        for head, held in enumerate(layer.held):
            for position in layer.positions[~held].tolist():
                mask[head * group : (head + 1) * group, N_PROMPT:, position] = False
        masks.append(mask)
    return masks


def test_heads_with_tokens_of_their_own_equal_masked_attention(model, attention):
    model.set_attn_implementation(attention)
    kv = by_head(hf.capture(model, tokens(N_PROMPT))[0])
    new = tokens(57, 5)
    ids = torch.cat([tokens(N_PROMPT), new], dim=1)[0]
    want = recompute.logits(model, ids, masks_of(model, kv, len(ids)))[N_PROMPT:]
    cache = hf.restore(model, kv)
    parts = [model(part, **cache.kwargs).logits[0] for part in new.split([15, 1, 40, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts), want, atol=ATOL, rtol=0)
    whole = model(new, **hf.restore(model, kv).kwargs).logits[0]
    torch.testing.assert_close(whole, want, atol=ATOL, rtol=0)


def test_such_a_cache_can_be_cropped(llama):
    kv = by_head(hf.capture(llama, tokens(N_PROMPT))[0])
    new = tokens(9, 5)
    cache = hf.restore(llama, kv)
    want = llama(new, **cache.kwargs).logits
    cache.crop(-9)
    torch.testing.assert_close(llama(new, **cache.kwargs).logits, want, atol=ATOL, rtol=0)


def test_padding_is_invisible_whatever_is_in_it(llama):
    kv = by_head(hf.capture(llama, tokens(N_PROMPT))[0])
    want = llama(tokens(9, 5), **hf.restore(llama, kv).kwargs).logits
    for layer in kv.layers:
        for x in layer.components.values():
            x[~layer.held] = 1000.0
    assert torch.equal(llama(tokens(9, 5), **hf.restore(llama, kv).kwargs).logits, want)


@pytest.mark.parametrize("policy", ["snapkv", "ada-kv", "layer-defensivekv"])
def test_a_plan_by_head_survives_the_wire_and_goes_on(llama, policy):
    full, view = hf.capture(llama, tokens(N_PROMPT), signals=signals_of([policy]))
    chosen = plan(view, policy, 1.5, capability=Capability(drop="per_head"))
    stream = encode(full, chosen)
    assert len(stream) == chosen.nbytes
    kv = decode(stream, drop="per_head")
    assert any(layer.held is not None for layer in kv.layers)
    assert kv.resident_nbytes < full.resident_nbytes
    for layer, whole, planned in zip(kv.layers, full.layers, chosen.layers, strict=True):
        held = torch.from_numpy(planned.tier_of["k"] == 0)
        assert layer.positions.tolist() == held.any(dim=0).nonzero().flatten().tolist()
        if layer.held is not None:
            assert torch.equal(layer.held, held[:, layer.positions])
        for name, x in layer.components.items():
            expected = whole.components[name] * held[..., None]
            assert torch.equal(x, expected[:, layer.positions])
    new = tokens(5, 7)
    ids = torch.cat([tokens(N_PROMPT), new], dim=1)[0]
    kv = RequestKV(tuple(with_held(layer) for layer in kv.layers), kv.next_position)
    want = recompute.logits(llama, ids, masks_of(llama, kv, len(ids)))[N_PROMPT:]
    got = llama(new, **hf.restore(llama, kv).kwargs).logits[0]
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


def with_held(layer: LayerKV) -> LayerKV:
    held = torch.ones(layer.components["k"].shape[:2], dtype=torch.bool)
    return LayerKV(layer.layer_id, layer.components, layer.positions,
                   held if layer.held is None else layer.held)  # fmt: skip


def test_a_cache_with_padding_has_no_shape_and_is_not_encoded_again(llama):
    kv, _ = hf.capture(llama, tokens(N_PROMPT))
    held = torch.ones(2, N_PROMPT, dtype=torch.bool)
    held[1, 3] = False
    ragged = LayerKV(0, kv.layers[0].components, kv.layers[0].positions, held)
    with pytest.raises(ShapeMismatch, match="tokens are missing"):
        ragged.shape()
    with pytest.raises(ShapeMismatch, match=r"expected held rows as bool \[head, token\]"):
        LayerKV(0, kv.layers[0].components, kv.layers[0].positions, held[:, 1:])
