"""The decode phase: what layers hold after every call, and that attention is to that alone."""

import math

import pytest
import recompute
import torch
from configs import SLIDING
from samples import N_PROMPT, tokens
from test_restored_heads import ATOL, by_head

from kvprism.codec.stream import decode, encode
from kvprism.errors import BadInput, PositionMismatch
from kvprism.integrations import hf
from kvprism.integrations.retaining import RetainingLayer
from kvprism.planning import plan
from kvprism.retention import FULL_KV, Retention, decode_policies
from kvprism.state import with_mass

BUDGET, STEPS = 36, 12
EVICTING = [name for name in decode_policies() if name != "full"]


def steps(model, cache, new):
    """Logits of tokens fed one by one, and what each layer held after every step."""
    logits, held = [], []
    for token in new.split(1, dim=1):
        logits.append(model(token, **cache.kwargs).logits[0])
        held.append([rows_of(layer) for layer in cache.layers])
    return torch.cat(logits), held


def rows_of(layer):
    """The positions that each head holds."""
    if layer.held is None:
        return [layer.positions.tolist()] * layer.keys.shape[1]
    return [layer.positions[row].tolist() for row in layer.held]


def masks_of(model, before, held):
    """Per layer `[q_head, query, position]`: a step sees what was held before it, and itself."""
    n_tokens, masks = N_PROMPT + len(held), []
    for i, window in enumerate(recompute.windows(model)):
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        shape = (model.config.num_attention_heads, n_tokens, n_tokens)
        mask = torch.ones(shape, dtype=torch.bool).tril()
        for step, rows in enumerate([before, *held[:-1]]):
            at = N_PROMPT + step
            mask[:, at, :at] = False
            for head, positions in enumerate(rows[i]):
                mask[head * group : (head + 1) * group, at, positions] = True
        masks.append(mask if window is None else mask.triu(1 - window))
    return masks


@pytest.mark.parametrize(("policy", "ragged"), [("h2o", True), ("tova", False)])
def test_attention_is_to_what_is_held_at_true_positions(model, attention, policy, ragged):
    model.set_attn_implementation(attention)
    kv = hf.capture(model, tokens(N_PROMPT))[0]
    kv = by_head(kv) if ragged else kv
    cache = hf.restore(model, kv, Retention(policy, BUDGET))
    before, new = [rows_of(layer) for layer in cache.layers], tokens(STEPS, 5)
    got, held = steps(model, cache, new)
    ids = torch.cat([tokens(N_PROMPT), new], dim=1)[0]
    want = recompute.logits(model, ids, masks_of(model, before, held))[N_PROMPT:]
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    assert cache.get_seq_length() == N_PROMPT + STEPS


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("ragged", [False, True])
def test_no_head_holds_more_than_its_budget_after_any_call(llama, policy, ragged):
    kv = hf.capture(llama, tokens(N_PROMPT))[0]
    kv = by_head(kv) if ragged else kv
    retention = Retention(policy, BUDGET)
    cache = hf.restore(llama, kv, retention)
    _, held = steps(llama, cache, tokens(STEPS, 5))
    for step, layers in enumerate(held):
        newest = N_PROMPT + step
        for heads in layers:
            counts = [len(positions) for positions in heads]
            if retention.row.heads in ("shared", "even"):
                assert max(counts) <= BUDGET
            else:
                assert sum(counts) <= BUDGET * len(counts)
            for positions in heads:
                recent = range(newest - min(step, retention.row.recent - 1), newest + 1)
                assert set(recent) <= set(positions)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == layer.values.shape[2] == len(layer.positions)


@pytest.mark.parametrize("policy", EVICTING)
def test_a_budget_that_holds_everything_changes_nothing(llama, policy):
    kv, new = hf.capture(llama, tokens(N_PROMPT))[0], tokens(STEPS, 5)
    plain, _ = steps(llama, hf.restore(llama, kv), new)
    got, _ = steps(llama, hf.restore(llama, kv, Retention(policy, N_PROMPT + STEPS)), new)
    assert torch.equal(got, plain)


class Observed:
    """What `RetainingLayer.observe` of one layer saw, and held afterwards."""

    def __init__(self, monkeypatch, layer_id):
        self.calls = []
        original = RetainingLayer.observe

        def observe(layer, query, mask, softmax_scale, softcap):
            keys, rows = layer.keys[0].clone(), rows_of(layer)
            positions = layer.positions.tolist()
            original(layer, query, mask, softmax_scale, softcap)
            if layer._layer_id == layer_id:
                self.calls.append((query[0], keys, positions, rows, softmax_scale, rows_of(layer)))

        monkeypatch.setattr(RetainingLayer, "observe", observe)


def attention_of(query, keys, positions, rows, scale):
    """Query head -> position -> probability, number by number, for the one query of a call."""
    group, paid = len(query) // len(keys), []
    for q_head in range(len(query)):
        head = q_head // group
        logits = {
            p: scale * float(query[q_head, 0].double() @ keys[head, j].double())
            for j, p in enumerate(positions)
            if p in rows[head]
        }
        total = sum(math.exp(x - max(logits.values())) for x in logits.values())
        paid.append({p: math.exp(x - max(logits.values())) / total for p, x in logits.items()})
    return paid


@pytest.mark.parametrize(("ragged", "came"), [(False, False), (True, False), (False, True)])
def test_h2o_evicts_what_got_least_from_all_queries_so_far(llama, monkeypatch, ragged, came):
    """From the prompt's queries on where their mass came with the cache."""
    kv, view = hf.capture(llama, tokens(N_PROMPT), signals={"mass"})
    kv = by_head(kv) if ragged else kv
    if came:
        state, views = with_mass(kv, view)
        kv = decode(encode(state, plan(views, "raw")))
    cache = hf.restore(llama, kv, Retention("h2o", BUDGET))
    seen = Observed(monkeypatch, layer_id=1)
    steps(llama, cache, tokens(STEPS, 5))
    mass = [{} for _ in kv.layers[1].components["k"]]
    if came:
        mass = [dict(enumerate(head)) for head in view[1].mass.double().tolist()]
    for query, keys, positions, rows, scale, after in seen.calls:
        paid = attention_of(query, keys, positions, rows, scale)
        group = len(query) // len(keys)
        for head, own in enumerate(mass):
            for p in rows[head]:
                got = [paid[head * group + g][p] for g in range(group)]
                own[p] = own.get(p, 0.0) + sum(got) / group
            recent = [p for p in positions[-32:] if p in rows[head]]
            others = [p for p in rows[head] if p not in recent]
            best = sorted(others, key=lambda p: (-own[p], p))[: BUDGET - 32]
            if any(len(row) > BUDGET for row in rows):
                assert after[head] == sorted([*recent, *best])
            else:
                assert after[head] == rows[head]


def test_tova_evicts_what_the_last_query_ignores(llama, monkeypatch):
    cache = hf.restore(llama, hf.capture(llama, tokens(N_PROMPT))[0], Retention("tova", BUDGET))
    seen = Observed(monkeypatch, layer_id=1)
    steps(llama, cache, tokens(STEPS, 5))
    for query, keys, positions, rows, scale, after in seen.calls:
        paid = attention_of(query, keys, positions, rows, scale)
        mean = {p: sum(head[p] for head in paid) / len(paid) for p in positions}
        best = sorted(positions[:-1], key=lambda p: (-mean[p], p))[: BUDGET - 1]
        assert after == [sorted([*best, positions[-1]])] * len(keys)


def test_layers_have_policies_and_budgets_of_their_own(llama):
    kv = hf.capture(llama, tokens(N_PROMPT))[0]
    n_layers = len(kv.layers)
    retentions = [FULL_KV, Retention("streaming-llm", 40), *[Retention("tova", 9)] * n_layers]
    cache = hf.restore(llama, kv, tuple(retentions[:n_layers]))
    steps(llama, cache, tokens(3, 5))
    lengths = [len(layer.positions) for layer in cache.layers]
    assert lengths[:2] == [N_PROMPT + 3, 40] and set(lengths[2:]) <= {9}
    newest = N_PROMPT + 2
    assert rows_of(cache.layers[1])[0] == [0, 1, 2, 3, *range(newest - 35, newest + 1)]
    with pytest.raises(BadInput, match=f"one for each of {n_layers} layers, got 1"):
        hf.restore(llama, kv, (FULL_KV,))


def test_a_call_of_many_tokens_evicts_when_it_ends(llama):
    kv, new = hf.capture(llama, tokens(N_PROMPT))[0], tokens(STEPS, 5)
    cache = hf.restore(llama, kv, Retention("h2o", BUDGET))
    plain = llama(new, **hf.restore(llama, kv).kwargs).logits
    assert torch.equal(llama(new, **cache.kwargs).logits, plain)
    assert all(len(head) == BUDGET for layer in cache.layers for head in rows_of(layer))


def test_transformers_generates_on_it(llama):
    prompt = tokens(N_PROMPT)
    cache = hf.restore(llama, hf.capture(llama, prompt)[0], Retention("h2o", BUDGET))
    cache.crop(-1)
    out = llama.generate(prompt, **cache.kwargs, max_new_tokens=8, do_sample=False)
    assert out.shape[1] == N_PROMPT + 8
    assert all(len(head) <= BUDGET for layer in cache.layers for head in rows_of(layer))


def test_what_was_seen_cannot_be_taken_back_but_all_of_it_can(llama):
    kv = hf.capture(llama, tokens(N_PROMPT))[0]
    cache = hf.restore(llama, kv, Retention("h2o", BUDGET))
    llama(tokens(3, 5), **cache.kwargs)
    with pytest.raises(PositionMismatch, match=r"h2o@36tok.*has seen position \d+; restore it"):
        cache.crop(-1)
    cache.crop(-cache.get_seq_length())
    fresh = llama(tokens(5, 6)).logits
    torch.testing.assert_close(llama(tokens(5, 6), **cache.kwargs).logits, fresh, atol=ATOL, rtol=0)


def test_a_call_at_another_position_is_refused_and_leaves_the_cache_as_it_was(llama):
    kv, new = hf.capture(llama, tokens(N_PROMPT))[0], tokens(2, 5)
    cache = hf.restore(llama, kv, Retention("h2o", BUDGET))
    want, _ = steps(llama, hf.restore(llama, kv, Retention("h2o", BUDGET)), new)
    first = llama(new[:, :1], **cache.kwargs).logits[0]
    with pytest.raises(PositionMismatch, match=f"goes on at position {N_PROMPT + 1}"):
        llama(new, **cache.kwargs, position_ids=torch.tensor([[3, 4]]))
    second = llama(new[:, 1:], **cache.kwargs).logits[0]
    assert torch.equal(torch.cat([first, second]), want)


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "knorm"])
def test_layers_with_a_window_hold_no_more_than_it_shows(model, policy):
    budget = 33 if policy != "knorm" else 6
    cache = hf.restore(model, hf.capture(model, tokens(N_PROMPT))[0], Retention(policy, budget))
    _, held = steps(model, cache, tokens(STEPS, 5))
    assert all(len(head) <= budget for layers in held for heads in layers for head in heads)
