"""Restored caches: bit-equal when complete, equal to masked attention when tokens were dropped.

What must be bit-equal is computed twice by one model object, first before kvprism touches it: equal
weights at another alignment in memory already change the last bits of a matrix product.
"""

import gc
import weakref

import pytest
import recompute
import torch
from configs import FULL
from samples import N_PROMPT, drop, kept_of, remove, tokens
from transformers import DynamicCache

from kvprism.errors import BadInput, PositionMismatch, ShapeMismatch
from kvprism.integrations import hf
from kvprism.integrations.restored import CACHE
from kvprism.tensors import LayerKV, RequestKV

ATOL = 1e-4  # of logits in float32: the project's definition of "dropping equals masked attention"
DTYPES = [torch.float32, torch.bfloat16]
# A full sliding window has let go of what an earlier position would see: no crop in these.
without_windows = pytest.mark.parametrize("name", ["tiny", *FULL])


# Identity: bit-equal to the same calls without kvprism


@pytest.mark.parametrize("dtype", DTYPES)
def test_continuations_of_a_complete_cache_are_bit_equal_to_plain_transformers(
    checkpoints, name, attention, dtype
):
    model, _ = hf.load(checkpoints[name], dtype)
    model.set_attn_implementation(attention)
    news = [tokens(n_new, seed) for seed, n_new in enumerate((15, 1, 40, 1))]
    plain = getattr(model(tokens(N_PROMPT), use_cache=True), CACHE)
    want = [model(new, **{CACHE: plain}).logits for new in news]
    assert model.config._attn_implementation == attention  # not yet wrapped

    cache = hf.restore(model, hf.capture(model, tokens(N_PROMPT))[0])
    got = [model(new, **cache.kwargs).logits for new in news]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_generation_is_equal_to_plain_transformers(checkpoints, name, attention, dtype):
    model, _ = hf.load(checkpoints[name], dtype)
    model.set_attn_implementation(attention)
    prompt, options = tokens(N_PROMPT), {"max_new_tokens": 8, "do_sample": False}
    longer = torch.cat([prompt, tokens(7, 3)], dim=1)
    plain = getattr(model(prompt, use_cache=True), CACHE)
    want = model.generate(longer, **{CACHE: plain}, **options)
    assert want.shape[1] > longer.shape[1]

    cache = hf.restore(model, hf.capture(model, prompt)[0])
    assert torch.equal(model.generate(longer, **cache.kwargs, **options), want)


@without_windows
def test_generation_from_the_prompt_alone_recomputes_its_last_position(model):
    prompt, options = tokens(N_PROMPT), {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(prompt, **options)
    cache = hf.restore(model, hf.capture(model, prompt)[0])
    cache.crop(-1)
    assert torch.equal(model.generate(prompt, **cache.kwargs, **options), want)


def test_a_prompt_captured_without_its_last_token_is_generated_from_at_once(model):
    prompt, options = tokens(N_PROMPT), {"max_new_tokens": 6, "do_sample": False}
    plain = getattr(model(prompt[:, :-1], use_cache=True), CACHE)
    want = model.generate(prompt, **{CACHE: plain}, **options)
    cache = hf.restore(model, hf.capture(model, prompt[:, :-1])[0])
    assert torch.equal(model.generate(prompt, **cache.kwargs, **options), want)


def test_wrapping_leaves_every_other_use_of_the_model_bit_identical(checkpoints, name, attention):
    model, _ = hf.load(checkpoints[name])
    model.set_attn_implementation(attention)
    batch = tokens(80).reshape(2, 40)
    padding = torch.ones_like(batch)
    padding[0, :11] = 0
    uses = (
        lambda m: m(batch).logits,
        lambda m: m(batch, attention_mask=padding, use_cache=False).logits,
        lambda m: m.generate(batch, attention_mask=padding, max_new_tokens=5, do_sample=False),
        lambda m: m.generate(batch[:1], num_beams=3, max_new_tokens=5, do_sample=False),
        lambda m: m(batch, output_hidden_states=True).hidden_states[-2],
    )
    before = [use(model) for use in uses]
    hf.wrap_attention(model)
    hf.wrap_attention(model)
    hf.capture(model, tokens(9))
    assert model.config._attn_implementation == f"kvprism_{attention}"
    assert all(torch.equal(use(model), want) for use, want in zip(uses, before, strict=True))


def test_a_wrapped_model_is_saved_without_a_trace(llama, tmp_path):
    hf.wrap_attention(llama)
    llama.save_pretrained(tmp_path)
    assert "kvprism" not in (tmp_path / "config.json").read_text()


# Dropping: equal to masked attention


@pytest.mark.parametrize("n_new", [1, 15, 100])
def test_dropping_equals_masking_each_layer_for_itself(model, attention, n_new):
    model.set_attn_implementation(attention)
    prompt, after = tokens(N_PROMPT), tokens(n_new + 9, 5)
    complete, _ = hf.capture(model, prompt)
    kv = drop(complete)
    assert len({len(positions) for positions in kept_of(kv)}) == len(kv.layers)
    want = recompute.after_dropping(model, kept_of(kv), prompt, after)
    cache = hf.restore(model, kv)
    first = model(after[:, :n_new], **cache.kwargs).logits
    second = model(after[:, n_new:], **cache.kwargs).logits  # the cache goes on being right
    torch.testing.assert_close(torch.cat([first, second], 1), want, atol=ATOL, rtol=0)
    without_drops = recompute.after_dropping(model, kept_of(complete), prompt, after)
    assert (want - without_drops).abs().max() > 100 * ATOL  # or this test could not fail


def test_a_layer_that_lost_every_token_attends_to_the_new_ones_only(model):
    prompt, after = tokens(N_PROMPT), tokens(6, 5)
    complete, _ = hf.capture(model, prompt)
    rows = {name: x[:, :0] for name, x in complete.layers[1].components.items()}
    empty = LayerKV(1, rows, complete.layers[1].positions[:0])
    kv = RequestKV((complete.layers[0], empty, *complete.layers[2:]), complete.next_position)
    got = model(after, **hf.restore(model, kv).kwargs).logits
    torch.testing.assert_close(
        got, recompute.after_dropping(model, kept_of(kv), prompt, after), atol=ATOL, rtol=0
    )


def test_a_padding_mask_of_the_true_length_is_honoured_after_dropping(model, attention):
    model.set_attn_implementation(attention)
    prompt, after = tokens(N_PROMPT), tokens(6, 5)
    kv = drop(hf.capture(model, prompt)[0])
    hidden = int(kept_of(kv)[0][3])
    visible = torch.ones(1, N_PROMPT + 6, dtype=torch.long)
    visible[0, hidden] = 0
    cache = hf.restore(model, kv)
    got = model(after, **cache.kwargs, attention_mask=visible).logits
    without = RequestKV(tuple(remove(layer, hidden) for layer in kv.layers), kv.next_position)
    torch.testing.assert_close(
        got, recompute.after_dropping(model, kept_of(without), prompt, after), atol=ATOL, rtol=0
    )


def check_generation(model, kv: RequestKV, whole: torch.Tensor, n_back: int) -> None:
    """Greedy tokens after `whole` are those of single steps, and those of a masked recompute."""
    cache, stepped = hf.restore(model, kv), hf.restore(model, kv)
    for each in (cache, stepped):
        each.crop(-n_back)
    out = model.generate(whole, **cache.kwargs, max_new_tokens=6, do_sample=False)
    start = stepped.get_seq_length()
    assert start == N_PROMPT - n_back
    for position in range(start, out.shape[1] - 1):
        here = torch.tensor([[position]])
        step = model(out[:, [position]], **stepped.kwargs, position_ids=here)
        if position >= whole.shape[1] - 1:
            assert int(step.logits.argmax()) == int(out[0, position + 1])
    kept = [positions[positions < start] for positions in kept_of(kv)]
    masks = recompute.masks_after_dropping(model, kept, start, out.shape[1])
    want = recompute.logits(model, out[0], masks)[whole.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(out[0, whole.shape[1] :], want)


def test_generation_after_dropping_goes_on_at_the_true_next_position(model, attention):
    model.set_attn_implementation(attention)
    prompt = tokens(N_PROMPT)
    kv = drop(hf.capture(model, prompt)[0])
    check_generation(model, kv, torch.cat([prompt, tokens(7, 6)], dim=1), n_back=0)


@without_windows
def test_generation_after_dropping_goes_on_from_the_prompt_alone(model, attention):
    model.set_attn_implementation(attention)
    kv = drop(hf.capture(model, tokens(N_PROMPT))[0])
    check_generation(model, kv, tokens(N_PROMPT), n_back=1)


@without_windows  # transformers' own sliding layers count keys, not positions
def test_equal_drops_in_all_layers_equal_a_shortened_plain_cache_with_explicit_positions(model):
    kv, _ = hf.capture(model, tokens(N_PROMPT))
    for position in (3, 17, 59):
        kv = RequestKV(tuple(remove(layer, position) for layer in kv.layers), kv.next_position)
    short = DynamicCache(config=model.config)
    for layer in kv.layers:
        short.update(layer.components["k"][None], layer.components["v"][None], layer.layer_id)
    new = tokens(1, 5)
    model.set_attn_implementation("sdpa")
    want = model(new, **{CACHE: short}, position_ids=torch.tensor([[N_PROMPT]])).logits
    assert torch.equal(model(new, **hf.restore(model, kv).kwargs).logits, want)


# The cache as transformers' own code handles it


def test_a_request_can_be_restored_many_times_and_is_never_written_to(model):
    kv = drop(hf.capture(model, tokens(N_PROMPT))[0])
    before = [x.clone() for layer in kv.layers for x in layer.components.values()]
    caches = [hf.restore(model, kv) for _ in range(3)]
    question = tokens(12, 7)
    first = model(question, **caches[0].kwargs).logits
    caches[2].reset()
    assert torch.equal(model(question, **caches[1].kwargs).logits, first)
    whole = torch.cat([tokens(N_PROMPT), question], dim=1)
    forked = [
        model.generate(whole, **hf.restore(model, kv).kwargs, max_new_tokens=4) for _ in range(2)
    ]
    assert torch.equal(*forked)
    after = [x for layer in kv.layers for x in layer.components.values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_cache_that_nobody_holds_is_freed_at_once(llama):
    cache = hf.restore(llama, hf.capture(llama, tokens(9))[0])
    llama(tokens(2), **cache.kwargs)
    layer = weakref.ref(cache.layers[0])
    gc.disable()  # reference counts alone must do it
    del cache
    freed = layer() is None
    gc.enable()
    assert freed


def test_a_reset_cache_starts_again_from_nothing(llama):
    want = llama(tokens(20, 4)).logits
    cache = hf.restore(llama, hf.capture(llama, tokens(N_PROMPT))[0])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(llama(tokens(20, 4), **cache.kwargs).logits, want)


def test_crop_counts_positions_whether_they_were_kept_or_not(llama):
    prompt = tokens(N_PROMPT)
    kv = drop(hf.capture(llama, prompt)[0])
    cache = hf.restore(llama, kv)
    cache.crop(-25)
    assert cache.get_seq_length() == N_PROMPT - 25
    kept = [positions[positions < N_PROMPT - 25] for positions in kept_of(kv)]
    assert [layer.keys.shape[2] for layer in cache.layers] == [len(positions) for positions in kept]
    after = tokens(6, 5)
    want = recompute.after_dropping(llama, kept, prompt[:, :-25], after)
    got = llama(after, **cache.kwargs).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    for amount in (1, -(N_PROMPT + 1)):
        with pytest.raises(BadInput, match="crop"):
            cache.crop(amount)


def test_repeated_and_reordered_rows_stay_right_for_beam_search(llama):
    kv = drop(hf.capture(llama, tokens(N_PROMPT))[0])
    cache, beams = hf.restore(llama, kv), hf.restore(llama, kv)
    beams.batch_repeat_interleave(2)
    one, other = tokens(4, 8), tokens(4, 9)
    llama(torch.cat([one, other]), **beams.kwargs)
    beams.reorder_cache(torch.tensor([1, 1]))
    llama(other, **cache.kwargs)
    last = tokens(3, 10)
    want = llama(last, **cache.kwargs).logits.expand(2, -1, -1)
    got = llama(last.expand(2, -1), **beams.kwargs).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("dropping", [False, True])
def test_a_continuation_elsewhere_is_refused_and_leaves_the_cache_usable(llama, dropping):
    prompt, new = tokens(N_PROMPT), tokens(2, 5)
    kv, _ = hf.capture(llama, prompt)
    kv = drop(kv) if dropping else kv
    cache = hf.restore(llama, kv)
    with pytest.raises(PositionMismatch, match=f"goes on at position {N_PROMPT}.*starts at 31"):
        llama(new, **cache.kwargs, position_ids=torch.tensor([[31, 32]]))
    # transformers would feed the whole prompt a second time, after itself
    with pytest.raises(PositionMismatch, match=r"cache.crop\(-1\)"):
        llama.generate(prompt, **cache.kwargs, max_new_tokens=3)
    want = llama(new, **hf.restore(llama, kv).kwargs).logits
    assert torch.equal(llama(new, **cache.kwargs).logits, want)


def test_a_mask_of_the_kept_length_is_refused(llama):
    cache = hf.restore(llama, drop(hf.capture(llama, tokens(N_PROMPT))[0]))
    mask = torch.ones(1, 1, 2, 40, dtype=torch.bool)
    with pytest.raises(ShapeMismatch, match=r"has 40 columns.*62 true positions"):
        llama(tokens(2), **cache.kwargs, attention_mask=mask)
