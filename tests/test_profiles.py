"""Profiles: what is read back is what was written, or a typed error."""

import json
import math
from base64 import b64decode, b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvprism.errors import BadInput, KVPrismError, ProfileMismatch
from kvprism.profiles import MAX_PROFILE_NBYTES, ProbeRecord, Profile
from kvprism.routes import Route, parse_layers
from kvprism.tensors import KeyConditioning

FINGERPRINT = "ab" * 32


def conditioning(heads: int = 2, channels: int = 8, rotate: bool = False) -> KeyConditioning:
    drawn = torch.Generator().manual_seed(heads)
    return KeyConditioning(
        offset=torch.randn(heads, channels, generator=drawn) * 100,
        scale=torch.rand(heads, channels // 2, generator=drawn) + 0.5,
        inverse_frequencies=torch.tensor(10.0) ** -torch.arange(channels // 2),
        rotate=rotate,
    )


PROBE = ProbeRecord("no", "yes", ("conditioned", "no-int4"), "layer 0 has outliers")
WHOLE = Profile(FINGERPRINT, (0.1, 0.9), (conditioning(), None), PROBE)
ROUTE = Route("polykv", 640, parse_layers("0: full, 1: snapkv@640"), "by hand")


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    WHOLE.save(path)
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


def test_every_section_comes_back_bit_for_bit(tmp_path: Path) -> None:
    layers = (None, conditioning(4, 8, rotate=True), conditioning(1, 6))
    probe = ProbeRecord("inconclusive", "no", ("plain", "conditioned", "no-int4"), "raw 2/3: no μ")
    Profile(FINGERPRINT, (1, 2, 3), layers, probe).save(tmp_path / "p")
    back = Profile.load(tmp_path / "p")
    assert back.probe == probe and back.conditioning is not None
    assert [layer is None for layer in back.conditioning] == [True, False, False]
    for layer, same in zip(layers, back.conditioning, strict=True):
        if layer is not None and same is not None:
            assert torch.equal(layer.offset, same.offset) and torch.equal(layer.scale, same.scale)
            assert torch.equal(layer.inverse_frequencies, same.inverse_frequencies)
            assert layer.rotate == same.rotate


def test_profiles_that_differ_have_other_hashes() -> None:
    profiles = [
        Profile(FINGERPRINT),
        Profile("cd" * 32),
        Profile(FINGERPRINT, (1, 2)),
        Profile(FINGERPRINT, (2, 1)),
        Profile(FINGERPRINT, None, (None, None)),
        Profile(FINGERPRINT, None, (conditioning(), None)),
        Profile(FINGERPRINT, None, (None, conditioning())),
        Profile(FINGERPRINT, None, (conditioning(rotate=True), None)),
        WHOLE,
    ]
    assert len({profile.hash for profile in profiles}) == len(set(profiles)) == len(profiles)
    assert all(len(profile.hash) == 32 for profile in profiles)


def test_a_section_changes_its_own_hash_alone() -> None:
    other = replace(WHOLE, probe=replace_probe(reason="another reason"))
    ours, theirs = WHOLE.section_hashes(), other.section_hashes()
    assert [name for name in ours if ours[name] != theirs[name]] == ["probe"]
    assert other.hash != WHOLE.hash


def test_routes_are_a_readable_section_and_come_back(tmp_path: Path) -> None:
    routed = replace(WHOLE, routes=(ROUTE, replace(ROUTE, policy="polykv-best")))
    routed.save(tmp_path / "p")
    body = json.loads((tmp_path / "p").read_text())
    assert body["routes"][0] == {
        "policy": "polykv", "tokens": 640, "prefill": "0: full, 1: snapkv@640", "note": "by hand"
    }  # fmt: skip
    assert Profile.load(tmp_path / "p") == routed
    assert Profile.load(tmp_path / "p").routes == routed.routes


def test_a_routes_decode_phase_is_stored_and_hashed_where_it_has_one(tmp_path: Path) -> None:
    plain = replace(WHOLE, routes=(ROUTE,))
    routed = replace(WHOLE, routes=(replace(ROUTE, decode=parse_layers("0: full, 1: h2o@640")),))
    routed.save(tmp_path / "p")
    assert json.loads((tmp_path / "p").read_text())["routes"][0]["decode"] == "0: full, 1: h2o@640"
    assert Profile.load(tmp_path / "p").routes == routed.routes and routed.hash != plain.hash
    # As files that were written before routes had one.
    assert plain.section_hashes()["routes"].hex().startswith("22038704c4409965")


def test_a_profile_without_routes_keeps_the_hash_that_it_always_had() -> None:
    """Those of files that were written before there were routes."""
    assert Profile(FINGERPRINT).hash.hex().startswith("f5d58b7f8f82fdb6")
    routed = replace(WHOLE, routes=(ROUTE,))
    ours, theirs = WHOLE.section_hashes(), routed.section_hashes()
    assert [name for name in theirs if theirs[name] != ours.get(name)] == ["routes"]
    assert routed.hash != WHOLE.hash


@pytest.mark.parametrize(
    "change, why",
    [
        ({"tokens": 641}, "was edited: routes"),
        ({"prefill": "0: full, 1: snapkv@641"}, "was edited: routes"),
        ({"prefill": "0: full, 1: h2o@640"}, "was edited: routes"),
    ],
)
def test_an_edited_route_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    replace(WHOLE, routes=(ROUTE,)).save(tmp_path / "p")
    body = json.loads((tmp_path / "p").read_text())
    body["routes"][0] |= change
    (tmp_path / "p").write_text(json.dumps(body))
    with pytest.raises(ProfileMismatch, match=why):
        Profile.load(tmp_path / "p")
    del body["routes"]
    (tmp_path / "p").write_text(json.dumps(body))
    with pytest.raises(ProfileMismatch, match="was edited"):
        Profile.load(tmp_path / "p")


def replace_probe(**changes: Any) -> ProbeRecord:
    changed: ProbeRecord = msgspec.structs.replace(PROBE, **changes)
    return changed


@pytest.mark.parametrize(
    "field, value",
    [
        ("fingerprint", "cd" * 32),
        ("layer_shares", [0.2, 0.8]),
        ("conditioning", [None, None]),
        ("probe", {"int4": "yes", "conditioned": "no", "settings": ["plain"] * 2, "reason": ""}),
        ("hash", "00" * 32),
    ],
)
def test_an_edited_profile_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = saved(tmp_path)
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {field: value}))
    with pytest.raises(ProfileMismatch, match=f"was edited: {field} is not what .*; make"):
        Profile.load(path)


def test_an_edited_number_of_the_conditioning_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    body = json.loads(path.read_text())
    entry = body["conditioning"][0]
    scale = np.frombuffer(b64decode(entry["scale"]), "<f4").copy()
    scale[0] *= 1 + 2**-20
    entry["scale"] = b64encode(scale.tobytes()).decode()
    path.write_text(json.dumps(body))
    with pytest.raises(ProfileMismatch, match="was edited: conditioning is not"):
        Profile.load(path)


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text(json.dumps({"schema": 1, "fingerprint": FINGERPRINT, "hash": "00"}))
    with pytest.raises(ProfileMismatch, match="schema 1, this kvprism reads 2; make the profile"):
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
        b'{"schema": 2}',
        b'{"schema": "2"}',
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a kvprism profile"):
        Profile.load(path)


@pytest.mark.parametrize(
    "section, change, why",
    [
        ("fingerprint", "xy", "lower-case hex"),
        ("layer_shares", [-1.0, 1.0], "positive and finite"),
        ("conditioning", [{"heads": 2**31}, None], r"offset of \[2147483648, 8\] .* got 64"),
        ("conditioning", [{"heads": 0}, None], "heads"),
        ("conditioning", [{"channels": 7}, None], "channels"),
        ("conditioning", [{"channels": 4}, None], "offset of"),
        ("conditioning", [{"scale": "AAAA"}, None], "scale of .* takes 32 bytes, got 3"),
        ("conditioning", [{"scale": "A"}, None], "base64"),
        ("conditioning", [{"offset": b64encode(b"\0\0\xc0\x7f" * 16).decode()}, None], "finite"),
        ("conditioning", [{"scale": b64encode(bytes(32)).decode()}, None], "must be positive"),
        ("conditioning", [{"more": 1}, None], "more"),
        ("probe", {"int4": "maybe"}, "maybe"),
        ("probe", {"settings": ["plain"]}, "same layers"),
    ],
)
def test_a_section_that_is_not_whole_is_refused(
    tmp_path: Path, section: str, change: Any, why: str
) -> None:
    path = saved(tmp_path)
    body = json.loads(path.read_text())
    if section == "conditioning":
        change = [body[section][0] | change[0], None]
    elif section == "probe":
        change = body[section] | change
    path.write_text(json.dumps(rehashed(body | {section: change})))
    with pytest.raises(BadInput, match=why):
        Profile.load(path)


def rehashed(body: dict[str, Any]) -> dict[str, Any]:
    """With the hashes that the module's documentation gives, as a forger would write them."""
    digests = []
    for name in ("fingerprint", "layer_shares", "conditioning", "probe"):
        canonical = json.dumps(body[name], sort_keys=True, separators=(",", ":"))
        digests.append(sha256(f"{name}\0{canonical}".encode()))
        body["hashes"][name] = digests[-1].hexdigest()
    root = sha256(b"kvprism profile 2\0" + b"".join(digest.digest() for digest in digests))
    return body | {"hash": root.hexdigest()}


def test_hashes_are_what_the_documentation_says(tmp_path: Path) -> None:
    body = json.loads(saved(tmp_path).read_text())
    assert rehashed(json.loads(json.dumps(body))) == body


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with path.open("wb") as file:
        file.truncate(MAX_PROFILE_NBYTES + 1)
    with pytest.raises(BadInput, match=r"has 67108865 bytes, at most 67108864 are read"):
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


@pytest.mark.parametrize(
    "sections, why",
    [
        ({"layer_shares": (1,), "conditioning": (None, None)}, "same layers"),
        ({"layer_shares": (1,), "routes": (ROUTE,)}, "same layers"),
        ({"routes": (ROUTE, ROUTE)}, "one route for 'polykv' at 640 tokens"),
        ({"conditioning": ()}, "at least one"),
        ({"probe": replace_probe(settings=())}, "at least one"),
        ({"probe": replace_probe(settings=("none",))}, "'none'"),
        ({"probe": replace_probe(int4="perhaps")}, "perhaps"),
        ({"probe": PROBE}, "layer 0 to 'conditioned' and the profile has no conditioning"),
        ({"probe": PROBE, "conditioning": (None, conditioning())}, "layer 0 to 'conditioned'"),
    ],
)
def test_sections_must_go_together(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Profile(FINGERPRINT, **sections)


def test_a_profile_of_another_model_is_refused() -> None:
    profile = Profile(FINGERPRINT)
    profile.check(bytes.fromhex(FINGERPRINT))
    with pytest.raises(ProfileMismatch, match=r"abababababababab\.\.\., this model has cdcdcdcd"):
        profile.check(bytes.fromhex("cd" * 32))
    assert issubclass(ProfileMismatch, KVPrismError)
