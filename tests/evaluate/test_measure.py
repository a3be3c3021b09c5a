"""Controls of the measurement: what must be zero is zero, what must be worse is worse."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.evaluate.arms import Arm, arms_of, through_the_wire
from kvprism.evaluate.haystack import generated_ids, needle_case
from kvprism.evaluate.measure import (
    Case,
    LoadedModel,
    Outcome,
    asked_about,
    continue_on,
    divergence,
    measure,
)
from kvprism.evaluate.needle import case_of
from kvprism.evaluate.ruler import Ruler, RulerId
from kvprism.integrations.hf import capture
from kvprism.score import window_attention


@pytest.fixture(scope="module")
def case(subject: LoadedModel) -> Case:
    ids = torch.from_numpy(generated_ids(subject.tokenizer, 460, np.random.default_rng(0))[:460])
    return Case(ids[:395], ids[395:], (slice(1, 65),))


def outcomes(subject: LoadedModel, case: Case, arms: tuple[Arm, ...]) -> dict[str, Any]:
    return {arm.policy: outcome for arm, outcome in measure(subject.model, case, arms)}


def test_raw_through_the_wire_changes_no_logit(subject: LoadedModel, case: Case) -> None:
    kv, view = capture(subject.model, case.context, cache_dtype=torch.bfloat16)
    restored, _ = through_the_wire(kv, view, Arm("raw"))
    without, within = (continue_on(subject.model, cache, case.fed) for cache in (kv, restored))
    assert torch.equal(without, within)
    assert divergence(without, within) == ((0.0,) * len(case.fed), 0)


def test_coarser_codes_and_dropping_are_worse(subject: LoadedModel, case: Case) -> None:
    found = outcomes(subject, case, arms_of(["raw", "int8", "int4", "random-drop"], ["0.27"]))
    kl = {policy: sum(outcome.kl) for policy, outcome in found.items()}
    assert 0 == kl["raw"] < 10 * kl["int8"] < kl["int4"] < kl["random-drop"] / 2
    assert 0 == found["raw"].flips < found["random-drop"].flips


def test_sizes_are_those_of_the_stream_and_of_memory(subject: LoadedModel, case: Case) -> None:
    found = outcomes(subject, case, arms_of(["raw", "int4", "sinks-recent"], ["0.5"]))
    for outcome in found.values():
        assert outcome.reference_bytes == outcome.native_bytes == 395 * 2048
    assert found["raw"].wire_bytes > found["raw"].reference_bytes
    assert found["int4"].wire_bytes < 0.3 * found["int4"].reference_bytes
    assert found["int4"].resident_bytes == found["raw"].resident_bytes == 395 * 2048
    assert found["sinks-recent"].resident_bytes < 0.5 * 395 * 2048


def test_the_capture_has_what_the_arms_need(subject: LoadedModel, case: Case) -> None:
    found = outcomes(subject, case, arms_of(["h2o", "expected-attention", "tova"], ["0.4"]))
    for policy, outcome in found.items():
        assert policy == "raw" or outcome.wire_bytes <= 0.4 * outcome.reference_bytes
        assert sum(outcome.kl) > 0 or policy == "raw"
    # One set of tokens for all heads frees what it saves; heads of their own are padded.
    shared, by_head = (found[name].resident_bytes for name in ("tova", "h2o"))
    assert shared < 0.4 * 395 * 2048 < by_head < 395 * 2048


def test_a_budget_that_is_too_small_is_an_answer(subject: LoadedModel, case: Case) -> None:
    found = outcomes(subject, case, arms_of(["spectrum", "sinks-recent"], ["0.1"]))
    assert isinstance(found["spectrum"], BudgetTooSmall)
    assert isinstance(found["sinks-recent"], Outcome)


def test_raw_figures_are_those_of_the_model_alone(subject: LoadedModel, case: Case) -> None:
    """With a float32 cache; two prefill shapes differ by float32 rounding only."""
    arms = arms_of(["raw"], [])
    [(_, outcome)] = measure(subject.model, case, arms, cache_dtype="float32")
    assert isinstance(outcome, Outcome)
    with torch.no_grad():
        logits = subject.model(torch.cat([case.context, case.fed])[None]).logits[
            0, -len(case.fed) :
        ]
    targets = case.continuation[1:]
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert outcome.nll == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.targets == len(targets) == len(outcome.kl)


def test_exact_match_is_what_greedy_decoding_gives(subject: LoadedModel) -> None:
    seen = set()
    for seed in range(2):
        needle = needle_case(subject.tokenizer, 300, 0.3, 0, seed)
        arms = arms_of(["raw", "sinks-recent"], ["0.3"])
        kv, view = capture(
            subject.model, torch.from_numpy(needle.context_ids), cache_dtype=torch.bfloat16
        )
        for arm, outcome in measure(subject.model, case_of(needle), arms):
            restored, _ = through_the_wire(kv, view, arm)
            answer = greedy(subject.model, restored, needle.question_ids, len(needle.answer_ids))
            assert isinstance(outcome, Outcome)
            assert outcome.exact == (answer == needle.answer_ids.tolist())
            seen.add(outcome.exact)
    assert seen == {True, False}


def greedy(model: Any, kv: Any, question: np.ndarray, n: int) -> list[int]:
    fed = question.tolist()
    for _ in range(n):
        fed.append(int(continue_on(model, kv, torch.tensor(fed))[-1].argmax()))
    return fed[-n:]


def test_every_answer_is_judged_by_what_greedy_decoding_makes_of_it(subject: LoadedModel) -> None:
    """After the right answers to what comes before it: some are right, and without cache none."""
    arms = arms_of(["raw", "random-drop"], ["0.1"])
    task = Ruler(subject, arms, lengths=(256,), subtasks=["copying"])
    case = task.case(RulerId(256, "copying", 10)).case
    kv, view = capture(subject.model, case.context, cache_dtype=torch.bfloat16)
    seen = set()
    for arm, outcome in measure(subject.model, case, arms):
        restored, _ = through_the_wire(kv, view, arm)
        found = []
        for answer in case.answers:
            before, expected = case.continuation[: answer.start], case.continuation[answer]
            answered = greedy(subject.model, restored, before.numpy(), len(expected))
            found.append(answered == expected.tolist())
        assert isinstance(outcome, Outcome)
        assert (outcome.answers, outcome.right) == (7, sum(found))
        assert outcome.targets == sum(answer.stop - answer.start for answer in case.answers)
        assert outcome.exact == all(found)
        seen |= set(found)
    assert seen == {True, False}


def question_case(subject: LoadedModel) -> Case:
    task = Ruler(subject, arms_of(["raw"], []), lengths=(400,), subtasks=["multi-key"])
    return task.case(RulerId(400, "multi-key", 3)).case


def test_a_known_question_changes_the_plans_that_rank_by_attention_and_nothing_else(
    subject: LoadedModel,
) -> None:
    case = question_case(subject)
    arms = arms_of(["raw", "int4", "random-tiers", "spectrum", "spectrum-2tier"], ["0.3"])
    blind, aware = (
        {arm.policy: found for arm, found in measure(subject.model, case, arms, query_aware=known)}
        for known in (False, True)
    )
    assert {policy for policy in blind if blind[policy] != aware[policy]} == {
        "spectrum",
        "spectrum-2tier",
    }


def test_the_question_looks_at_the_context_alone_and_at_all_of_it(subject: LoadedModel) -> None:
    """Softmax over the context of the queries that the model itself has after it."""
    case = question_case(subject)
    _, view = capture(subject.model, case.context)
    _, whole = capture(
        subject.model, torch.cat([case.context, case.question]), window=len(case.question)
    )
    for layer, after, own in zip(asked_about(subject.model, case, view), whole, view, strict=True):
        assert layer.kv is own.kv
        keys = own.kv.components["k"]
        assert after.queries is not None
        groups = after.queries.unflatten(0, (len(keys), -1))
        logits = torch.einsum("hgwc,htc->hgwt", groups, keys) * layer.softmax_scale
        expected = logits.softmax(dim=-1).mean(dim=(1, 2))
        assert torch.allclose(window_attention(layer), expected, rtol=1e-4, atol=1e-7)


def test_divergence_is_that_of_the_definition() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    kl, flips = divergence(p.log()[None], q.log()[None])
    assert kl[0] == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert flips == 1


def test_divergence_resolves_what_float32_would_not() -> None:
    """KL is half the variance of a small change of logits: here 5e-9, under float32 noise."""
    logits = torch.randn(100, 2048, generator=torch.Generator().manual_seed(0)).double()
    changed = logits.clone()
    changed[:, ::2] += 2e-4
    kl, _ = divergence(logits, changed)
    share = logits.softmax(-1)[:, ::2].sum(-1)
    expected = 0.5 * (2e-4) ** 2 * share * (1 - share)
    assert kl == pytest.approx(expected.tolist(), rel=1e-3)


def test_divergence_does_not_depend_on_the_chunks() -> None:
    a, b = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(0))
    whole, flips = divergence(a, b)
    single = [divergence(x[None], y[None]) for x, y in zip(a, b, strict=True)]
    assert whole == pytest.approx([kl[0] for kl, _ in single], rel=1e-5)
    assert flips == sum(flip for _, flip in single)


def test_logits_that_are_not_finite_are_an_error(subject: LoadedModel, case: Case) -> None:
    broken = copy.deepcopy(subject.model)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(BadInput, match="policy 'raw' at budget None: the model's logits are not"):
        list(measure(broken, case, arms_of(["raw"], [])))


def test_an_unknown_cache_dtype_is_refused(subject: LoadedModel, case: Case) -> None:
    with pytest.raises(BadInput, match="float8"):
        list(measure(subject.model, case, arms_of(["raw"], []), cache_dtype="float8"))
