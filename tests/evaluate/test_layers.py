"""Losses of evicted layers: what is measured is the model on that cache, and is kept."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import Arm, through_the_wire
from kvprism.evaluate.layers import (
    TEXT,
    CalibrationSet,
    DecodePhase,
    Document,
    LayerLosses,
    Ledger,
    Measured,
    key_of,
)
from kvprism.evaluate.measure import LoadedModel, continue_on, feed, score
from kvprism.evaluate.ruler import Ruler, RulerId
from kvprism.integrations.hf import capture, restore
from kvprism.layer_signals import attention_entropy
from kvprism.retention import FULL_KV, Retention
from kvprism.routes import FULL, LayerRoute
from kvprism.tensors import RequestKV

CONTEXT, LAYERS = 160, 4
KEPT = LayerRoute("tova", 64)


def calibration_of(subject: LoadedModel, text: Path, **settings: Any) -> CalibrationSet:
    given = {"context": CONTEXT, "continuation": 12, "n_documents": 2, "trials": 2}
    return CalibrationSet(subject, text, **{**given, "kinds": ("needle",), **settings})


@pytest.fixture(scope="module")
def losses(subject: LoadedModel, text_file: Path) -> LayerLosses:
    """The first text measured: full, one layer alone, and a whole policy."""
    calibration = calibration_of(subject, text_file)
    found = LayerLosses(calibration, Ledger(calibration.header, None), ["tova", "h2o"])
    subjects = [found.alone(1, KEPT), found.alone(3, KEPT), LayerRoute("tova", 80)]
    found.measure([Document(TEXT, 0), Document("needle", 0)], subjects)
    return found


def test_documents_alternate_between_the_halves(subject: LoadedModel, text_file: Path) -> None:
    calibration = calibration_of(subject, text_file, n_documents=3, kinds=("needle", "copying"))
    assert [(d.name, d.chooses) for d in calibration.documents] == [
        ("text-0", False), ("text-1", True), ("text-2", False), ("needle-0", False),
        ("needle-1", True), ("copying-0", False), ("copying-1", True),
    ]  # fmt: skip


def test_tasks_are_spread_over_depths_and_are_no_evaluations(
    subject: LoadedModel, text_file: Path
) -> None:
    calibration = calibration_of(subject, text_file, trials=11)
    evaluation = Ruler(subject, (), (CONTEXT,), ("needle",))
    ours = [calibration.case(Document("needle", n)).context for n in range(11)]
    theirs = [evaluation.case(RulerId(CONTEXT, "needle", n)).case.context for n in range(11)]
    assert not any(torch.equal(a, b) for a in ours for b in theirs)
    turned = Ruler(subject, (), (CONTEXT,), ("needle",), seed=2**63)
    depths = [
        next(d for d in range(11) if torch.equal(
            turned.case(RulerId(CONTEXT, "needle", d)).case.context, context))
        for context in ours
    ]  # fmt: skip
    assert sorted(depths) == list(range(11)) and max(depths[0::2]) - min(depths[0::2]) >= 8


def test_the_loss_is_the_models_on_that_cache(losses: LayerLosses) -> None:
    model, document = losses.calibration.subject.model, Document("needle", 0)
    case = losses.calibration.case(document)
    kv, view = capture(model, case.context, cache_dtype=torch.bfloat16)
    found = losses.ledger.of(document)
    for key, cache in {
        key_of(losses.full): kv,
        "tova@80": through_the_wire(kv, view, Arm("tova", "80tok"))[0],
    }.items():
        logits = continue_on(model, cache, case.fed)
        nll, right = score(logits, case.continuation, case.answers[0])
        assert (found[key].nll, found[key].right) == (pytest.approx(nll, rel=1e-5), right)
        assert found[key].targets == case.answers[0].stop - case.answers[0].start
        assert found[key].cosine is None


@pytest.mark.parametrize("policy", ["tova", "h2o"])
def test_a_decode_phase_is_the_models_on_the_whole_cache_that_evicts(
    losses: LayerLosses, policy: str
) -> None:
    """Once more as `eval --decode-policy` feeds it, mass through the wire; outputs by a hook."""
    model, document = losses.calibration.subject.model, Document(TEXT, 0)
    treatment = DecodePhase(losses.alone(3, LayerRoute(policy, 64)))
    losses.measure([document], [treatment])
    found = losses.ledger.of(document)[f"decode: 0-2: full, 3: {policy}@64"]
    case = losses.calibration.case(document)
    kv, view = capture(model, case.context, cache_dtype=torch.bfloat16, signals={"mass"})
    decode = (FULL_KV,) * 3 + (Retention(policy, 64),)
    arrived, _ = through_the_wire(kv, view, Arm("raw", decode=decode))
    outputs, nlls = [], []
    for cache, phase in ((kv, None), (arrived, decode)):
        seen: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_hook(
            lambda _module, _inputs, out, seen=seen: seen.append(
                (out[0] if isinstance(out, tuple) else out).flatten(0, -2)
            )
        )
        logits, _ = feed(model, cache, case.fed, phase)
        hook.remove()
        outputs.append(torch.cat(seen).double())
        nlls.append(score(logits, case.continuation, case.answers[0])[0])
    assert found.nll == pytest.approx(nlls[1], rel=1e-5) and nlls[1] != pytest.approx(nlls[0])
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(*outputs, strict=True)]
    assert found.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert found.cosine < 1


def test_one_layer_alone_is_evicted_and_its_output_compared(losses: LayerLosses) -> None:
    """By hand: attention of TOVA, 64 best tokens, and the layer's output by a hook."""
    model, document = losses.calibration.subject.model, Document(TEXT, 0)
    case = losses.calibration.case(document)
    kv, _ = capture(model, case.context, cache_dtype=torch.bfloat16)
    captured = losses._captured(document)
    evicted = captured.layer(1, KEPT)
    assert len(evicted.positions) == 64 and evicted.held is None
    assert captured.layer(0, LayerRoute(FULL)) is captured.kv.layers[0]
    mixed = RequestKV((kv.layers[0], evicted, *kv.layers[2:]), kv.next_position)
    outputs, nlls = [], []
    for cache in (kv, mixed):
        seen: list[torch.Tensor] = []
        hook = model.model.layers[1].register_forward_hook(
            lambda _module, _inputs, out, seen=seen: seen.append(
                out[0] if isinstance(out, tuple) else out
            )
        )
        logits = continue_on(model, cache, case.fed)
        hook.remove()
        outputs.append(seen[0].reshape(-1, seen[0].shape[-1]).double())
        nlls.append(score(logits, case.continuation, case.answers[0])[0])
    found = losses.ledger.of(document)[key_of(losses.alone(1, KEPT))]
    assert found.nll == pytest.approx(nlls[1], rel=1e-5) and nlls[1] != pytest.approx(nlls[0])
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(*outputs, strict=True)]
    assert found.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert found.cosine < 1


def test_entropies_are_of_the_making_texts(losses: LayerLosses) -> None:
    model, case = losses.calibration.subject.model, losses.calibration.case(Document(TEXT, 0))
    _, view = capture(model, case.context, signals={"mass"})
    expected = []
    for layer in view:
        assert layer.mass is not None
        expected.append(attention_entropy([layer.mass]))
    assert losses.entropies() == pytest.approx(expected, rel=1e-4)


def test_what_was_measured_is_kept_and_not_measured_again(
    subject: LoadedModel, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, path = calibration_of(subject, text_file), tmp_path / "records.jsonl"
    subjects = [(KEPT, *(LayerRoute(FULL),) * 3), (KEPT,) * 4]
    first = LayerLosses(calibration, Ledger(calibration.header, path), ["tova"])
    first.measure(calibration.documents, subjects[:1])
    text = path.read_text()
    # A line that was being written when the run ended is measured again.
    path.write_text(text + '{"document":"text-0","losses":{"0-3: to')
    again = LayerLosses(calibration, Ledger(calibration.header, path), ["tova"])
    assert path.read_text() == text
    with monkeypatch.context() as patched:
        patched.setattr(LayerLosses, "_captured", None)  # it would fail if it were called
        again.measure(calibration.documents, subjects[:1])
    assert again.ledger.losses == first.ledger.losses
    progress: list[tuple[int, int]] = []
    again.measure(
        calibration.documents, subjects, lambda done, total: progress.append((done, total))
    )
    assert progress == [(n, 4) for n in (1, 2, 3, 4)]
    assert len(path.read_text().splitlines()) == 1 + 4 + 4


def test_what_memory_does_not_keep_is_made_again(
    losses: LayerLosses, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, route = Document("needle", 1), (KEPT, LayerRoute("h2o", 90), KEPT, KEPT)
    treatments = [losses.alone(1, KEPT), route, (KEPT,) * 4]
    found = []
    for limit in (2**30, 0):
        monkeypatch.setattr("kvprism.evaluate.layers.KEPT_NBYTES", limit)
        again = LayerLosses(losses.calibration, Ledger(losses.calibration.header, None), ["h2o"])
        again.measure([document], treatments)
        assert (document.name in again._kept) == (limit > 0)
        found.append(again.ledger.of(document))
    assert found[0] == found[1] and len(found[0]) == 4


def test_records_of_something_else_are_refused(
    subject: LoadedModel, text_file: Path, tmp_path: Path
) -> None:
    header = calibration_of(subject, text_file).header
    path = tmp_path / "records.jsonl"
    Ledger(header, path).add(Measured("text-0"))
    with pytest.raises(BadInput, match=r"another run \(context: 160, now 200\)"):
        Ledger(calibration_of(subject, text_file, context=200).header, path)
    path.write_bytes(msgspec.json.encode(header) + b"\nnothing\n")
    with pytest.raises(BadInput, match="not a file of calibration records"):
        Ledger(header, path)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"n_documents": 1}, "at least 2 documents and 2 tasks"),
        ({"trials": 1}, "at least 2 documents and 2 tasks"),
        ({"context": 4350}, "positions, the model has 4352"),
        ({"context": 9000}, r"has \d+ tokens, 2 documents of 9000 \+ 12 need"),
        ({"kinds": ("sorting",)}, "unknown ruler task 'sorting'"),
    ],
)
def test_sets_that_cannot_be_are_refused(
    subject: LoadedModel, text_file: Path, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(BadInput, match=why):
        calibration_of(subject, text_file, **settings)


def test_a_restored_cache_of_mixed_lengths_goes_on_at_the_true_position(
    losses: LayerLosses,
) -> None:
    captured = losses._captured(Document(TEXT, 0))
    cache = restore(losses.calibration.subject.model, captured.holding(losses.alone(2, KEPT)))
    assert cache.get_seq_length() == CONTEXT - 1
