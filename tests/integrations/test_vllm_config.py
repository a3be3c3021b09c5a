"""Every key is checked at start-up, and the error names it."""

from pathlib import Path
from typing import Any

import pytest

from kvprism.core import KVShape
from kvprism.errors import BadInput, BudgetTooSmall, UnknownName, Unsupported
from kvprism.integrations.vllm.config import ConnectorConfig, parse_address
from kvprism.transport.token import create_token

SHAPE = KVShape.dense(layers=2, heads=2, channels=64, tokens=1024, dtype="float32")


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    create_token(tmp_path / "token")
    return str(tmp_path / "token")


def producer(token_file: str, **keys: Any) -> ConnectorConfig:
    extra = {"token_file": token_file, "decode_address": "127.0.0.1:1", **keys}
    return ConnectorConfig.of(extra, producer=True, consumer=False)


def test_defaults_are_raw_and_on_loopback(token_file: str) -> None:
    config = producer(token_file)
    assert config.exact and config.code == "raw"
    assert not config.settings.allow_remote
    assert config.decode_address == ("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budgett": "0.3"}, "unknown field `budgett`"),
        ({"lease_s": "long"}, "lease_s: Expected `float`, got `str`"),
        ({"importance": "hearsay"}, "importance: Invalid enum value 'hearsay'"),
        ({"send": "byte"}, "send: Invalid enum value"),
        (
            {"send": "layer", "policy": "spectrum", "budget": "0.3"},
            "send: policy 'spectrum' plans a layer knowing the others",
        ),
        ({"silence_s": 0}, r"silence_s: expected seconds in \(0, 86400\), got 0"),
        ({"max_inbox_nbytes": 5}, "max_inbox_nbytes: expected at least 65536 bytes, got 5"),
        ({"decode_address": "somewhere"}, "decode_address: expected host:port"),
        ({"decode_address": "h:1-2"}, "decode_address: expected one port"),
        ({"listen": "127.0.0.1:9-7"}, "listen: expected 1 to 64 ports"),
        ({"listen": "127.0.0.1:70000"}, "listen: expected 1 to 64 ports up to 65535"),
        ({"policy": "spectrum"}, "budget: policy 'spectrum' needs one"),
        ({"decode_address": None}, "decode_address: a producer needs"),
    ],
)
def test_a_wrong_key_is_named(token_file: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        producer(token_file, **keys)


def test_what_each_role_needs(token_file: str) -> None:
    with pytest.raises(BadInput, match="token_file"):
        ConnectorConfig.of({}, producer=False, consumer=True)
    with pytest.raises(BadInput, match="listen: a consumer needs"):
        ConnectorConfig.of({"token_file": token_file}, producer=False, consumer=True)
    extra = {"token_file": token_file, "listen": "127.0.0.1:7000-7002"}
    config = ConnectorConfig.of(extra, producer=False, consumer=True)
    assert config.listen == ("127.0.0.1", range(7000, 7003))


def test_a_key_file_that_others_may_read_is_refused(token_file: str) -> None:
    Path(token_file).chmod(0o644)
    with pytest.raises(BadInput, match="chmod 600"):
        producer(token_file)


def test_unknown_policies_list_the_known(token_file: str) -> None:
    with pytest.raises(UnknownName, match="spectrum"):
        producer(token_file, policy="spectrun")


def test_only_addresses_that_a_pattern_allows(token_file: str) -> None:
    config = producer(token_file, allowed_peers=["10.0.0.*:1460[0-3]"])
    assert config.allows(("127.0.0.1", 1))  # the configured one
    assert config.allows(("10.0.0.7", 14602))
    assert not config.allows(("10.0.0.7", 14604))
    assert not config.allows(("10.0.1.7", 14602))
    assert not producer(token_file).allows(("10.0.0.7", 14602))


def test_policies_that_drop_tokens_are_refused_at_the_start(token_file: str) -> None:
    for policy in ("random-drop", "spectrum-2tier", "snapkv"):
        with pytest.raises(Unsupported, match=f"policy: '{policy}' drops tokens"):
            producer(token_file, policy=policy, budget="0.3").check_policy(SHAPE)


def test_a_budget_that_no_prompt_could_meet_is_refused_at_the_start(token_file: str) -> None:
    producer(token_file, policy="spectrum", budget=0.3).check_policy(SHAPE)
    with pytest.raises(BudgetTooSmall):
        producer(token_file, policy="spectrum", budget="0.2").check_policy(SHAPE)


def test_the_code_tells_lossy_caches_apart(token_file: str) -> None:
    keys: list[dict[str, Any]] = [
        {"policy": "int8"},
        {"policy": "spectrum", "budget": "0.3"},
        {"policy": "spectrum", "budget": "0.4"},
        {"policy": "spectrum", "budget": "0.4", "importance": "norm"},
        {"policy": "spectrum", "budget": "0.4", "send": "chunk"},
    ]
    codes = [producer(token_file, **key).code for key in keys]
    assert len({*codes, "raw"}) == len(keys) + 1


def test_addresses() -> None:
    assert parse_address("listen", "[::1]:80") == ("::1", 80)
