"""Restored layers with a sliding window: it counts true positions, whatever was dropped."""

import pytest
import recompute
import torch
from configs import SLIDING, WINDOW
from samples import N_PROMPT, drop, kept_of, tokens

from kvprism.errors import PositionMismatch
from kvprism.integrations import hf
from kvprism.integrations.restored import CACHE
from kvprism.tensors import LayerKV, RequestKV

ATOL = 1e-4  # as in test_hf_restore

pytestmark = pytest.mark.parametrize("name", SLIDING)
around_the_window = pytest.mark.parametrize("n", [3, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1])


def slides(cache):
    return [layer for layer in cache.layers if layer.window is not None]


@around_the_window
def test_a_prompt_about_as_long_as_the_window_is_continued_bit_equal(model, attention, n):
    model.set_attn_implementation(attention)
    news = [tokens(n_new, seed) for seed, n_new in enumerate((1, 1, 1, 5, WINDOW + 9, 1))]
    plain = getattr(model(tokens(n), use_cache=True), CACHE)
    want = [model(new, **{CACHE: plain}).logits for new in news]
    cache = hf.restore(model, hf.capture(model, tokens(n))[0])
    got = [model(new, **cache.kwargs).logits for new in news]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@around_the_window
def test_dropped_tokens_leave_the_window_at_their_positions(model, attention, n):
    """One token at a time, until every prompt token has left: slots would leave it later."""
    model.set_attn_implementation(attention)
    prompt, after = tokens(n), tokens(WINDOW + 9, 5)
    kv = drop(hf.capture(model, prompt)[0])
    want = recompute.after_dropping(model, kept_of(kv), prompt, after)
    cache = hf.restore(model, kv)
    got = [model(after[:, [i]], **cache.kwargs).logits for i in range(after.shape[1])]
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=ATOL, rtol=0)


def test_a_window_from_which_all_was_dropped_sees_the_new_tokens_only(model):
    prompt, after = tokens(N_PROMPT), tokens(6, 5)
    complete, _ = hf.capture(model, prompt)
    windows = recompute.windows(model)
    layers = tuple(
        layer
        if window is None
        else LayerKV(
            layer.layer_id,
            {name: x[:, :0] for name, x in layer.components.items()},
            layer.positions[:0],
        )
        for layer, window in zip(complete.layers, windows, strict=True)
    )
    kv = RequestKV(layers, N_PROMPT)
    got = model(after, **hf.restore(model, kv).kwargs).logits
    want = recompute.after_dropping(model, kept_of(kv), prompt, after)
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


def test_what_has_left_the_window_is_let_go(model):
    cache = hf.restore(model, hf.capture(model, tokens(N_PROMPT))[0])
    for i in range(2 * WINDOW):
        model(tokens(1, i), **cache.kwargs)
        assert all(layer.keys.shape[2] == WINDOW for layer in slides(cache))
    assert cache.get_seq_length() == N_PROMPT + 2 * WINDOW


def test_a_full_window_goes_back_as_far_as_the_last_call_and_no_further(model):
    kv = drop(hf.capture(model, tokens(N_PROMPT))[0])
    cache = hf.restore(model, kv)
    refusal = (
        f"back from position {N_PROMPT} to {N_PROMPT - 1}.*window of {WINDOW}.*capture the first"
    )
    with pytest.raises(PositionMismatch, match=refusal):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [N_PROMPT] * 3
    model(tokens(12, 4), **cache.kwargs)
    with pytest.raises(PositionMismatch, match=f"to {N_PROMPT - 1}"):
        cache.crop(-13)
    cache.crop(-12)
    question = tokens(7, 5)
    want = model(question, **hf.restore(model, kv).kwargs).logits
    assert torch.equal(model(question, **cache.kwargs).logits, want)


def test_a_window_that_is_not_full_goes_back_freely(model):
    prompt, after = tokens(WINDOW - 1), tokens(6, 5)
    kv = drop(hf.capture(model, prompt)[0])
    cache = hf.restore(model, kv)
    cache.crop(-9)
    kept = [positions[positions < WINDOW - 10] for positions in kept_of(kv)]
    want = recompute.after_dropping(model, kept, prompt[:, :-9], after)
    got = model(after, **cache.kwargs).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


def test_a_reset_cache_starts_again_from_nothing(model):
    want = model(tokens(2 * WINDOW, 4)).logits
    cache = hf.restore(model, drop(hf.capture(model, tokens(N_PROMPT))[0]))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens(2 * WINDOW, 4), **cache.kwargs).logits, want)


@pytest.mark.parametrize("dropping", [False, True])
def test_a_continuation_elsewhere_is_refused_and_leaves_the_cache_usable(model, dropping):
    kv, _ = hf.capture(model, tokens(N_PROMPT))
    kv = drop(kv) if dropping else kv
    cache, new = hf.restore(model, kv), tokens(2, 5)
    with pytest.raises(PositionMismatch, match=f"goes on at position {N_PROMPT}.*starts at 31"):
        model(new, **cache.kwargs, position_ids=torch.tensor([[31, 32]]))
    want = model(new, **hf.restore(model, kv).kwargs).logits
    assert torch.equal(model(new, **cache.kwargs).logits, want)


def test_beams_stay_right(model):
    kv = drop(hf.capture(model, tokens(N_PROMPT))[0])
    cache, beams = hf.restore(model, kv), hf.restore(model, kv)
    beams.batch_repeat_interleave(2)
    one, other = tokens(4, 8), tokens(4, 9)
    model(torch.cat([one, other]), **beams.kwargs)
    beams.reorder_cache(torch.tensor([1, 1]))
    model(other, **cache.kwargs)
    last = tokens(3, 10)
    want = model(last, **cache.kwargs).logits.expand(2, -1, -1)
    got = model(last.expand(2, -1), **beams.kwargs).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
