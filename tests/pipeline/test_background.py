"""Layers that leave while the next are computed: the same request, and what goes wrong."""

import threading

import pytest
import torch
from peers import PATIENCE_S, TOKEN, in_thread
from strategies import INT8, cache, plan_of, same_cache

from kvprism.codec.stream import decode, encode
from kvprism.errors import BadInput, PeerLost
from kvprism.pipeline import LayerSender, Received, Receiver, Sender, Sent
from kvprism.plans import LayerPlan
from kvprism.tensors import LayerView


def test_layers_leave_while_the_caller_is_still_at_work() -> None:
    kv = cache(layers=3, heads=2, tokens=64, channels=64)
    chosen = plan_of(kv, INT8)
    planned = {layer.shape.layer_id: layer for layer in chosen.layers}
    restored = threading.Event()

    def send() -> Sent:
        with (
            Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender,
            LayerSender(
                sender.open(chosen.shape, chosen.menu),
                lambda view: planned[view.kv.layer_id],
            ) as layers,
        ):
            for layer in kv.layers:
                layers.put(LayerView(layer, queries=torch.zeros(2, 1, 64)))
            # The whole request is there before the caller asks whether it is.
            assert restored.wait(PATIENCE_S)
            return layers.finish()

    with Receiver(TOKEN, silence_s=PATIENCE_S) as receiver, in_thread(send) as sent:
        received: Received = receiver.receive(PATIENCE_S)
        restored.set()
        assert sent.result().wire_nbytes == received.wire_nbytes == chosen.nbytes
    assert same_cache(received.kv, decode(encode(kv, chosen)))


def test_what_the_thread_meets_is_raised_where_layers_are_handed_over() -> None:
    kv = cache(layers=2)
    chosen = plan_of(kv, INT8)

    def refuse(view: LayerView) -> LayerPlan:
        raise BadInput("no plan for this one")

    def send() -> None:
        with (
            Sender(receiver.address, TOKEN, silence_s=PATIENCE_S) as sender,
            LayerSender(sender.open(chosen.shape, chosen.menu), refuse) as layers,
        ):
            layers.put(LayerView(kv.layers[0]))
            with pytest.raises(BadInput, match="no plan for this one"):
                layers.finish()
            with pytest.raises(BadInput, match="no plan for this one"):
                layers.put(LayerView(kv.layers[1]))

    with Receiver(TOKEN, silence_s=PATIENCE_S) as receiver, in_thread(send) as sent:
        with pytest.raises(PeerLost):
            receiver.receive(PATIENCE_S)
        sent.result()
