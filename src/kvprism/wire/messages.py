"""Every control message of the wire, as msgspec structs; `docs/format.md` is the normative text.

A top-level message travels as a map: an unknown critical field is refused, unknown keys inside
`ancillary` are skipped. The small nested ones travel as arrays, field by field. Bounds that do not
depend on the receiver stand in the types and are checked while decoding.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

FORMAT = (1, 0)
DIGEST = "xxh3-64/64KiB"
NO_ID = bytes(16)  # request and ticket of a file
NOT_STATED = bytes(32)  # a fingerprint or profile that the operator did not give

Identifier = Annotated[bytes, Meta(min_length=16, max_length=16)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Names = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)]
Shown = Annotated[str, Meta(max_length=256)]
Reason = Annotated[str, Meta(max_length=1024)]
Small = Annotated[int, Meta(ge=0, le=2**16 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Nbytes = Annotated[int, Meta(ge=0, le=2**48)]
Version = tuple[Small, Small]
HeadRange = tuple[Small, Small]
TokenRange = tuple[Count, Count]


class Message(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """A top-level message; `ancillary` holds what later minor versions add and others may skip."""

    ancillary: Annotated[dict[str, msgspec.Raw], Meta(max_length=64)] = {}


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A nested record, sent as an array of its fields."""


class Hello(Message, frozen=True):
    """Receiver -> sender, the first frame of a connection: what it speaks and can hold."""

    format: Version
    digests: Names
    codecs: Names
    drop: Name
    block: Count
    fingerprint: Hash
    profile: Hash
    nonce: Identifier


class Auth(Message, frozen=True):
    """Sender -> receiver, once per connection: the sender holds the token."""

    nonce: Identifier
    proof: Hash


class Welcome(Message, frozen=True):
    """Receiver -> sender: the receiver holds the token too."""

    proof: Hash


class TierEntry(Row, frozen=True):
    codec: Name
    bits: Small
    name: Name


class ComponentEntry(Row, frozen=True):
    name: Name
    heads: Small
    channels: Small


class LayerEntry(Row, frozen=True):
    """One layer of the offered area: components over the tokens `[start, stop)`."""

    layer: Small
    start: Count
    stop: Count
    dtype: Name
    components: Annotated[tuple[ComponentEntry, ...], Meta(min_length=1, max_length=16)]


class Offer(Message, frozen=True):
    """Sender -> receiver, and the first frame of a file: the area and the tiers of one request."""

    format: Version
    digest: Name
    request: Identifier
    fingerprint: Hash
    profile: Hash
    menu: Annotated[tuple[TierEntry, ...], Meta(min_length=1, max_length=16)]
    layers: Annotated[tuple[LayerEntry, ...], Meta(min_length=1, max_length=4096)]


class Accept(Message, frozen=True):
    request: Identifier
    ticket: Identifier
    credit: Nbytes
    lease_ms: Count


class Reject(Message, frozen=True):
    """Receiver -> sender: not taken; `ours` is the value of the side that rejects."""

    request: Identifier
    code: Name
    field: Name
    ours: Shown
    theirs: Shown


class TierMap(Row, frozen=True):
    """Which tier each (head, token) of a block takes, as indices into the offer's menu."""

    rows: Small
    mode: Small
    bits: Small
    palette: Annotated[bytes, Meta(min_length=1, max_length=16)]
    data: bytes


class Segment(Row, frozen=True):
    plane: Annotated[int, Meta(ge=0, le=255)]
    nbytes: Nbytes
    digests: bytes


class Block(Row, frozen=True):
    """A rectangle of heads and tokens of one component of one layer; each segment is one piece."""

    layer: Small
    component: Name
    heads: HeadRange
    tokens: TokenRange
    map: Small
    segments: Annotated[tuple[Segment, ...], Meta(max_length=16)]


class Manifest(Message, frozen=True):
    """Sender -> receiver: the list of the segments that follow it at once."""

    request: Identifier
    ticket: Identifier
    sequence: Count
    maps: Annotated[tuple[TierMap, ...], Meta(max_length=2**16)]
    blocks: Annotated[tuple[Block, ...], Meta(min_length=1, max_length=2**16)]


class End(Message, frozen=True):
    """Sender -> receiver: manifests and bytes before this frame, each manifest counted once."""

    request: Identifier
    ticket: Identifier
    manifests: Count
    nbytes: Nbytes


class Credit(Message, frozen=True):
    """Receiver -> sender: `nbytes` more may be sent."""

    request: Identifier
    ticket: Identifier
    nbytes: Nbytes


class Ack(Message, frozen=True):
    """Receiver -> sender: the request is complete and its ticket dead."""

    request: Identifier
    ticket: Identifier


class Resend(Message, frozen=True):
    """Receiver -> sender: the segments of this manifest were damaged, send both again."""

    request: Identifier
    ticket: Identifier
    sequence: Count


class Abort(Message, frozen=True):
    """Either way: this request is given up."""

    request: Identifier
    ticket: Identifier
    code: Name
    reason: Reason


class Ping(Message, frozen=True):
    pass


class Pong(Message, frozen=True):
    pass


TYPES: tuple[type[Message], ...] = (
    Hello, Auth, Welcome, Offer, Accept, Reject, Manifest, End,
    Credit, Ack, Resend, Abort, Ping, Pong,
)  # fmt: skip
"""Frame type 1 is the first of these, 2 the second, ..."""
