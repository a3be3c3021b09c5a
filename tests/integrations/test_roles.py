"""What the two workers do with a model, both in this process."""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import tokens

import kvprism
from kvprism.errors import BadInput, PeerSilent, PositionMismatch, Rejected, UnknownName
from kvprism.integrations import hf
from kvprism.integrations.decode_role import DecodeWorker
from kvprism.integrations.definitions import DEFINITIONS, ttft_ms
from kvprism.integrations.prefill_role import PrefillWorker

TOKEN = bytes(32)
IDS = tokens(300)[0].tolist()


@pytest.fixture(scope="module")
def prefill() -> PrefillWorker:
    worker = PrefillWorker("tiny", TOKEN)
    worker.prefill(IDS)
    return worker


@pytest.fixture(scope="module")
def decode() -> Iterator[DecodeWorker]:
    with DecodeWorker("tiny", TOKEN) as worker:
        yield worker


def transfer(
    prefill: PrefillWorker, decode: DecodeWorker, policy: str, budget: str | None, **expected: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    planned = prefill.plan(policy, budget)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(decode.receive, 10.0, **expected)
        sent = prefill.send(decode.address())
        return {**planned, **sent}, received.result()


def test_both_sides_count_the_same_bytes(prefill: PrefillWorker, decode: DecodeWorker) -> None:
    sent, received = transfer(prefill, decode, "spectrum", "40%")
    assert sent["wire_bytes"] == received["wire_bytes"]
    assert sent["fraction"] == received["fraction"] <= 0.4
    assert sum(sent["tiers"].values()) == len(sent["tier_of_token"]) == len(IDS) - 1


def test_a_raw_transfer_continues_as_the_model_itself(
    prefill: PrefillWorker, decode: DecodeWorker, tiny: tuple[Any, Any]
) -> None:
    prefill_32 = PrefillWorker("tiny", TOKEN, "float32")
    prefill_32.prefill(IDS)
    transfer(prefill_32, decode, "raw", None, n_prompt=len(IDS))
    got = decode.generate(IDS, 6, ignore_eos=True)
    model, tokenizer = tiny
    expected = model.generate(
        torch.tensor([IDS]), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert got["text"] == tokenizer.decode(expected[0, len(IDS) :])
    assert decode.kl_to_raw([*IDS, 5, 6, 7], raw=True) == 0


def test_a_decode_phase_goes_on_with_the_mass_that_both_sides_mean(
    prefill: PrefillWorker, decode: DecodeWorker
) -> None:
    with_mass = PrefillWorker("tiny", TOKEN)
    with_mass.prefill(IDS, (), mass=True)
    retention = kvprism.Retention("h2o", 64)
    with DecodeWorker("tiny", TOKEN, decode=retention) as evicting:
        sent, received = transfer(with_mass, evicting, "h2o", "40%")
        assert sent["wire_bytes"] == received["wire_bytes"]
        assert sent["fraction"] == received["fraction"] <= 0.4
        said = evicting.generate(IDS, 12, ignore_eos=True)["text"]
        # The same on what the wire gave, in the public names.
        kv = evicting._kv
        assert kv is not None
        cache = kvprism.restore(evicting._model, kv, retention)
        whole = evicting._model.generate(
            torch.tensor([IDS]), **cache.kwargs, max_new_tokens=12, min_new_tokens=12,
            do_sample=False,
        )  # fmt: skip
        assert said == evicting._tokenizer.decode(whole[0, len(IDS) :])
        assert all(len(layer.positions) <= 64 * layer.keys.shape[1] for layer in cache.layers)
        with pytest.raises(Rejected, match="mass"), ThreadPoolExecutor(1) as pool:
            pool.submit(evicting.receive, 10.0)
            prefill.plan("raw", None)
            prefill.send(evicting.address())
    with_mass.plan("raw", None)
    with pytest.raises(Rejected, match="mass"), ThreadPoolExecutor(1) as pool:
        pool.submit(decode.receive, 10.0)
        with_mass.send(decode.address())


def test_dropped_tokens_are_not_kept_and_cost_quality(
    prefill: PrefillWorker, decode: DecodeWorker
) -> None:
    fed = [*IDS, *IDS[:20]]
    transfer(prefill, decode, "raw", None)
    assert decode.kl_to_raw(fed, raw=True) == 0
    sent, received = transfer(prefill, decode, "sinks-recent", "30%")
    assert received["kept_tokens"] == sent["tiers"]["native"] < 100
    assert decode.kl_to_raw(fed, raw=False) > 0


def test_generation_stops_at_the_end_of_text(
    prefill: PrefillWorker, decode: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer(prefill, decode, "raw", None)
    first = decode.sample(IDS, 1, seed=0)
    assert len(first) == 1
    greedy = decode.generate(IDS, 3, ignore_eos=True)["text"]
    eos = decode._logits(*decode._restored(IDS))[-1].argmax()
    tokenizer = SimpleNamespace(eos_token_id=int(eos), decode=decode._tokenizer.decode)
    monkeypatch.setattr(decode, "_tokenizer", tokenizer)
    stopped = decode.generate(IDS, 3)
    assert greedy.startswith(stopped["text"]) and len(stopped["text"]) < len(greedy)
    assert stopped["second_token_ms"] is None


def test_a_cache_of_another_length_than_the_prompt_s_is_refused(
    prefill: PrefillWorker, decode: DecodeWorker
) -> None:
    with pytest.raises(PositionMismatch, match=r"has 301 tokens here.*position 300.* at 299"):
        transfer(prefill, decode, "raw", None, n_prompt=len(IDS) + 1)
    with pytest.raises(BadInput, match="nothing was received yet"):
        decode.generate(IDS, 1)


def test_a_prompt_that_the_cache_already_covers_leaves_nothing_to_compute(
    prefill: PrefillWorker, decode: DecodeWorker
) -> None:
    transfer(prefill, decode, "raw", None)
    with pytest.raises(PositionMismatch, match="position 299, where 299 tokens leave nothing"):
        decode.generate(IDS[:-1], 1)


def test_policies_that_need_signals_are_planned_and_their_heads_held(
    prefill: PrefillWorker, decode: DecodeWorker
) -> None:
    prefill.prefill(IDS, ["mass"])
    sent, received = transfer(prefill, decode, "h2o", "40%")
    assert sent["wire_bytes"] == received["wire_bytes"] and sent["fraction"] <= 0.4
    assert decode._kv is not None and any(la.held is not None for la in decode._kv.layers)
    assert decode.generate(IDS, 3, ignore_eos=True)["text"]


def test_nobody_who_sends_is_noticed_in_time(decode: DecodeWorker) -> None:
    with pytest.raises(PeerSilent, match="nobody connected"):
        decode.receive(0.1)


def test_a_saved_stream_is_private_and_decodes_to_the_same_cache(
    prefill: PrefillWorker, decode: DecodeWorker, tmp_path: Path
) -> None:
    transfer(prefill, decode, "spectrum", "40%")
    path = tmp_path / "stream.kvp"
    old_mask = os.umask(0)
    try:
        prefill.save(str(path))
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    saved, sent = kvprism.decode(path.read_bytes()), decode._kv
    assert sent is not None and saved.next_position == sent.next_position
    for ours, theirs in zip(saved.layers, sent.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        for name in ours.components:
            assert torch.equal(ours.components[name], theirs.components[name])


def test_a_stream_that_cannot_be_saved_leaves_nothing(
    prefill: PrefillWorker, tmp_path: Path
) -> None:
    prefill.plan("raw", None)
    with pytest.raises(BadInput, match="cannot write"):
        prefill.save(str(tmp_path))
    with pytest.raises(BadInput, match="cannot write"):
        prefill.save(str(tmp_path / "missing" / "stream.kvp"))
    assert list(tmp_path.iterdir()) == []


def test_operations_out_of_order_say_what_is_missing(prefill: PrefillWorker) -> None:
    prefill.prefill(IDS)
    with pytest.raises(BadInput, match="nothing was planned yet"):
        prefill.send(("127.0.0.1", 9))


def test_an_unknown_cache_dtype_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(UnknownName, match="unknown cache dtype 'int3'; known: bfloat16"):
        PrefillWorker("no-such-model", TOKEN, "int3")


def test_every_figure_is_defined(prefill: PrefillWorker, decode: DecodeWorker) -> None:
    measured = prefill.prefill(IDS)
    sent, received = transfer(prefill, decode, "raw", None)
    measured |= {**sent, **received, **decode.generate(IDS, 1)}
    assert set(measured) - {"text"} <= set(DEFINITIONS)
    assert ttft_ms(measured) == pytest.approx(
        sum(measured[f"{part}_ms"] for part in ("prefill", "plan", "encode", "transfer"))
        + measured["first_token_ms"]
    )
    assert hf.shape_of(prefill._model, len(IDS) - 1).reference_nbytes == measured["reference_bytes"]
