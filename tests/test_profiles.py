"""Profiles: what is read back is what was written, or a typed error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvprism.errors import BadInput, KVPrismError, ProfileMismatch
from kvprism.profiles import Profile

FINGERPRINT = "ab" * 32


def saved(tmp_path: Path, shares: tuple[float, ...] | None = (0.1, 0.9)) -> Path:
    path = tmp_path / "profile.json"
    Profile(FINGERPRINT, shares).save(path)
    return path


@pytest.mark.parametrize("shares", [None, (0.1, 0.9), (1, 2), (1e-300, 1e300), (0.1 + 0.2,)])
def test_a_profile_comes_back_with_the_same_hash(
    tmp_path: Path, shares: tuple[float, ...] | None
) -> None:
    profile = Profile(FINGERPRINT, shares)
    profile.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p") == profile
    assert Profile.load(tmp_path / "p").hash == profile.hash
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_profiles_that_differ_have_other_hashes() -> None:
    profiles = [
        Profile(FINGERPRINT),
        Profile("cd" * 32),
        Profile(FINGERPRINT, (1, 2)),
        Profile(FINGERPRINT, (2, 1)),
    ]
    assert len({profile.hash for profile in profiles}) == 4
    assert all(len(profile.hash) == 32 for profile in profiles)


@pytest.mark.parametrize(
    "field, value",
    [("fingerprint", "cd" * 32), ("layer_shares", [0.2, 0.8]), ("schema", 2), ("hash", "00" * 32)],
)
def test_an_edited_profile_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = saved(tmp_path)
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {field: value}))
    with pytest.raises(ProfileMismatch, match="edited or is of another version; make"):
        Profile.load(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    text = path.read_bytes().rstrip()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(BadInput, match="not a kvprism profile"):
            Profile.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"schema": 1, "fingerprint": FINGERPRINT, "hash": "00"}).encode(),
        json.dumps({"schema": 1, "fingerprint": "xy", "layer_shares": None, "hash": ""}).encode(),
        json.dumps(
            {"schema": 1, "fingerprint": FINGERPRINT, "layer_shares": [-1], "hash": ""}
        ).encode(),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(BadInput):
        Profile.load(path)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    with pytest.raises(BadInput, match="more"):
        Profile.load(path)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "profile.json"
    with pytest.raises(BadInput, match=r"no/profile.json cannot be read: No such file"):
        Profile.load(missing)
    with pytest.raises(BadInput, match=r"no/profile.json cannot be written: No such file"):
        Profile(FINGERPRINT).save(missing)


@pytest.mark.parametrize("fingerprint", ["", "ab", "AB" * 32, "zz" * 32, "ab " * 32])
def test_a_fingerprint_is_32_bytes_of_lower_case_hex(fingerprint: str) -> None:
    with pytest.raises(BadInput, match="32 bytes in lower-case hex"):
        Profile(fingerprint)


@pytest.mark.parametrize("shares", [(), (0.0,), (-1.0,), (math.nan,), (math.inf, 1.0)])
def test_shares_are_positive_and_finite(shares: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="positive and finite"):
        Profile(FINGERPRINT, shares)


def test_a_profile_of_another_model_is_refused() -> None:
    profile = Profile(FINGERPRINT)
    profile.check(bytes.fromhex(FINGERPRINT))
    with pytest.raises(ProfileMismatch, match=r"abababababababab\.\.\., this model has cdcdcdcd"):
        profile.check(bytes.fromhex("cd" * 32))
    assert issubclass(ProfileMismatch, KVPrismError)
