"""The scheduler's half: which tokens are copied and loaded, by which request, under which name."""

from pathlib import Path
from typing import Any

import pytest
from fake_vllm import request

from kvprism.integrations.vllm.config import ConnectorConfig
from kvprism.integrations.vllm.scheduler import Load, SchedulerHalf, part_id
from kvprism.transport.token import create_token

ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
IDS = [*range(10, 30)]


@pytest.fixture
def halves(tmp_path: Path) -> tuple[SchedulerHalf, SchedulerHalf]:
    return half(tmp_path / "p", policy="int8"), half(tmp_path / "d", listen="127.0.0.1:0")


def half(folder: Path, **keys: Any) -> SchedulerHalf:
    folder.mkdir()
    create_token(folder / "token")
    consumer = "listen" in keys
    extra = {"token_file": str(folder / "token"), **keys}
    if not consumer:
        extra["decode_address"] = "127.0.0.1:5"
    config = ConnectorConfig.of(extra, producer=not consumer, consumer=consumer)
    return SchedulerHalf(config, "engine", producer=not consumer, consumer=consumer)


def prefilled(prefill: SchedulerHalf, ids: list[int]) -> dict[str, Any]:
    """A prompt computed in one step; the parameters of the decode request."""
    asked = request("p", ids, dict(ASKED))
    prefill.on_new_request(asked)
    prefill.step([("p", len(ids), [0, 1])])
    params = prefill.finished(asked)
    assert params is not None
    return params


def loaded(
    decode: SchedulerHalf, ids: list[int], params: dict[str, Any], computed: int = 0
) -> Load:
    asked = request("d", ids, params)
    decode.on_new_request(asked)
    n = decode.matched_tokens(asked, computed)
    assert decode.matched_tokens(asked, computed) == n  # asking changes nothing
    decode.allocated(asked, [4, 2, 7], n)
    (load,) = decode.take_loads()
    return load


def test_chunks_are_copied_once_and_the_last_token_never(halves: Any) -> None:
    prefill, _ = halves
    asked = request("p", IDS, dict(ASKED))
    prefill.on_new_request(asked)
    steps = [8, 16, 16, 20, 21]  # one step recomputes; one decodes
    saves = [save for computed in steps for save in prefill.step([("p", computed, [3, 9])])]
    assert [(s.start, s.stop, s.last) for s in saves] == [
        (0, 8, False), (8, 16, False), (16, 19, True),
    ]  # fmt: skip
    assert {s.blocks for s in saves} == {(3, 9)}


def test_a_preempted_prefill_starts_again_without_sending_twice(halves: Any) -> None:
    prefill, _ = halves
    prefill.on_new_request(request("p", IDS, dict(ASKED)))
    computed = [16, 8, 16, 20]  # preempted after the first step
    saves = [save for n in computed for save in prefill.step([("p", n, [0])])]
    assert [(s.start, s.stop) for s in saves] == [(0, 16), (16, 19)]


def test_both_sides_derive_the_same_name(halves: Any) -> None:
    prefill, decode = halves
    asked = request("p", IDS, dict(ASKED))
    prefill.on_new_request(asked)
    (save,) = prefill.step([("p", 20, [0])])
    load = loaded(decode, IDS, prefill.finished(asked))
    assert load == Load("d", save.binding, (4, 2, 7), 0, 19)
    assert part_id(save.binding, 0) != part_id(save.binding, 1)


def test_another_prompt_code_or_transfer_has_another_name(halves: Any) -> None:
    prefill, decode = halves
    params = prefilled(prefill, IDS)
    own = loaded(decode, IDS, params).binding
    others = [
        loaded(decode, [*IDS[:-1], 99], params),
        loaded(decode, IDS, params | {"kvprism_code": "raw"}),
        loaded(decode, IDS, prefilled(prefill, IDS)),
    ]
    assert own not in [load.binding for load in others]


def test_what_the_local_cache_has_is_not_loaded(halves: Any) -> None:
    prefill, decode = halves
    load = loaded(decode, IDS, prefilled(prefill, IDS), computed=8)
    assert (load.start, load.stop) == (8, 19)


def test_a_request_loads_once(halves: Any) -> None:
    prefill, decode = halves
    asked = request("d", IDS, prefilled(prefill, IDS))
    decode.on_new_request(asked)
    decode.allocated(asked, [0], 19)
    assert decode.matched_tokens(asked, 0) == 0  # preempted, or its load failed: computed here
    decode.allocated(asked, [0], 0)
    assert len(decode.take_loads()) == 1 and not decode.take_loads()


def test_a_transfer_is_claimed_once(halves: Any) -> None:
    """Two samples of one request carry the same parameters; the second one is computed."""
    prefill, decode = halves
    params = prefilled(prefill, IDS)
    loaded(decode, IDS, dict(params))
    again = request("e", IDS, dict(params))
    decode.on_new_request(again)
    assert decode.matched_tokens(again, 0) == 0
    assert decode.counts.take() == {"skipped:claimed_before": 1}


def test_lossy_caches_have_a_namespace_of_their_own(halves: Any) -> None:
    prefill, decode = halves
    params = prefilled(prefill, IDS)
    plain, lossy, other = (
        request("a", IDS),
        request("b", IDS, params),
        request("c", IDS, params | {"kvprism_code": "int4/None"}),
    )
    for asked in (plain, lossy, other):
        decode.on_new_request(asked)
    assert len({repr(r.block_hashes) for r in (plain, lossy, other)}) == 3
    assert all(len(r.block_hashes) == 1 for r in (plain, lossy, other))
    again = request("d", IDS, prefilled(prefill, IDS))
    decode.on_new_request(again)
    assert again.block_hashes == lossy.block_hashes


def test_exact_caches_share_the_plain_namespace(tmp_path: Path) -> None:
    prefill, decode = half(tmp_path / "p"), half(tmp_path / "d", listen="127.0.0.1:0")
    asked = request("d", IDS, prefilled(prefill, IDS))
    decode.on_new_request(asked)
    assert asked.block_hashes == request("x", IDS).block_hashes


def turns(tmp_path: Path) -> tuple[SchedulerHalf, SchedulerHalf]:
    decode = half(tmp_path / "d", listen="127.0.0.1:0")
    return half(tmp_path / "p", policy="int8", only_new=True), decode


def saved(prefill: SchedulerHalf, ids: list[int], salt: str | None = None) -> tuple[Any, Any]:
    """What a prompt's one step copies, and the parameters for decode."""
    asked = request("p", ids, dict(ASKED))
    asked.cache_salt = salt
    prefill.on_new_request(asked)
    saves = prefill.step([("p", len(ids), [*range(20)])])
    return [(save.start, save.stop) for save in saves], prefill.finished(asked)


def test_the_next_turn_sends_only_what_is_new(tmp_path: Path) -> None:
    prefill, decode = turns(tmp_path)
    first, second = [*range(300)], [*range(300), *range(900, 1000)]
    assert saved(prefill, first)[0] == [(0, 299)]
    copied, params = saved(prefill, second)
    assert copied == [(256, 399)] and params["kvprism_first"] == 256
    load = loaded(decode, second, params, computed=288)  # what decode kept of the first turn
    assert (load.first, load.start, load.stop) == (256, 288, 399)
    other, salted = [0, *first[1:100], 7, *first[101:]], saved(prefill, second, "salt")
    assert saved(prefill, other)[0] == [(0, 299)] and salted[0] == [(0, 399)]


def test_a_turn_whose_beginning_is_gone_is_computed(tmp_path: Path) -> None:
    """Decode forgot the first turn: the second one's part alone is of no use."""
    prefill, decode = turns(tmp_path)
    saved(prefill, [*range(300)])
    _, params = saved(prefill, [*range(400)])
    asked = request("d", [*range(400)], params)
    decode.on_new_request(asked)
    assert decode.matched_tokens(asked, 128) == 0
    decode.allocated(asked, [0], 0)
    assert not decode.take_loads() and decode.counts.take() == {"skipped:prefix_gone": 1}


def test_what_was_not_sent_whole_is_not_remembered(tmp_path: Path) -> None:
    prefill, _ = turns(tmp_path)
    asked = request("p", [*range(300)], dict(ASKED))
    prefill.on_new_request(asked)
    prefill.step([("p", 200, [0])])
    assert prefill.finished(asked) is None  # aborted
    assert saved(prefill, [*range(300)])[0] == [(0, 299)]
    assert saved(prefill, [*range(257)])[0] == []  # all of it is known: nothing is left to send


@pytest.mark.parametrize(
    ("params", "cause"),
    [
        ({"remote_host": "10.0.0.1", "remote_port": 80}, "peer_not_allowed"),
        ({"remote_host": 7, "remote_port": 80}, "peer_not_allowed"),
        ({"remote_host": "10.0.0.1"}, "peer_not_allowed"),
    ],
)
def test_no_byte_goes_to_an_address_that_is_not_allowed(
    halves: Any, params: dict[str, Any], cause: str
) -> None:
    prefill, _ = halves
    asked = request("p", IDS, ASKED | params)
    prefill.on_new_request(asked)
    assert prefill.step([("p", 20, [0])]) == [] and prefill.finished(asked) is None
    assert prefill.counts.take() == {f"skipped:{cause}": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"remote_request_id": None},
        {"remote_request_id": "xyz"},
        {"remote_request_id": "00"},
        {"kvprism_code": None},
        {"kvprism_code": "x" * 1000},
        {"kvprism_first": "0"},
        {"kvprism_first": 20},
    ],
)
def test_wrong_parameters_are_counted_and_the_prompt_is_computed(
    halves: Any, change: dict[str, Any]
) -> None:
    prefill, decode = halves
    asked = request("d", IDS, prefilled(prefill, IDS) | change)
    decode.on_new_request(asked)
    assert decode.matched_tokens(asked, 0) == 0
    assert decode.counts.take() == {"skipped:bad_params": 1}


def test_prompts_that_are_more_than_tokens_are_not_carried(halves: Any) -> None:
    prefill, _ = halves
    for name, value in (("lora_request", object()), ("mm_features", [1]), ("prompt_embeds", 1)):
        asked = request("p", IDS, dict(ASKED))
        setattr(asked, name, value)
        prefill.on_new_request(asked)
    prefill.on_new_request(request("p", [1], dict(ASKED)))
    counted = {"skipped:adapter": 1, "skipped:not_only_tokens": 2, "skipped:short_prompt": 1}
    assert prefill.counts.take() == counted


def test_an_aborted_prefill_gives_no_parameters(halves: Any) -> None:
    prefill, _ = halves
    asked = request("p", IDS, dict(ASKED))
    prefill.on_new_request(asked)
    prefill.step([("p", 8, [0])])
    assert prefill.finished(asked) is None
    assert not prefill.sends("p")


def test_the_notice_of_an_answered_request_is_not_a_request(halves: Any) -> None:
    """After an error vLLM sends one, with the same parameters and one token, to be aborted."""
    prefill, decode = halves
    notice = request("d", [0], prefilled(prefill, IDS))
    notice.abort_immediately = True
    decode.on_new_request(notice)
    assert decode.finished(notice) is None
    assert decode.counts.take() == {}


def test_requests_without_a_transfer_are_left_alone(halves: Any) -> None:
    for side in halves:
        asked = request("n", IDS)
        side.on_new_request(asked)
        assert side.matched_tokens(asked, 0) == 0 and side.finished(asked) is None
        assert side.counts.take() == {}
