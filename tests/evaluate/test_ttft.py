"""The bound, the phases of real requests between two processes, and the model of large ones."""

import os

import pytest

from kvprism.errors import BadInput, UnknownName
from kvprism.evaluate.links import PACING, Link
from kvprism.evaluate.ttft import (
    DEFINITIONS,
    PHASES,
    Case,
    bound_s,
    places,
    raw_equals_prefill_bits_per_s,
    run_ttft,
)
from kvprism.evaluate.ttft_model import LLAMA_8B, LLAMA_70B, Rates, modelled
from kvprism.integrations.worker import worker_pair


def test_the_bound_waits_for_the_link_or_for_the_layer_whichever_is_later() -> None:
    # A fast link: only the last layer is left to send. A slow one: all bytes after the first layer.
    assert bound_s([1, 2, 3], [8, 8, 8], 8 * 8e6, 0) == pytest.approx(3, abs=1e-5)
    assert bound_s([1, 2, 3], [8, 8, 8], 8 * 8 / 10, 0) == pytest.approx(1 + 3 * 10)
    assert bound_s([1, 2, 3], [8, 8, 8], 8 * 8 / 10, 0.25) == pytest.approx(31.25)


def test_what_cannot_be_measured_is_refused() -> None:
    good = dict(context=64, policies=("int8",), budgets=(), links=(1,), repeats=2)
    for changed, error in (
        ({"context": 1}, BadInput),
        ({"repeats": 1}, BadInput),
        ({"links": (0,)}, BadInput),
        ({"links": ()}, BadInput),
        ({"chunk": 0}, BadInput),
        ({"chunk": 63}, BadInput),
    ):
        with pytest.raises(error):
            Case(**{**good, **changed})  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        _ = Case(**{**good, "policies": ("no-such",)}).arms  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="needs a budget"):
        _ = Case(**{**good, "policies": ("spectrum",)}).arms  # type: ignore[arg-type]


def test_workers_are_pinned_within_what_this_process_may_use() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    (prefill, decode), said = places(Link(PACING), pin=True)
    assert (prefill.core, decode.core) == (allowed[0], allowed[-1])
    assert prefill.threads == decode.threads == 1
    assert f"{len(allowed)} of {os.cpu_count()} cores allowed" in said
    (prefill, decode), said = places(Link(PACING), pin=False)
    assert prefill.core is decode.core is None and said.startswith("not pinned")


@pytest.mark.slow
def test_requests_between_two_processes_are_timed_phase_by_phase() -> None:
    link = Link(PACING)
    case = Case(96, ("spectrum-layer", "spectrum", "pdtrim"), ("0.4",), (None,), 2, chunk=40)
    seen: list[tuple[int, int]] = []
    with worker_pair("tiny", places=places(link, pin=False)[0]) as pair:
        rows = run_ttft(pair, link, 512, case, lambda *done: seen.append(done))
    assert seen[-1] == (len(seen), len(seen))
    arms = [(row["policy"], row["budget"], row["chunk"], row["overlap"]) for row in rows]
    assert arms == [
        ("raw", None, None, True),
        ("spectrum-layer", "0.4", None, True),
        ("spectrum", "0.4", None, False),
        ("spectrum", "0.4", 40, True),
        ("pdtrim", "0.4", None, True),
    ]
    raw = rows[0]
    for row in rows:
        assert {*PHASES, "ttft_p50_s", "ttft_p95_s", "second_token_s", "bound_s"} <= set(row)
        assert set(DEFINITIONS) - {"gain"} <= set(row)
        assert all(row[phase] > 0 for phase in PHASES)
        assert row["shaping"] == "pacing" and row["n"] == 2
        # The first token cannot come before the whole cache does, nor the cache before its bytes.
        assert row["ttft_p50_s"] > row["first_token_s"]
        assert row["ttft_p95_s"] >= row["ttft_p50_s"]
        fraction = row["wire_bytes"] / row["reference_bytes"]
        assert fraction <= 0.4 or row is raw
        assert row["gain"] == pytest.approx(1 - row["ttft_p50_s"] / raw["ttft_p50_s"])
    equal = raw_equals_prefill_bits_per_s(rows)
    assert 8 * raw["wire_bytes"] / equal == pytest.approx(raw["prefill_alone_s"])
    # Prefills before the repeats chose the link, to 0.1 Mbps; those between them gave the bound.
    links = {row["link_bits_per_s"] for row in rows}
    assert all(row["raw_equals_prefill"] for row in rows) and len(links) == 1
    assert links.pop() % 100_000 == 0


def measured(policy: str, fraction: float, overlap: bool) -> dict[str, object]:
    return {
        "policy": policy,
        "budget": None,
        "chunk": None,
        "overlap": overlap,
        "link_bits_per_s": 1,
        "wire_bytes": int(1e6 * fraction),
        "reference_bytes": 10**6,
    }


def test_the_model_of_large_models_says_so_and_follows_its_formulas() -> None:
    assert LLAMA_8B.reference_nbytes(32768) == 4 * 2**30
    # The anchors of a published table of such shares: 8B at 4k on one H100, 70B at 4k on four.
    assert LLAMA_8B.prefill_s(4096) == pytest.approx(0.158, rel=0.03)
    assert LLAMA_70B.prefill_s(4096) == pytest.approx(0.337, rel=0.03)
    arms = [
        measured("raw", 1.0, False),
        measured("int4", 0.25, False),
        measured("pdtrim", 0.25, True),
    ]
    rows = modelled(arms, Rates(encode=1e8, decode=1e8, copy=1e15))
    assert all(row["modelled"] for row in rows)
    for raw, slow, fast in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert raw["gain"] == 0 and raw["transfer_s"] == pytest.approx(4 * fast["transfer_s"])
        assert slow["encode_s"] == pytest.approx(
            4 * slow["transfer_s"] * slow["link_bits_per_s"] * 0.9 / 8e8
        )
        # A codec of 0.1 GB/s loses on every one of these links, one for nothing wins.
        assert slow["gain"] < 0 < fast["gain"]
        assert fast["ttft_s"] >= fast["prefill_s"]
