"""The whole path, once for each family: capture, plan, encode, decode, restore, continue."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import recompute
import torch
from configs import FULL, SLIDING, config_of, save_random
from samples import N_PROMPT, kept_of, tokens

import kvprism
from kvprism.core import DROP, MENU
from kvprism.integrations import hf

ATOL = 1e-4  # as in test_hf_restore
# An INT4 value lies within 8 steps of 1/119 of its row's largest. Rounding the step up to FP16
# (8 * 2^-10) and the value to bfloat16 (112.5 * 2^-8) adds less than half a step.
INT4_ERROR = 8.5 / 119

each_family = pytest.mark.parametrize("name", [*FULL, *SLIDING])


def planned_positions(plan: kvprism.Plan) -> list[list[int]]:
    """Of each layer, the positions that the plan keeps."""
    dropped = MENU.index(DROP)
    return [
        (np.flatnonzero(layer.tier_of["k"][0] != dropped) + layer.shape.token_range[0]).tolist()
        for layer in plan.layers
    ]


def after_the_wire(kv, plan):
    stream = kvprism.encode(kv, plan)
    assert len(stream) == plan.nbytes
    restored = kvprism.decode(stream)
    assert [positions.tolist() for positions in kept_of(restored)] == planned_positions(plan)
    assert restored.next_position == kv.next_position
    return restored


@each_family
def test_at_thirty_percent_every_row_is_within_the_codes_error(name, tmp_path):
    """Heads of 64 channels: with 16, the scales alone would take the budget."""
    config = config_of(name, window=96, width=256, channels=64)
    model, _ = hf.load(str(save_random(config, tmp_path / name)))
    kv, view = hf.capture(model, tokens(240), cache_dtype=torch.bfloat16)
    plan = kvprism.plan(view, "spectrum", 0.30)
    assert 0.29 < plan.fraction <= 0.30 and plan.shape == hf.shape_of(model, 240)
    restored = after_the_wire(kv, plan)
    for sent, got in zip(kv.layers, restored.layers, strict=True):
        assert torch.equal(sent.positions, got.positions)
        for component, x in sent.components.items():
            error = (x.float() - got.components[component].float()).abs()
            assert error.max() > 0
            assert (error <= INT4_ERROR * x.float().abs().amax(-1, keepdim=True)).all()
    cache = hf.restore(model, restored)
    logits = model(tokens(9, 5), **cache.kwargs).logits
    assert logits.isfinite().all() and cache.get_seq_length() == 249


@each_family
@pytest.mark.parametrize("policy", ["sinks-recent", "random-drop", "pdtrim"])
def test_dropping_on_the_wire_equals_masking_in_the_model(model, policy):
    """Kept rows travel native, in float32: half the tokens are all of the 16-bit reference."""
    prompt, after = tokens(N_PROMPT), tokens(40, 5)
    kv, view = hf.capture(model, prompt)
    restored = after_the_wire(kv, kvprism.plan(view, policy, 1.0))
    n_kept = [len(positions) for positions in kept_of(restored)]
    assert all(0 < n < len(layer.positions) for n, layer in zip(n_kept, kv.layers, strict=True))
    got = model(after, **hf.restore(model, restored).kwargs).logits
    want = recompute.after_dropping(model, kept_of(restored), prompt, after)
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    complete = recompute.after_dropping(model, kept_of(kv), prompt, after)
    assert (want - complete).abs().max() > 100 * ATOL


@each_family
def test_between_two_workers_layers_arrive_over_their_own_tokens(checkpoints, name):
    model, tokenizer = hf.load(checkpoints[name])
    kv, view = hf.capture(model, tokens(N_PROMPT))
    plan = kvprism.plan(view, "raw")
    options = {"fingerprint": hf.fingerprint(model, tokenizer)}
    with (
        kvprism.Receiver(bytes(32), expected=hf.shape_of(model, 1), **options) as receiver,
        ThreadPoolExecutor(1) as pool,
    ):
        received = pool.submit(receiver.receive, 10.0)
        with kvprism.Sender(receiver.address, bytes(32), **options) as sender:
            sent = sender.send(kv, plan)
        got = received.result()
    assert sent.wire_nbytes == got.wire_nbytes == plan.nbytes
    question = tokens(9, 5)
    want = model(question, **hf.restore(model, kv).kwargs).logits
    assert torch.equal(model(question, **hf.restore(model, got.kv).kwargs).logits, want)
