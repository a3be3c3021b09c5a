"""Prefill here, decode in another process: the built-in model, real TCP, the public names alone.

Also run before every commit, so it stays under 20 seconds.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pytest
import torch

import kvprism

TOKEN = bytes(range(32))
PROMPT = "The river runs past the old mill, and the key of the mill is 48213. " * 12
NEW_TOKENS = 12
POLICIES = [
    ("raw", None),
    ("int8", None),
    ("spectrum", "52%"),
    ("sinks-recent", "30%"),
    ("tova", "40%"),
    ("h2o", "40%"),
    ("expected-attention", "40%"),
    ("layer-defensivekv", "40%"),
]
# Heads may hold tokens of their own: most eviction policies choose by head.
CAPABILITY = kvprism.Capability(drop="per_head")


def continued(model: Any, ids: torch.Tensor, **cache: Any) -> list[int]:
    """Greedy tokens after `ids`; the last of them is not in the cache."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **cache}
    tokens: list[int] = model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    return tokens


def decode_worker() -> None:
    """The other process: say where, then one line of tokens for each request."""
    model, tokenizer = kvprism.load("tiny")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    fingerprint = kvprism.fingerprint(model, tokenizer)
    with kvprism.Receiver(TOKEN, fingerprint=fingerprint, capability=CAPABILITY) as receiver:
        print(receiver.address[1], flush=True)
        for _ in POLICIES:
            received = receiver.receive(timeout_s=60)
            tokens = continued(model, ids, **kvprism.restore(model, received.kv).kwargs)
            answer = {"tokens": tokens, "wire_nbytes": received.wire_nbytes}
            print(json.dumps(answer), flush=True)


@contextmanager
def other_process() -> Iterator[IO[str]]:
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        yield said
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def answers(tiny: tuple[Any, Any]) -> dict[str, Any]:
    """Every policy's plan, what was sent, and what the other process made of it."""
    model, tokenizer = tiny
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found: dict[str, Any] = {}
    with other_process() as other:
        signals = kvprism.signals_of(policy for policy, _ in POLICIES)
        kv, view = kvprism.capture(model, ids[:, :-1], signals=signals)
        address = ("127.0.0.1", int(other.readline()))
        fingerprint = kvprism.fingerprint(model, tokenizer)
        with kvprism.Sender(address, TOKEN, fingerprint=fingerprint) as sender:
            for policy, budget in POLICIES:
                chosen = kvprism.plan(view, policy, budget, capability=sender.capability)
                sent = sender.send(kv, chosen)
                found[policy] = (chosen, sent, json.loads(other.readline()))
    found["expected"] = continued(model, ids)
    return found


def test_a_raw_cache_goes_on_with_the_very_same_tokens(answers: dict[str, Any]) -> None:
    assert len(answers["expected"]) == NEW_TOKENS
    assert answers["raw"][2]["tokens"] == answers["expected"]


@pytest.mark.parametrize("policy, budget", POLICIES)
def test_every_byte_was_planned(answers: dict[str, Any], policy: str, budget: str | None) -> None:
    chosen, sent, answer = answers[policy]
    assert chosen.nbytes == sent.wire_nbytes == answer["wire_nbytes"]
    assert budget is None or chosen.fraction <= float(budget.rstrip("%")) / 100
    assert len(answer["tokens"]) == NEW_TOKENS


if __name__ == "__main__":
    decode_worker()
