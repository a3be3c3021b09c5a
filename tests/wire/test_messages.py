"""The bytes of version 1.0 do not change: golden frames and one golden file."""

import re
import struct
from pathlib import Path

import msgspec
import pytest
import xxhash

from kvprism.wire.frames import pack
from kvprism.wire.messages import (
    TYPES,
    Block,
    ComponentEntry,
    LayerEntry,
    Message,
    Row,
    Segment,
    TierEntry,
    TierMap,
)
from kvprism.wire.order import FileSession
from kvprism.wire.stream import parse

from .examples import every_message, messages, stream

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
GOLDEN = Path(__file__).parent / "golden"
FRAMES = dict(line.split() for line in (GOLDEN / "frames-1.0.txt").read_text().splitlines())


def test_every_message_type_has_a_golden_frame() -> None:
    assert [kind.__name__ for kind in TYPES] == list(FRAMES)


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_a_message_is_written_as_in_version_1_0(message: Message) -> None:
    assert pack(message).hex() == FRAMES[type(message).__name__]


@pytest.mark.parametrize("message", every_message(), ids=lambda m: type(m).__name__)
def test_a_message_of_version_1_0_is_read(message: Message) -> None:
    assert messages([bytes.fromhex(FRAMES[type(message).__name__])]) == [message]


def test_a_file_is_written_as_in_version_1_0() -> None:
    assert stream() == (GOLDEN / "file-1.0.kvp").read_bytes()


def test_a_file_of_version_1_0_is_read() -> None:
    session = FileSession()
    for event in parse((GOLDEN / "file-1.0.kvp").read_bytes()):
        session.handle(event)
    session.close()
    assert session.complete and session.offer is not None
    assert [layer.layer for layer in session.offer.layers] == [0, 5]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_the_page_names_the_fields_of_every_message(kind: type[Message]) -> None:
    number = TYPES.index(kind) + 1
    section = re.search(rf"^### {number} {kind.__name__.upper()}$(.*?)^##", PAGE, re.M | re.S)
    assert section is not None
    named = re.findall(r"^\| `(\w+)` \|", section[1], re.M)
    assert named == [name for name in kind.__struct_fields__ if name != "ancillary"]


@pytest.mark.parametrize("kind", [TierEntry, LayerEntry, ComponentEntry, Block, Segment, TierMap])
def test_the_page_names_the_fields_of_every_record(kind: type[Row]) -> None:
    text = re.search(rf"^{kind.__name__}: (.*?)\.\s", PAGE, re.M | re.S)
    assert text is not None
    plain = re.sub(r"\([^)]*`[^)]*\)", "", text[1])  # a remark in parentheses may quote other names
    assert re.findall(r"`([a-z]+)` ", plain) == list(kind.__struct_fields__)


def test_the_page_is_enough_to_read_a_file() -> None:
    """Only `docs/format.md`, struct, msgpack and XXH3: nothing of the package is used."""
    data = (GOLDEN / "file-1.0.kvp").read_bytes()
    types, sequences, at = [], [], 0
    while at < len(data):
        magic, kind, flags, zero, nbytes, zeros, digest = struct.unpack_from("<4sBBHIIQ", data, at)
        assert (magic, flags, zero, zeros) == (b"KVPF", 0, 0, 0)
        raw = data[at + 24 : at + 24 + nbytes]
        assert xxhash.xxh3_64_intdigest(data[at : at + 16] + raw) == digest
        body = msgspec.msgpack.decode(raw)
        types.append(kind)
        if kind == 8:
            assert (body["manifests"], body["nbytes"]) == (3, at)
        at += 24 + nbytes
        if kind == 7:
            sequences.append(body["sequence"])
            at = read_segments(data, at, body)
    assert types == [4, 7, 7, 7, 8] and sequences == [0, 1, 2]


def read_segments(data: bytes, at: int, manifest: dict[str, list[list[list[list[bytes]]]]]) -> int:
    for _layer, _component, _heads, _tokens, _map, segments in manifest["blocks"]:
        for _plane, nbytes, digests in segments:
            size, expected = int(nbytes), bytes(digests)
            for i in range(0, size, 65_536):
                part = data[at + i : at + min(i + 65_536, size)]
                digest = struct.unpack_from("<Q", expected, i // 8192)[0]
                assert xxhash.xxh3_64_intdigest(part) == digest
            end = at + (size + 255) // 256 * 256
            assert not any(data[at + size : end])
            at = end
    return at
