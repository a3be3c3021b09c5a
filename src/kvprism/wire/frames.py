"""Control frames <-> messages, and where the segments lie that follow a manifest.

A frame is a 24-byte head and a msgpack body. Segments have no header, so that one-sided transports
can move them; the manifest before them says all. `docs/format.md` is the normative text.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import xxhash

from kvprism.errors import BadInput, Damaged, LimitExceeded, ProtocolViolation, WireError
from kvprism.wire.messages import TYPES, Block, Manifest, Message, Offer, Segment, TierMap

Buffer = bytes | bytearray | memoryview

MAGIC = b"KVPF"
HEAD_NBYTES = 24
ALIGNMENT = 256
DIGEST_BLOCK = 64 * 1024
MAX_BODY = {Manifest: 2**24, Offer: 2**20}
MAX_OTHER_BODY = 2**16

_HEAD = struct.Struct("<4sBBHII")
_DIGEST = struct.Struct("<Q")
_TYPE_IDS = {kind: number for number, kind in enumerate(TYPES, start=1)}
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in TYPES}
_ZEROS = bytes(ALIGNMENT)


@dataclass(frozen=True)
class Limits:
    """What a receiver is willing to hold of one manifest; more is refused before any allocation.

    Raises:
        BadInput: a limit that would admit nothing.
    """

    max_segments_nbytes: int = 2**30
    max_blocks: int = 4096

    def __post_init__(self) -> None:
        if self.max_segments_nbytes < 0 or self.max_blocks < 1:
            raise BadInput(f"limits must admit at least one block, got {self}")


DEFAULT_LIMITS = Limits()


class FrameHead(NamedTuple):
    """A checked head; `covered` is the part of it that the frame's digest covers."""

    kind: type[Message]
    body_nbytes: int
    digest: int
    covered: bytes


def pack(message: Message) -> bytes:
    """The whole frame of `message`: head and body.

    Raises:
        LimitExceeded: the body is longer than a receiver would take.
    """
    body = msgspec.msgpack.encode(message)
    kind = type(message)
    _check_body_nbytes(kind, len(body))
    covered = _HEAD.pack(MAGIC, _TYPE_IDS[kind], 0, 0, len(body), 0)
    return b"".join((covered, _DIGEST.pack(_frame_digest(covered, body)), body))


def frame_nbytes(message: Message) -> int:
    """`len(pack(message))`, without the digest."""
    return HEAD_NBYTES + len(msgspec.msgpack.encode(message))


def parse_head(head: Buffer) -> FrameHead:
    """The checked head of a frame; its body may then be allocated.

    Raises:
        WireError: not a kvprism frame.
        ProtocolViolation: a type, flag or reserved field of a later major version.
        LimitExceeded: the declared body is longer than its type may be.
    """
    covered = bytes(head[: _HEAD.size])
    magic, type_id, flags, reserved, body_nbytes, reserved_too = _HEAD.unpack(covered)
    if magic != MAGIC:
        raise WireError(
            f"expected a frame that starts with {MAGIC!r}, got {magic!r}: not a kvprism stream"
        )
    if not 1 <= type_id <= len(TYPES) or flags or reserved or reserved_too:
        raise ProtocolViolation(
            f"frame type {type_id}, flags {flags}, reserved {reserved} and {reserved_too}: this "
            f"version knows types 1 to {len(TYPES)} and no flags; a newer kvprism may read it"
        )
    kind = TYPES[type_id - 1]
    _check_body_nbytes(kind, body_nbytes)
    return FrameHead(kind, body_nbytes, _DIGEST.unpack(head[_HEAD.size : HEAD_NBYTES])[0], covered)


def unpack(head: FrameHead, body: Buffer, limits: Limits = DEFAULT_LIMITS) -> Message:
    """The message in a frame, digest, types, bounds and ranges checked.

    Raises:
        Damaged: the digest does not match.
        ProtocolViolation: unknown critical fields, wrong types or lengths, impossible ranges.
        LimitExceeded: a manifest above `limits`.
    """
    name = head.kind.__name__
    if _frame_digest(head.covered, body) != head.digest:
        raise Damaged(f"{name} frame of {head.body_nbytes} bytes: its digest does not match")
    try:
        message: Message = _DECODERS[head.kind].decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"{name} frame: {error}") from error
    if isinstance(message, Offer):
        _check_offer(message)
    elif isinstance(message, Manifest):
        _check_manifest(message, limits)
    return message


def padded(nbytes: int) -> int:
    """The next multiple of the segment alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def segments_nbytes(manifest: Manifest) -> int:
    """Bytes of the padded segment area that follows `manifest`."""
    return sum(padded(segment.nbytes) for block in manifest.blocks for segment in block.segments)


def segment_slices(manifest: Manifest) -> list[slice]:
    """Where each segment lies in the area, in manifest order and without its padding."""
    slices, start = [], 0
    for block in manifest.blocks:
        for segment in block.segments:
            slices.append(slice(start, start + segment.nbytes))
            start += padded(segment.nbytes)
    return slices


def clear_padding(manifest: Manifest, area: memoryview) -> None:
    """Write the zeros between the segments of an area that may hold anything."""
    for slot in segment_slices(manifest):
        end = padded(slot.stop)
        area[slot.stop : end] = _ZEROS[: end - slot.stop]


def with_padding(segments: Sequence[Buffer]) -> list[Buffer]:
    """The segments with the zeros between them: what follows the manifest, ready to send."""
    area: list[Buffer] = []
    for segment in segments:
        nbytes = memoryview(segment).nbytes
        area.append(segment)
        area.append(_ZEROS[: padded(nbytes) - nbytes])
    return area


def block_digest(piece: Buffer) -> bytes:
    """Digest of up to 64 KiB of one segment."""
    return _DIGEST.pack(xxhash.xxh3_64_intdigest(piece))


def digest_of(segment: Buffer) -> bytes:
    """The digests of a segment: 8 bytes for each 64 KiB of it."""
    view = memoryview(segment).cast("B")
    return b"".join(
        block_digest(view[at : at + DIGEST_BLOCK]) for at in range(0, len(view), DIGEST_BLOCK)
    )


def verify(segment: Segment, buffer: Buffer) -> None:
    """Compare received bytes with what the manifest says of them.

    Raises:
        Damaged: another length or another digest.
    """
    nbytes = memoryview(buffer).nbytes
    if nbytes != segment.nbytes:
        raise Damaged(f"plane {segment.plane}: expected {segment.nbytes} bytes, got {nbytes}")
    if digest_of(buffer) != segment.digests:
        raise Damaged(f"plane {segment.plane}: the digest of its {nbytes} bytes does not match")


def _frame_digest(covered: bytes, body: Buffer) -> int:
    digest = xxhash.xxh3_64(covered)
    digest.update(body)
    return digest.intdigest()


def _check_body_nbytes(kind: type[Message], nbytes: int) -> None:
    most = MAX_BODY.get(kind, MAX_OTHER_BODY)
    if not nbytes:
        raise ProtocolViolation(
            f"{kind.__name__} frame: an empty body; even an empty map has one byte"
        )
    if nbytes > most:
        raise LimitExceeded(
            f"{kind.__name__} frame: body of {nbytes} bytes, at most {most} allowed"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProtocolViolation(message)


def _check_offer(offer: Offer) -> None:
    ids = [entry.layer for entry in offer.layers]
    _require(ids == sorted(set(ids)), f"offer: layers must ascend, each named once, got {ids}")
    for entry in offer.layers:
        names = [component.name for component in entry.components]
        _require(
            entry.start < entry.stop and len(set(names)) == len(names),
            f"offer: layer {entry.layer} holds {names} over [{entry.start}, {entry.stop})",
        )
        for name, heads, channels in ((c.name, c.heads, c.channels) for c in entry.components):
            _require(
                heads >= 1 and channels >= 1,
                f"offer: layer {entry.layer} {name!r} has {heads} heads of {channels} channels",
            )


def _check_manifest(manifest: Manifest, limits: Limits) -> None:
    if len(manifest.blocks) > limits.max_blocks:
        raise LimitExceeded(
            f"manifest {manifest.sequence}: {len(manifest.blocks)} blocks, at most "
            f"{limits.max_blocks} taken"
        )
    nbytes = segments_nbytes(manifest)
    if nbytes > limits.max_segments_nbytes:
        raise LimitExceeded(
            f"manifest {manifest.sequence}: segments of {nbytes} bytes, at most "
            f"{limits.max_segments_nbytes} taken; send smaller token ranges"
        )
    for i, tier_map in enumerate(manifest.maps):
        _check_tier_map(tier_map, f"manifest {manifest.sequence}: tier map {i}")
    for i, block in enumerate(manifest.blocks):
        _check_block(block, manifest.maps, f"manifest {manifest.sequence}: block {i}")


def _check_tier_map(tier_map: TierMap, at: str) -> None:
    mode, bits, palette, data = tier_map.mode, tier_map.bits, tier_map.palette, tier_map.data
    _require(tier_map.rows >= 1, f"{at}: holds no row")
    _require(
        max(palette) < 16 and len(set(palette)) == len(palette), f"{at}: palette {list(palette)}"
    )
    fits = {
        0: bits == 0 and len(palette) == 1 and not data,
        1: bits in (1, 2, 4) and len(palette) <= 2**bits,
        2: bits == 0 and len(palette) >= 2 and len(data) % 4 == 0,
    }
    _require(
        fits.get(mode, False),
        f"{at}: mode {mode} with {bits} bits, {len(palette)} palette entries and {len(data)} bytes",
    )


def _check_block(block: Block, maps: tuple[TierMap, ...], at: str) -> None:
    heads, tokens = block.heads[1] - block.heads[0], block.tokens[1] - block.tokens[0]
    _require(
        heads > 0 and tokens > 0, f"{at}: heads {block.heads}, tokens {block.tokens} hold nothing"
    )
    _require(block.map < len(maps), f"{at}: tier map {block.map} of {len(maps)}")
    tier_map = maps[block.map]
    _require(tier_map.rows in (1, heads), f"{at}: a map of {tier_map.rows} rows for {heads} heads")
    _require(
        tier_map.mode != 1 or len(tier_map.data) == -(-tier_map.rows * tokens * tier_map.bits // 8),
        f"{at}: {len(tier_map.data)} bytes of map for {tier_map.rows} rows of {tokens} tokens",
    )
    planes = [segment.plane for segment in block.segments]
    _require(
        planes == sorted(set(planes)), f"{at}: planes must ascend, each named once, got {planes}"
    )
    for segment in block.segments:
        _require(
            len(segment.digests) == 8 * -(-segment.nbytes // DIGEST_BLOCK),
            f"{at}: {len(segment.digests)} bytes of digests for {segment.nbytes} bytes",
        )
