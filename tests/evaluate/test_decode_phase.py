"""Arms that evict while they decode: fed token by token, labelled, and compared with all kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate.synthetic import Synthetic

from kvprism.commands.evaluate import decode_phases, parse_arms
from kvprism.commands.options import EvaluationOptions
from kvprism.core import MASS
from kvprism.errors import BadInput, ProfileMismatch, UnknownName, Unsupported
from kvprism.evaluate.arms import Arm, arms_of, through_the_wire
from kvprism.evaluate.haystack import generated_ids
from kvprism.evaluate.measure import Case, LoadedModel, continue_on, feed, measure
from kvprism.evaluate.records import collect, key_of, load_records
from kvprism.evaluate.summary import compare, rows_of
from kvprism.integrations.hf import capture
from kvprism.profiles import Profile
from kvprism.retention import FULL_KV, Retention
from kvprism.routes import Route, parse_layers

CONTEXT, FED = 120, 24
H2O = Retention("h2o", 48)
DECODE, LABEL = "0: full, 1-3: h2o@48", "0: full, 1-3: h2o@48tok"


@pytest.fixture(scope="module")
def case(subject: LoadedModel) -> Case:
    n = CONTEXT + FED + 1
    ids = torch.from_numpy(generated_ids(subject.tokenizer, n, np.random.default_rng(0))[:n])
    return Case(ids[:CONTEXT], ids[CONTEXT:], (slice(1, FED + 1),))


def test_every_arm_goes_under_every_decode_phase_and_the_baseline_under_none() -> None:
    arms = arms_of(["raw", "tova"], ["0.5"], decode=[FULL_KV, H2O])
    assert [(arm.policy, arm.decode) for arm in arms] == [
        ("raw", None),
        ("raw", H2O),
        ("tova", None),
        ("tova", H2O),
    ]
    assert [key_of(arm).decode for arm in arms] == [None, "h2o@48tok", None, "h2o@48tok"]


def test_the_command_line_names_decode_phases() -> None:
    assert decode_phases(None, None) == [FULL_KV]
    assert decode_phases("full, h2o", "48tok") == [FULL_KV, H2O]
    given = EvaluationOptions(
        policy="tova", budget="0.5", decode_policy="h2o", decode_budget="48tok"
    )
    arms = parse_arms(given)
    assert [arm.decode for arm in arms] == [None, H2O]
    with pytest.raises(BadInput, match="--decode-budget 48tok without a --decode-policy"):
        decode_phases(None, "48tok")
    with pytest.raises(BadInput, match="'h2o' needs a budget such as 256tok"):
        decode_phases("h2o", None)
    with pytest.raises(UnknownName, match="unknown decode-phase policy 'h20'"):
        decode_phases("h20", "48tok")
    with pytest.raises(Unsupported, match="'d2o' does not evict while tokens are generated"):
        decode_phases("d2o", "48tok")


def test_the_command_line_takes_a_profiles_route_as_a_decode_phase(tmp_path: Path) -> None:
    routes = (Route("polykv", 48, parse_layers("0-3: tova@48"), decode=parse_layers(DECODE)),)
    Profile("ab" * 32, routes=routes).save(tmp_path / "p.json")
    given = {"policy": "raw,polykv", "budget": "48tok", "profile": tmp_path / "p.json",
             "decode_policy": "full,polykv", "decode_budget": "48tok"}  # fmt: skip
    arms = parse_arms(EvaluationOptions(**given))  # type: ignore[arg-type]
    assert [(arm.policy, key_of(arm).decode) for arm in arms] == [
        ("raw", None), ("raw", LABEL), ("polykv", None), ("polykv", LABEL)
    ]  # fmt: skip
    with pytest.raises(BadInput, match="at 64tok: the profile's routes are for 48tok"):
        parse_arms(EvaluationOptions(**{**given, "decode_budget": "64tok"}))  # type: ignore[arg-type]
    with pytest.raises(ProfileMismatch, match="'polykv' follows a route, and there is none"):
        decode_phases("polykv", "48tok")
    with pytest.raises(BadInput, match="'polykv' needs a budget such as 256tok, got none"):
        decode_phases("polykv", None)


def test_steps_with_everything_kept_are_the_continuation(subject: LoadedModel, case: Case) -> None:
    kv, _ = capture(subject.model, case.context, cache_dtype=torch.bfloat16)
    whole = continue_on(subject.model, kv, case.fed)
    stepped, nbytes = feed(subject.model, kv, case.fed, Retention("tova", 1000))
    # The same sums in another order; logits are below 100, float32 has 24 bits.
    torch.testing.assert_close(stepped, whole, atol=1e-3, rtol=0)
    assert nbytes == kv.resident_nbytes * (CONTEXT + FED) // CONTEXT


def test_arms_are_measured_as_they_are_used(subject: LoadedModel, case: Case) -> None:
    decode = [FULL_KV, H2O, Retention("tova", 48)]
    arms = arms_of(["raw", "tova"], ["0.5"], decode=decode)
    found = {key_of(arm)[::4]: got for arm, got in measure(subject.model, case, arms)}
    raw = found["raw", None]
    h2o, tova = found["raw", "h2o@48tok"], found["raw", "tova@48tok"]
    assert sum(raw.kl) == 0 < min(sum(h2o.kl), sum(tova.kl))
    # The prompt's mass is billed to the arm that goes on with it, and to no other.
    assert tova.wire_bytes == raw.wire_bytes < h2o.wire_bytes
    assert h2o.reference_bytes == raw.reference_bytes
    assert tova.resident_bytes == raw.resident_bytes * 48 // CONTEXT
    assert h2o.resident_bytes < raw.resident_bytes
    assert found["tova", "h2o@48tok"].wire_bytes <= 0.5 * raw.reference_bytes


def test_the_mass_travels_where_the_decode_phase_counts_it(subject: LoadedModel, case) -> None:
    kv, view = capture(subject.model, case.context, signals={"mass"})
    for decode, expected in ((H2O, True), (Retention("tova", 48), False), (None, False)):
        got, plan = through_the_wire(kv, view, Arm("raw", decode=decode))
        assert (MASS in got.layers[0].components) == expected
        assert (MASS in plan.layers[0].tier_of) == expected


def test_every_layer_may_have_a_phase_of_its_own(subject: LoadedModel, case: Case) -> None:
    n_layers = subject.model.config.num_hidden_layers
    phase = (FULL_KV, H2O, *[Retention("tova", 48)] * (n_layers - 2))
    arm = Arm("raw", decode=phase)
    assert key_of(arm).decode == f"0: full, 1: h2o@48tok, 2-{n_layers - 1}: tova@48tok"
    kv, view = capture(subject.model, case.context, signals={"mass"})
    got, _ = through_the_wire(kv, view, arm)
    assert [MASS in layer.components for layer in got.layers] == [i == 1 for i in range(n_layers)]
    (_, raw), (_, evicted) = measure(subject.model, case, (Arm("raw"), arm))
    assert raw.wire_bytes < evicted.wire_bytes and sum(evicted.kl) > 0


def test_rows_say_which_phase_and_compare_with_everything_kept(tmp_path: Path) -> None:
    arms = arms_of(["raw", "spectrum", "int4"], ["0.3"], decode=[FULL_KV, H2O])
    records = collect(Synthetic(arms=arms), tmp_path / "records.jsonl")
    rows = [row for row in rows_of(records) if row.metric == "kl_mean"]
    assert [(row.policy, row.phase, row.decode) for row in rows] == [
        ("raw", "none", None),
        ("raw", "decode", "h2o@48tok"),
        ("spectrum", "prefill", None),
        ("spectrum", "both", "h2o@48tok"),
        ("int4", "prefill", None),
        ("int4", "both", "h2o@48tok"),
    ]
    assert {row.baseline for row in rows} == {rows[0].value}
    found = compare(load_records(tmp_path / "records.jsonl"), "spectrum", ["int4"])
    assert {c.decode for c in found} == {None, "h2o@48tok"}
    assert len(found) == 2 * len({c.metric for c in found})
