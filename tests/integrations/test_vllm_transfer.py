"""The worker's two sides over a real connection: blocks there, blocks here, and what goes wrong."""

import threading
from pathlib import Path

import pytest
import torch
from peers import Tap
from vllm_ends import (
    BINDING,
    BLOCKS,
    CHANNELS,
    EXPECTED,
    FINGERPRINT,
    FROM,
    HEADS,
    LAYERS,
    SLOTS,
    TO,
    N,
    ends,
    paged,
    settled,
    wait,
)

from kvprism.integrations.vllm.config import ConnectorConfig
from kvprism.integrations.vllm.consumer import Consumer, Inbox
from kvprism.integrations.vllm.counts import Counts
from kvprism.integrations.vllm.producer import Producer
from kvprism.integrations.vllm.scheduler import Load, Save, part_id
from kvprism.profiles import Profile
from kvprism.tensors import LayerKV, RequestKV
from kvprism.transport.token import create_token


@pytest.mark.parametrize("first", ["load", "part"])
def test_raw_blocks_arrive_bit_for_bit_whichever_comes_first(tmp_path: Path, first: str) -> None:
    with ends(tmp_path) as both:
        if first == "load":
            both.expect()
        both.save()
        if first == "part":
            arrived: dict[str, float] = {}
            wait(lambda: bool(arrived.update(both.got.take()) or arrived.get("parts_received")))
            both.expect()
        assert both.finished() == set()
        assert both.same()
        assert torch.count_nonzero(both.blocks[0][1]) == 0  # a block that is not the request's


def test_blocks_are_free_as_soon_as_they_are_copied(tmp_path: Path) -> None:
    with ends(tmp_path) as both:
        kept = both.source.gather(0, FROM, 0, N)
        both.save()
        for keys, values in both.source.layers.values():
            keys.zero_(), values.zero_()
        both.expect()
        assert both.finished() == set()
        got = both.target.gather(0, TO, 0, N)
        assert torch.equal(got[0], kept[0]) and torch.equal(got[1], kept[1])


@pytest.mark.parametrize("send", ["request", "chunk"])
def test_chunked_prefill(tmp_path: Path, send: str) -> None:
    with ends(tmp_path, send=send) as both:
        both.expect()
        for start, stop in ((0, 40), (40, 64), (64, N)):
            both.save(start, stop, last=stop == N)
        assert both.finished() == set() and both.same()
        wait(lambda: both.sent.take().get("parts_sent", 0) == (1 if send == "request" else 3))


def test_the_first_chunk_arrives_before_the_second_is_computed(tmp_path: Path) -> None:
    with ends(tmp_path, send="chunk") as both:
        both.save(0, 40, last=False)
        wait(lambda: both.got.take().get("parts_received") == 1)


def test_servers_of_one_machine_may_share_memory(tmp_path: Path) -> None:
    with ends(tmp_path, theirs={"listen": "shm:0"}, send="layer") as both:
        assert both.consumer.addresses[0][0] == "shm"
        both.expect()
        both.save()
        assert both.finished() == set() and both.same()


def test_block_sizes_may_differ(tmp_path: Path) -> None:
    with ends(tmp_path, slots=2 * SLOTS) as both:
        both.expect()
        both.save()
        assert both.finished() == set() and both.same()


def test_what_the_local_cache_has_is_not_overwritten(tmp_path: Path) -> None:
    with ends(tmp_path) as both:
        both.expect(start=SLOTS)
        both.save()
        assert both.finished() == set()
        assert both.same(start=SLOTS)
        assert torch.count_nonzero(both.blocks[0][TO[0]]) == 0


@pytest.mark.parametrize(
    ("policy", "budget", "most", "error"),
    [("int8", None, 0.56, 0.01), ("int4", None, 0.32, 0.17), ("spectrum", 0.6, 0.6, 0.17)],
)
def test_lossy_codes_keep_their_size_and_their_error(
    tmp_path: Path, policy: str, budget: float | None, most: float, error: float
) -> None:
    """Error: of INT4 with 15 levels on normal rows, .115 measured; of INT8 .007; with room."""
    with ends(tmp_path, policy=policy, budget=budget) as both:
        both.expect()
        both.save()
        assert both.finished() == set()
        counted = settled(both.sent, "wire_bytes")
        assert counted["wire_bytes"] / counted["reference_bytes"] <= most
        sent, got = both.source.gather(0, FROM, 0, N)[0], both.target.gather(0, TO, 0, N)[0]
        assert 0 < float((sent - got).norm() / sent.norm()) < error
        tokens = sum(n for name, n in counted.items() if name.startswith("tokens:"))
        assert tokens == pytest.approx(N)


def test_a_prompt_too_short_for_the_budget_is_sent_at_the_smallest_size(tmp_path: Path) -> None:
    with ends(tmp_path, policy="spectrum", budget=0.3) as both:
        both.save(0, 5)
        counted = settled(both.sent, "parts_sent")
        assert counted["budget_misses"] == 1


def test_the_part_of_a_later_turn_fits_what_is_here(tmp_path: Path) -> None:
    """Sent from token 32 on; decode has 64 of its own and takes the last six."""
    with ends(tmp_path) as both:
        both.save(32)
        both.consumer.inbox.expect(Load("d", BINDING, TO, 64, N, first=32))
        assert both.finished() == set() and both.same(start=64)
        assert torch.count_nonzero(both.blocks[0][TO[1]]) == 0


def test_a_cache_that_never_comes_is_a_failed_load(tmp_path: Path) -> None:
    with ends(tmp_path, {"transfer_timeout_s": 0.1}) as both:
        both.expect(start=SLOTS)
        assert both.finished() == set(TO[1:])  # the first block is the local cache's
        assert both.got.take() == {"failures:timeout": 1}


def test_half_a_prompt_is_a_failed_load_of_all_its_blocks(tmp_path: Path) -> None:
    with ends(tmp_path, {"transfer_timeout_s": 0.5}, send="chunk") as both:
        both.save(0, 40, last=False)
        both.expect()
        assert both.finished() == set(TO)


def test_a_part_is_used_once(tmp_path: Path) -> None:
    with ends(tmp_path, {"transfer_timeout_s": 0.2}) as both:
        both.save()
        both.expect()
        assert both.finished() == set()
        both.expect()
        assert both.finished() == set(TO)


@pytest.mark.parametrize(
    ("change", "cause"), [("token", "AuthenticationFailed"), ("fingerprint", "Rejected")]
)
def test_strangers_send_nothing(tmp_path: Path, change: str, cause: str) -> None:
    with ends(tmp_path, {"transfer_timeout_s": 0.5}) as both:
        stranger = both.producer
        if change == "token":
            (tmp_path / "other").mkdir()
            create_token(tmp_path / "other" / "token")
            extra = {
                "token_file": str(tmp_path / "other" / "token"),
                "decode_address": both.config.settings.decode_address,
            }
            config = ConnectorConfig.of(extra, producer=True, consumer=False)
            both.producer = Producer(config, FINGERPRINT, both.source, both.sent)
        else:
            both.producer = both.sender(fingerprint=bytes(32))
        both.expect()
        both.save()
        assert both.finished() == set(TO)
        assert settled(both.sent, f"failures:{cause}") == {
            f"failures:{cause}": 1, "hold_seconds": pytest.approx(0, abs=5),
        }  # fmt: skip
        assert all(torch.count_nonzero(kv) == 0 for kv in both.blocks)
        both.producer.close()
        both.producer = stranger
        both.expect()
        both.save()
        assert both.finished() == set() and both.same()


def test_another_profile_is_refused_before_any_byte(tmp_path: Path) -> None:
    Profile(FINGERPRINT.hex()).save(tmp_path / "profile.json")
    with ends(tmp_path, profile=str(tmp_path / "profile.json")) as both:
        both.save()
        assert "failures:Rejected" in settled(both.sent, "failures:Rejected")
        assert "received_bytes" not in both.got.take()


def test_damage_is_asked_for_again(tmp_path: Path) -> None:
    damaged = threading.Event()

    def damage(data: bytes) -> bytes:
        if len(data) < 8192 or damaged.is_set():
            return data
        damaged.set()
        return data[:-1] + bytes([data[-1] ^ 1])

    with ends(tmp_path) as both, Tap(both.consumer.addresses[0], damage) as tap:
        both.expect()
        address = tap.address
        both.producer.save([Save("p", BINDING, address, FROM, 0, N, True, (0, N))])
        assert both.finished() == set() and both.same()
        assert damaged.is_set()
        both.producer.close()


def test_a_decode_server_that_came_back_is_dialled_again(tmp_path: Path) -> None:
    with ends(tmp_path) as both:
        both.save()
        both.expect()
        assert both.finished() == set()
        host, port = both.consumer.addresses[0]
        both.consumer.close()
        extra = {
            "token_file": str(tmp_path / "token"),
            "listen": f"{host}:{port}",
            "transfer_timeout_s": 5.0,
        }
        config = ConnectorConfig.of(extra, producer=False, consumer=True)
        both.consumer = Consumer(config, FINGERPRINT, EXPECTED, both.target, both.got)
        both.expect()
        both.save()
        assert both.finished() == set()
        both.consumer.close()


def test_too_much_to_send_is_refused_not_piled_up(tmp_path: Path) -> None:
    with ends(tmp_path, max_outbox_nbytes=2**16) as both:
        both.save()  # 140 KiB
        assert both.sent.take().get("failures:outbox_full") == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def inbox(clock: Clock, counts: Counts, **limits: float) -> Inbox:
    settings = {"timeout_s": 5.0, "lease_s": 5.0, "max_nbytes": 2**20} | limits
    return Inbox(paged(random=False)[0], counts, clock=clock, **settings)  # type: ignore[arg-type]


def cache(start: int, stop: int) -> RequestKV:
    rows = torch.zeros(HEADS, stop - start, CHANNELS)
    positions = torch.arange(start, stop)
    layers = [LayerKV(i, {"k": rows, "v": rows}, positions) for i in range(LAYERS)]
    return RequestKV(tuple(layers), stop)


def test_parts_that_nobody_asks_for_are_dropped() -> None:
    clock, counts = Clock(), Counts()
    box = inbox(clock, counts)
    box.deliver(part_id(BINDING, 0), cache(0, N))
    clock.now = 6.0
    assert box.collect() == set()
    assert counts.take() == {"expired": 1}
    box.expect(Load("d", BINDING, TO, 0, N))
    assert box.collect() == set()


def test_the_oldest_parts_give_way() -> None:
    clock, counts = Clock(), Counts()
    size = cache(0, N).resident_nbytes
    box = inbox(clock, counts, max_nbytes=2 * size)
    for number in range(3):
        box.deliver(part_id(bytes([number]) * 32, 0), cache(0, N))
    assert counts.take() == {"expired": 1}
    for number in range(3):
        box.expect(Load(f"d{number}", bytes([number]) * 32, TO, 0, N))
    assert box.collect() == {"d1", "d2"}


def test_a_part_that_cannot_be_written_fails_the_load() -> None:
    clock, counts = Clock(), Counts()
    box = inbox(clock, counts)
    box.expect(Load("d", BINDING, (7, BLOCKS + 1, 5), 0, N))  # a block that does not exist
    box.deliver(part_id(BINDING, 0), cache(0, N))
    assert box.collect() == {"d"} and box.take_invalid() == {7, BLOCKS + 1, 5}
    assert counts.take() == {"failures:not_written": 1}


@pytest.mark.parametrize(("start", "stop"), [(1, N), (0, N + 1)])
def test_a_part_of_other_tokens_than_its_name_says_fails_the_load(start: int, stop: int) -> None:
    clock, counts = Clock(), Counts()
    box = inbox(clock, counts)
    box.expect(Load("d", BINDING, TO, 0, N))
    box.deliver(part_id(BINDING, 0), cache(start, stop))
    assert box.collect() == {"d"} and box.take_invalid() == set(TO)
    assert counts.take() == {"failures:wrong_tokens": 1}
