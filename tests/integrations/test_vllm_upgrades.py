"""Chunks that leave at 4 bits before their prompt is whole, and what is upgraded afterwards."""

from pathlib import Path

import pytest
import torch
from vllm_ends import (
    BINDING,
    FROM,
    LAYERS,
    TO,
    Ends,
    N,
    ends,
    settled,
    wait,
)

from kvprism.core import KVShape
from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.integrations.vllm.config import ConnectorConfig
from kvprism.integrations.vllm.scheduler import Load, Save

PATIENT = {"transfer_timeout_s": 20.0}


def error(both: Ends) -> torch.Tensor:
    """Of the keys, relative, by token, mean over layers and heads."""
    errors = []
    for layer in range(LAYERS):
        sent, got = both.source.gather(layer, FROM, 0, N), both.target.gather(layer, TO, 0, N)
        errors.append(((sent[0] - got[0]).norm(dim=-1) / sent[0].norm(dim=-1)).mean(dim=0))
    return torch.stack(errors).mean(dim=0)


def test_a_chunk_leaves_before_the_prompt_is_whole_and_the_rest_follows(tmp_path: Path) -> None:
    with ends(tmp_path, PATIENT, send="upgrade", policy="spectrum", budget=0.6) as both:
        both.expect()
        both.save(0, 40, last=False)
        counted = settled(both.sent, "early_chunks")
        assert counted["early_chunks"] == 1 and "parts_sent" not in counted
        both.save(40, 60, last=False)
        both.save(60)
        assert both.finished() == set()
        counted = settled(both.sent, "parts_sent")
        assert counted["parts_sent"] == 1 and "budget_misses" not in counted
        assert counted["wire_bytes"] <= 0.6 * counted["reference_bytes"]
        assert settled(both.got, "parts_received")["received_bytes"] == counted["wire_bytes"]
        assert error(both)[:4].max() == 0 and error(both).max() < 0.2
        assert set(counted) >= {"tokens:native", "tokens:int8", "tokens:int4"}


def test_a_prompt_that_is_given_up_costs_nothing_but_its_connection(tmp_path: Path) -> None:
    with ends(tmp_path, PATIENT, send="upgrade", policy="spectrum", budget=0.6) as both:
        both.save(0, 40, last=False)
        settled(both.sent, "early_chunks")
        both.producer.forget({"p"})
        assert settled(both.sent, "failures:abandoned")["failures:abandoned"] == 1
        both.expect()
        both.save()
        assert both.finished() == set() and error(both).max() < 0.2


def test_a_prompt_too_short_for_the_budget_goes_without_upgrades_and_is_counted(
    tmp_path: Path,
) -> None:
    with ends(tmp_path, PATIENT, send="upgrade", policy="spectrum", budget=0.2) as both:
        both.expect()
        both.save(0, 40, last=False)
        both.save(40)
        assert both.finished() == set()
        counted = settled(both.sent, "parts_sent")
        assert counted["budget_misses"] == 1 and "tokens:int8" not in counted


def test_two_prompts_in_turns(tmp_path: Path) -> None:
    with ends(tmp_path, PATIENT, send="upgrade", policy="int8") as both:
        both.expect()
        binding, blocks = bytes([1]) * 32, (0, 3, 5)
        both.consumer.inbox.expect(Load("e", binding, (1, 2, 3), 0, N))
        address = both.config.decode_address
        assert address is not None
        for start, stop in ((0, 40), (40, N)):
            mine = Save("p", BINDING, address, FROM, start, stop, stop == N, (0, N))
            other = Save("q", binding, address, blocks, start, stop, stop == N, (0, N))
            both.producer.save([mine, other])
        ended: set[str] = set()
        wait(lambda: bool(ended.update(both.consumer.inbox.collect())) or ended == {"d", "e"})
        assert both.consumer.inbox.take_invalid() == set()


def test_what_cannot_be_sent_in_chunks_is_refused_at_the_start(tmp_path: Path) -> None:
    with ends(tmp_path) as both:
        token_file = both.config.settings.token_file
    extra = {"token_file": token_file, "decode_address": "127.0.0.1:1", "send": "upgrade"}
    with pytest.raises(BadInput, match="send: policy 'spectrum-layer'"):
        ConnectorConfig.of(
            extra | {"policy": "spectrum-layer", "budget": 0.4}, producer=True, consumer=False
        )
    config = ConnectorConfig.of(
        extra | {"policy": "spectrum", "budget": 0.2}, producer=True, consumer=False
    )
    with pytest.raises(BudgetTooSmall):
        config.check_policy(KVShape.dense(layers=2, heads=2, channels=64, tokens=4096))
