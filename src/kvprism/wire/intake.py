"""What has arrived of one offered request: order, ranges, exact tiling, totals."""

from bisect import bisect_left
from collections import defaultdict
from itertools import chain

from kvprism.core import DROP_CODEC, ITEMSIZE, UPGRADE_CODEC
from kvprism.errors import Damaged, ProtocolViolation
from kvprism.wire.frames import frame_nbytes, segments_nbytes
from kvprism.wire.messages import Block, End, Manifest, Offer

MAX_ATTEMPTS = 3

Rectangle = tuple[tuple[int, int], tuple[int, int]]  # token range, head range


def native_nbytes(offer: Offer) -> int:
    """Bytes of the offered area in the cache's own dtype; every dtype must be known."""
    return sum(
        ITEMSIZE[entry.dtype]
        * (entry.stop - entry.start)
        * sum(c.heads * c.channels for c in entry.components)
        for entry in offer.layers
    )


def manifest_nbytes(manifest: Manifest) -> int:
    """Bytes that a manifest takes of the stream and of the credit: its frame and its segments."""
    return frame_nbytes(manifest) + segments_nbytes(manifest)


def overlap(rectangles: list[Rectangle]) -> bool:
    """Whether any two of the rectangles share a (head, token): a sweep over the tokens."""
    edges = chain.from_iterable(((t[0], True, h), (t[1], False, h)) for t, h in rectangles)
    active: list[tuple[int, int]] = []
    for _, opens, heads in sorted(edges):  # at one token, ranges close before others open
        i = bisect_left(active, heads)
        if not opens:
            del active[i]
        elif (i and active[i - 1][1] > heads[0]) or (i < len(active) and active[i][0] < heads[1]):
            return True
        else:
            active.insert(i, heads)
    return False


def _cells(block: Block) -> int:
    """(head, token) rows of a block."""
    return (block.heads[1] - block.heads[0]) * (block.tokens[1] - block.tokens[0])


class Intake:
    """Checks manifests against their offer; the request is complete when their blocks tile it.

    Blocks of upgrades come after all others of their layer and component, and are no tiles: no two
    of them may hold one row. `allow_drop`: whether a block may use a tier that sends nothing.
    """

    def __init__(self, offer: Offer, *, allow_drop: bool = True) -> None:
        self.nbytes = frame_nbytes(
            offer
        )  # as `End.nbytes` counts: a manifest sent twice counts once
        self.manifests = 0
        self.damaged: dict[int, int] = {}  # sequence -> how often its segments came damaged
        self._expected: Manifest | None = None  # its segments are on their way
        self._area = {
            (entry.layer, component.name): ((entry.start, entry.stop), component.heads)
            for entry in offer.layers
            for component in entry.components
        }
        # Rows that no manifest announced yet: of each component, until upgrades may come.
        self._awaited = {key: (t[1] - t[0]) * heads for key, (t, heads) in self._area.items()}
        self._open_cells = self._open_upgrades = sum(self._awaited.values())
        self._tiles: dict[tuple[int, str], list[Rectangle]] = defaultdict(list)
        self._upgraded: dict[tuple[int, str], list[Rectangle]] = defaultdict(list)
        codecs = [tier.codec for tier in offer.menu]
        self._upgrades = {i for i, codec in enumerate(codecs) if codec == UPGRADE_CODEC}
        self._tiers = {i for i, codec in enumerate(codecs) if allow_drop or codec != DROP_CODEC}
        self._menu = len(codecs)

    def announce(self, manifest: Manifest) -> None:
        """A manifest came; its segments follow.

        Raises:
            ProtocolViolation: out of sequence, outside the offered area or menu, or upgrades of
                rows that have not come.
        """
        self._settle(None)
        if manifest.sequence != self.manifests and manifest.sequence not in self.damaged:
            raise ProtocolViolation(
                f"manifest {manifest.sequence} came where {self.manifests} was due"
            )
        used = {tier for tier_map in manifest.maps for tier in tier_map.palette}
        if not used <= self._tiers:
            raise ProtocolViolation(
                f"manifest {manifest.sequence} uses tiers {sorted(used)} of a menu of "
                f"{self._menu}; this receiver can hold {sorted(self._tiers)}"
            )
        for block in manifest.blocks:
            self._check_inside(block)
            if self._upgrades_rows(manifest, block):
                self._check_all_announced(block)
            elif manifest.sequence == self.manifests:
                self._awaited[block.layer, block.component] -= _cells(block)
        if manifest.sequence == self.manifests:
            self.manifests += 1
            self.nbytes += manifest_nbytes(manifest)
        self._expected = manifest

    def take(self, manifest: Manifest) -> None:
        """Its segments came undamaged.

        Raises:
            ProtocolViolation: not announced, or together the blocks hold more than was offered.
        """
        self._settle(manifest)
        self.damaged.pop(manifest.sequence, None)
        for block in manifest.blocks:
            if self._upgrades_rows(manifest, block):
                self._open_upgrades -= _cells(block)
                tiles = self._upgraded
            else:
                self._open_cells -= _cells(block)
                tiles = self._tiles
            tiles[block.layer, block.component].append((block.tokens, block.heads))
        if min(self._open_cells, self._open_upgrades) < 0:
            raise ProtocolViolation(
                f"manifest {manifest.sequence}: its blocks overlap earlier ones"
            )

    def damage(self, manifest: Manifest) -> None:
        """Its segments came damaged; the same sequence number may come again.

        Raises:
            Damaged: for the third time.
            ProtocolViolation: not announced.
        """
        self._settle(manifest)
        attempts = self.damaged.get(manifest.sequence, 0) + 1
        self.damaged[manifest.sequence] = attempts
        if attempts >= MAX_ATTEMPTS:
            raise Damaged(
                f"the segments of manifest {manifest.sequence} came damaged {attempts} times; "
                "check the link, then send the request again"
            )

    def check_end(self, end: End) -> None:
        """END came: it must agree with what was announced.

        Raises:
            ProtocolViolation: other counts.
        """
        self._settle(None)
        if (end.manifests, end.nbytes) != (self.manifests, self.nbytes):
            raise ProtocolViolation(
                f"END after {end.manifests} manifests and {end.nbytes} bytes, but "
                f"{self.manifests} manifests and {self.nbytes} bytes came"
            )

    def check_tiling(self) -> None:
        """The blocks tile the offered area exactly.

        Raises:
            ProtocolViolation: a gap or an overlap.
        """
        tiled = chain(self._tiles.items(), self._upgraded.items())
        for (layer, component), rectangles in tiled:
            if overlap(rectangles):
                raise ProtocolViolation(f"layer {layer} {component!r}: two blocks overlap")
        if self._open_cells:
            raise ProtocolViolation(f"{self._open_cells} offered (head, token) rows never came")

    def _settle(self, manifest: Manifest | None) -> None:
        if self._expected is not manifest:
            raise ProtocolViolation("a manifest and its segments must come together")
        self._expected = None

    def _upgrades_rows(self, manifest: Manifest, block: Block) -> bool:
        palette = set(manifest.maps[block.map].palette)
        if len({tier in self._upgrades for tier in palette}) > 1:
            raise ProtocolViolation(
                f"manifest {manifest.sequence}: a block of layer {block.layer} {block.component!r} "
                f"mixes upgrades with other tiers: {sorted(palette)}"
            )
        return palette <= self._upgrades

    def _check_all_announced(self, block: Block) -> None:
        awaited = self._awaited[block.layer, block.component]
        if awaited > 0:
            raise ProtocolViolation(
                f"an upgrade of layer {block.layer} {block.component!r} before {awaited} of its "
                "(head, token) rows"
            )

    def _check_inside(self, block: Block) -> None:
        (start, stop), heads = self._area.get((block.layer, block.component), ((0, 0), 0))
        if not (start <= block.tokens[0] and block.tokens[1] <= stop and block.heads[1] <= heads):
            raise ProtocolViolation(
                f"a block of layer {block.layer} {block.component!r}, heads {block.heads}, tokens "
                f"{block.tokens} lies outside the offer of {heads} heads over [{start}, {stop})"
            )
