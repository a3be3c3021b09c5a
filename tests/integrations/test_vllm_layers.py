"""Layers that leave while later ones of their step are computed, and plans by captured queries."""

from pathlib import Path

import pytest
import torch
from peers import Tap
from vllm_ends import (
    BINDING,
    CHANNELS,
    EXPECTED,
    FINGERPRINT,
    FROM,
    HEADS,
    LAYERS,
    SLOTS,
    TO,
    Ends,
    FakeAttention,
    N,
    ends,
    settled,
    wait,
)

from kvprism.errors import Unsupported
from kvprism.integrations.vllm.config import ConnectorConfig
from kvprism.integrations.vllm.consumer import Consumer
from kvprism.integrations.vllm.queries import QueryTap, last_slots
from kvprism.integrations.vllm.scheduler import Load, Save
from kvprism.score.attention import WINDOW

NO_SLOTS = torch.zeros(0, dtype=torch.long)
LAYER_NBYTES = 2 * HEADS * N * CHANNELS * 4
Q_HEADS = 2 * HEADS


def save_of(both: Ends, start: int = 0, stop: int = N, **changes: object) -> Save:
    assert both.config.decode_address is not None
    last = stop == N
    return Save(
        "p", BINDING, both.config.decode_address, FROM, start, stop, last, (0, N), **changes
    )


def test_a_layer_leaves_while_the_next_is_computed(tmp_path: Path) -> None:
    """Its bytes are on the link, and its blocks free, before the step has a second layer."""
    with ends(tmp_path, send="layer") as both, Tap(both.consumer.addresses[0]) as tap:
        both.expect()
        kept = both.source.gather(0, FROM, 0, N)
        save = Save("p", BINDING, tap.address, FROM, 0, N, True, (0, N))
        both.producer.save_layer([save], 0, NO_SLOTS)
        settled(both.sent, "early_layers")
        assert LAYER_NBYTES < len(tap.recorded) < 2 * LAYER_NBYTES
        for view in both.source.layers[0]:
            view.zero_()
        both.producer.save_layer([save], 1, NO_SLOTS)
        both.producer.save([save])
        assert both.finished() == set()
        got = both.target.gather(0, TO, 0, N)
        assert torch.equal(got[0], kept[0]) and torch.equal(got[1], kept[1])
        assert "early_layers" not in settled(both.sent, "parts_sent")
        both.producer.close()


def test_layers_that_a_graph_kept_to_itself_leave_after_the_step(tmp_path: Path) -> None:
    with ends(tmp_path, send="layer") as both:
        both.expect()
        both.save()
        assert both.finished() == set() and both.same()
        assert "early_layers" not in settled(both.sent, "parts_sent")


def test_chunks_and_requests_share_a_step(tmp_path: Path) -> None:
    """Two prompts, the first in two steps; each layer of a step is of both."""
    with ends(tmp_path, send="layer", policy="spectrum-layer", budget=0.9) as both:
        both.expect()
        binding, blocks = bytes([1]) * 32, (0, 3, 5)
        both.consumer.inbox.expect(Load("e", binding, (1, 2, 3), 0, N))
        address = both.config.decode_address
        assert address is not None
        other = Save("q", binding, address, blocks, 0, N, True, (0, N))
        for saves in ([save_of(both, 0, 40)], [save_of(both, 40), other]):
            for layer in range(LAYERS):
                both.producer.save_layer(saves, layer, NO_SLOTS)
            both.producer.save(saves)
        ended: set[str] = set()
        wait(lambda: bool(ended.update(both.consumer.inbox.collect())) or ended == {"d", "e"})
        assert both.consumer.inbox.take_invalid() == set()
        for there, here in ((FROM, TO), (blocks, (1, 2, 3))):
            sent, got = both.source.gather(1, there, 0, N), both.target.gather(1, here, 0, N)
            assert float((sent[0] - got[0]).norm() / sent[0].norm()) < 0.17


def test_a_part_that_is_too_much_is_not_copied_either(tmp_path: Path) -> None:
    with ends(tmp_path, send="layer", max_outbox_nbytes=2**16) as both:
        both.producer.save_layer([save_of(both)], 0, NO_SLOTS)
        both.producer.save([save_of(both)])
        assert both.sent.take() == {"failures:outbox_full": 1}


def test_a_peer_that_goes_between_two_layers(tmp_path: Path) -> None:
    """That part is lost, and counted; the next one finds the peer that came back."""
    with ends(tmp_path, send="layer") as both:
        both.producer.save_layer([save_of(both)], 0, NO_SLOTS)
        host, port = both.consumer.addresses[0]
        wait(lambda: both.consumer._receivers[0]._peer is not None)
        both.consumer.close()
        both.producer.save([save_of(both)])
        settled(both.sent, "failures:PeerLost")
        extra = {
            "token_file": str(tmp_path / "token"),
            "listen": f"{host}:{port}",
            "transfer_timeout_s": 5.0,
        }
        config = ConnectorConfig.of(extra, producer=False, consumer=True)
        both.consumer = Consumer(config, FINGERPRINT, EXPECTED, both.target, both.got)
        both.expect()
        both.save()
        assert both.finished() == set() and both.same()
        both.consumer.close()


def test_the_tap_finds_a_requests_last_queries_in_a_batch() -> None:
    """Of a batch with a decode token, a chunk of another request, and ours."""
    layer = FakeAttention()
    tap = QueryTap({0: layer})
    query = torch.randn(50, Q_HEADS, CHANNELS)
    assert torch.equal(layer.forward(None, query, query), 2 * query)  # the layer as it was
    ours = last_slots((7, 2), 20, 44, SLOTS)
    slots = torch.tensor([5, *range(100, 125), *ours])
    found = tap.window(0, ours, slots)
    assert found is not None and torch.equal(found, query[26:50].transpose(0, 1))
    older = last_slots((7, 2), 10, 44, SLOTS)  # ten more, from an earlier step
    assert len(older) == WINDOW
    again = tap.window(0, older, slots)
    assert again is not None and torch.equal(again, found)
    assert tap.window(0, [1, 2], slots) is None


def test_an_attention_that_cannot_be_asked_is_refused_by_name() -> None:
    class Sealed:
        __slots__ = ()
        scale = 1.0

        def forward(self) -> None: ...

    with pytest.raises(Unsupported, match=r"Sealed of layer 3.*choose importance position"):
        QueryTap({3: Sealed()})


@pytest.mark.parametrize(
    ("send", "budget"), [("request", 0.5), ("layer", 0.5), ("upgrade", "floor+0.10")]
)
def test_what_the_last_queries_attend_to_is_sent_best(
    tmp_path: Path, send: str, budget: float | str
) -> None:
    """Twelve keys in the middle are what the queries look for; position would send them in INT4."""
    wanted = torch.arange(30, 42)
    policy = "spectrum-layer" if send == "layer" else "spectrum"
    settings = {"policy": policy, "budget": budget, "importance": "attention", "send": send}
    with ends(tmp_path, {"transfer_timeout_s": 20.0}, **settings) as both:
        direction = torch.randn(CHANNELS)
        blocks, at = torch.tensor(FROM)[wanted // SLOTS], wanted % SLOTS
        for keys, _ in both.source.layers.values():
            keys[blocks, :, at] += 4 * direction
        both.expect()
        for start, stop in ((0, N),) if send == "layer" else ((0, 45), (45, N)):
            step([save_of(both, start, stop)], both, direction)
        assert both.finished() == set()
        sent, got = both.source.gather(0, FROM, 0, N)[0], both.target.gather(0, TO, 0, N)[0]
        error = ((sent - got).norm(dim=-1) / sent.norm(dim=-1)).mean(dim=0)
        int8 = error < 0.03
        assert int8[wanted].all() and int8.sum() < N / 2


def step(saves: list[Save], both: Ends, direction: torch.Tensor) -> None:
    """A step's attention, layer by layer: every token of it asks for `direction`."""
    (save,) = saves
    slots = [FROM[i // SLOTS] * SLOTS + i % SLOTS for i in range(save.start, save.stop)]
    query = direction.expand(len(slots), Q_HEADS, CHANNELS)
    for layer, attention in enumerate(both.attention):
        attention.forward(None, query, query)
        both.producer.save_layer(saves, layer, torch.tensor(slots))
    both.producer.save(saves)


def test_without_queries_a_part_is_planned_by_position(tmp_path: Path) -> None:
    """As where a prefix cache has the prompt, so that nothing of it is computed."""
    settings = {"policy": "spectrum", "budget": 0.6, "importance": "attention"}
    with ends(tmp_path, **settings) as both:
        both.expect()
        both.save()
        assert both.finished() == set()
        assert settled(both.sent, "parts_sent")["without_queries"] == 1
