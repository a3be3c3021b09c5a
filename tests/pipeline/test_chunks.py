"""Prompts that leave in chunks, over real TCP: what arrives, damage, and breaking off."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers import PATIENCE_S, TOKEN, Tap, in_thread, still_works
from strategies import cache, same_cache, view_of

from kvprism.chunkwise import ChunkPlanner
from kvprism.codec.stream import decode, encode
from kvprism.core import UPGRADE_CODEC, Budget, Capability
from kvprism.errors import (
    BudgetTooSmall,
    PeerLost,
    PeerSilent,
    ShapeMismatch,
    Unsupported,
    WireError,
)
from kvprism.layout import ranges
from kvprism.pipeline import ChunkSender, Receiver, Sender, Sent
from kvprism.staged import StagedPlan
from kvprism.tensors import RequestKV

CHUNK, BUDGET = 32, 0.5


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(TOKEN, silence_s=PATIENCE_S) as listening:
        yield listening


def prompt() -> RequestKV:
    return cache(layers=2, tokens=96, channels=64)


def in_chunks(
    address: tuple[str, int],
    kv: RequestKV,
    before_last: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> tuple[Sent, StagedPlan]:
    """before_last: called when all chunks but the last were handed over."""
    with Sender(address, TOKEN, silence_s=PATIENCE_S) as sender:
        planner = ChunkPlanner(
            kv.shape(), "spectrum", settings.pop("budget", BUDGET), chunk=CHUNK,
            capability=sender.capability, **settings,
        )  # fmt: skip
        transfer = sender.open(planner.shape, planner.menu, planner.split)
        with ChunkSender(transfer, planner.base) as parts:
            for start, stop in ranges(0, kv.next_position, CHUNK):
                if stop == kv.next_position:
                    before_last()
                for layer in kv.layers:
                    parts.put(layer.part(start, stop))
            parts.wait()
            planned = planner.plan(view_of(kv))
            return parts.finish(kv, planned), planned


def test_the_final_plan_arrives_to_the_bit_and_every_byte_was_planned(receiver: Receiver) -> None:
    kv = prompt()
    with in_thread(lambda: in_chunks(receiver.address, kv)) as done:
        received = receiver.receive(PATIENCE_S)
        sent, planned = done.result()
    assert sent.wire_nbytes == received.wire_nbytes == planned.nbytes
    assert planned.nbytes <= BUDGET * kv.shape().reference_nbytes
    assert planned.upgrades and same_cache(received.kv, decode(encode(kv, planned)))
    assert sum(sent.layer_nbytes) < sent.wire_nbytes


def test_chunks_leave_while_the_next_is_computed(receiver: Receiver) -> None:
    kv = prompt()
    with Tap(receiver.address) as tap:

        def first_chunk_is_out() -> None:
            # Two chunks of three, each row at 4 bits or more: half of the payload at 4 bits.
            enough = kv.shape().reference_nbytes // 8
            deadline = threading.Event()
            for _ in range(200):
                if len(tap.recorded) > enough or deadline.wait(0.05):
                    break
            assert len(tap.recorded) > enough

        with in_thread(lambda: in_chunks(tap.address, kv, first_chunk_is_out)) as done:
            receiver.receive(PATIENCE_S)
            done.result()


def test_a_damaged_base_comes_again_and_is_upgraded_all_the_same(receiver: Receiver) -> None:
    """In one go, so that upgrades are under way before the peer can ask again."""
    kv, mark, flipped = prompt(), b"\x40\x40" * 32, []
    kv.layers[0].components["k"][:, :4] = 3.0  # native from the beginning, and easy to find
    planner = ChunkPlanner(kv.shape(), "spectrum", BUDGET)
    for layer in kv.layers:
        planner.base(layer)
    planned = planner.plan(view_of(kv))

    def flip_one_bit(data: bytes) -> bytes:
        at = data.find(mark)
        if flipped or at < 0:
            return data
        flipped.append(at)
        return data[: at + 9] + b"\x41" + data[at + 10 :]

    def send() -> Sent:
        with Sender(tap.address, TOKEN, silence_s=PATIENCE_S) as sender:
            return sender.send(kv, planned)

    with Tap(receiver.address, flip_one_bit) as tap, in_thread(send) as sent:
        received = receiver.receive(PATIENCE_S)
        assert sent.result().resent == len(flipped) == 1
    assert same_cache(received.kv, decode(encode(kv, planned)))


def test_a_sender_that_breaks_off_costs_one_request(receiver: Receiver) -> None:
    def break_off() -> None:
        raise RuntimeError("the engine gave up")

    with in_thread(lambda: in_chunks(receiver.address, prompt(), break_off)) as done:
        with pytest.raises((PeerLost, WireError)):
            receiver.receive(PATIENCE_S)
        with pytest.raises(RuntimeError, match="gave up"):
            done.result()
    still_works(receiver)


def test_a_budget_below_the_provisional_map_is_refused_before_anything_is_offered(
    receiver: Receiver,
) -> None:
    with in_thread(lambda: in_chunks(receiver.address, prompt(), budget=Budget(1000))) as done:
        with pytest.raises(PeerSilent):  # it came, offered nothing, and left
            receiver.receive(1.0)
        with pytest.raises(BudgetTooSmall):
            done.result()
    still_works(receiver)


def test_rows_that_break_the_budget_end_the_request_with_its_error(receiver: Receiver) -> None:
    kv = prompt()
    for layer in kv.layers:
        layer.components["k"][:, 40:60] = torch.nan
    with pytest.raises(BudgetTooSmall) as error:
        ChunkPlanner(kv.shape(), "spectrum", Budget(1), chunk=CHUNK)
    enough = Budget(error.value.needed + 500)
    with in_thread(lambda: in_chunks(receiver.address, kv, budget=enough)) as done:
        with pytest.raises((PeerLost, WireError)):
            receiver.receive(PATIENCE_S)
        with pytest.raises(BudgetTooSmall):
            done.result()
    still_works(receiver)


def test_a_receiver_that_reads_no_upgrades_is_offered_none() -> None:
    codecs = tuple(codec for codec in Capability().codecs if codec != UPGRADE_CODEC)
    with (
        Receiver(TOKEN, capability=Capability(codecs=codecs)) as old,
        in_thread(lambda: in_chunks(old.address, prompt())) as done,
    ):
        with pytest.raises(PeerSilent):
            old.receive(1.0)
        with pytest.raises(Unsupported, match=UPGRADE_CODEC):
            done.result()


def test_a_part_of_what_was_not_offered_is_refused(receiver: Receiver) -> None:
    kv, other = prompt(), cache(layers=2, tokens=96, channels=64, start=50)

    def send() -> None:
        with Sender(receiver.address, TOKEN) as sender:
            planner = ChunkPlanner(kv.shape(), "spectrum", BUDGET)
            wider = ChunkPlanner(other.shape(), "spectrum", BUDGET)
            transfer = sender.open(kv.shape(), planner.menu)
            part = other.layers[0].part(90, 110)
            with pytest.raises(ShapeMismatch, match="offered"):
                transfer.send_part(part, wider.base(part))

    with in_thread(send) as sent:
        with pytest.raises(PeerLost):
            receiver.receive(PATIENCE_S)
        sent.result()
