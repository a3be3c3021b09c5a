"""Blocks against their offer: order, ranges, exact tiling."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprism.errors import Damaged, ProtocolViolation
from kvprism.wire.frames import frame_nbytes
from kvprism.wire.intake import Intake, Rectangle, manifest_nbytes, native_nbytes, overlap
from kvprism.wire.messages import NO_ID, Block, End, Manifest, TierMap

from .examples import UNIFORM, manifests_of, offer_of

ranges = st.tuples(st.integers(0, 5), st.integers(1, 4)).map(lambda p: (p[0], p[0] + p[1]))


def cells(rectangle: Rectangle) -> set[tuple[int, int]]:
    tokens, heads = rectangle
    return {(t, h) for t in range(*tokens) for h in range(*heads)}


@given(st.lists(st.tuples(ranges, ranges), max_size=6))
def test_overlap_is_found_exactly_when_two_blocks_share_a_row(rectangles: list[Rectangle]) -> None:
    covered = [cell for rectangle in rectangles for cell in cells(rectangle)]
    assert overlap(rectangles) == (len(set(covered)) < len(covered))


def manifest_of(*blocks: Block, sequence: int = 0) -> Manifest:
    return Manifest(NO_ID, NO_ID, sequence, (UNIFORM,), blocks)


def tile(component: str, heads: tuple[int, int], tokens: tuple[int, int], layer: int = 0) -> Block:
    return Block(layer, component, heads, tokens, 0, ())


def took(*blocks: Block) -> Intake:
    intake = Intake(offer_of())
    for sequence, block in enumerate(blocks):
        manifest = manifest_of(block, sequence=sequence)
        intake.announce(manifest)
        intake.take(manifest)
    return intake


WHOLE = (
    tile("k", (0, 2), (0, 12)),
    tile("v", (0, 2), (0, 12)),
    tile("k", (0, 2), (4, 12), layer=5),
)


def test_token_chunks_times_head_ranges_tile_in_any_order() -> None:
    quarters = [
        tile("k", heads, tokens) for heads in ((0, 1), (1, 2)) for tokens in ((0, 5), (5, 12))
    ]
    took(*reversed(quarters), *WHOLE[1:]).check_tiling()


def test_a_gap_is_noticed() -> None:
    with pytest.raises(ProtocolViolation, match="8 offered"):
        took(*WHOLE[:2], tile("k", (0, 1), (4, 12), layer=5)).check_tiling()


def test_an_overlap_that_hides_a_gap_is_noticed() -> None:
    halves = [tile("k", (0, 2), (0, 6)), tile("k", (0, 2), (5, 11))]
    with pytest.raises(ProtocolViolation, match="layer 0 'k': two blocks overlap"):
        took(*halves, *WHOLE[1:]).check_tiling()


def test_more_than_was_offered_is_refused_at_once() -> None:
    with pytest.raises(ProtocolViolation, match="overlap"):
        took(*WHOLE, WHOLE[0])


@pytest.mark.parametrize(
    "block",
    [
        tile("k", (0, 3), (0, 12)),
        tile("k", (0, 2), (0, 13)),
        tile("k", (0, 2), (3, 12), layer=5),
        tile("v", (0, 2), (4, 12), layer=5),
        tile("k", (0, 2), (0, 12), layer=1),
    ],
)
def test_a_block_outside_the_offer_is_refused(block: Block) -> None:
    with pytest.raises(ProtocolViolation, match="outside the offer"):
        Intake(offer_of()).announce(manifest_of(block))


def test_a_tier_outside_the_menu_is_refused() -> None:
    tiers = TierMap(1, 0, 0, b"\x04", b"")
    manifest = msgspec.structs.replace(manifest_of(WHOLE[0]), maps=(tiers,))
    with pytest.raises(ProtocolViolation, match="menu of 4"):
        Intake(offer_of()).announce(manifest)


def test_a_receiver_without_missing_tokens_refuses_a_map_that_drops() -> None:
    dropping = manifests_of()[0][0]  # one of its maps has the drop tier
    Intake(offer_of(), allow_drop=True).announce(dropping)
    with pytest.raises(ProtocolViolation, match="can hold"):
        Intake(offer_of(), allow_drop=False).announce(dropping)
    Intake(offer_of(), allow_drop=False).announce(manifest_of(WHOLE[0]))


@pytest.mark.parametrize("sequences", [(1,), (0, 0), (0, 2), (0, 1, 0)])
def test_manifests_come_in_sequence(sequences: tuple[int, ...]) -> None:
    intake = Intake(offer_of())
    with pytest.raises(ProtocolViolation, match="was due"):
        for sequence in sequences:
            manifest = manifest_of(tile("k", (0, 1), (sequence, sequence + 1)), sequence=sequence)
            intake.announce(manifest)
            intake.take(manifest)


def test_a_manifest_and_its_segments_come_together() -> None:
    first, second = manifest_of(WHOLE[0]), manifest_of(WHOLE[1], sequence=1)
    intake = Intake(offer_of())
    with pytest.raises(ProtocolViolation, match="together"):
        intake.take(first)
    intake.announce(first)
    calls: list[Callable[[], None]] = [
        lambda: intake.announce(second),
        lambda: intake.take(second),
        lambda: intake.damage(second),
        lambda: intake.check_end(End(NO_ID, NO_ID, 1, intake.nbytes)),
    ]
    for call in calls:
        with pytest.raises(ProtocolViolation, match="together"):
            call()
    intake.take(first)
    intake.announce(second)


def test_a_damaged_manifest_may_come_again_but_not_for_ever() -> None:
    intake, manifest = Intake(offer_of()), manifest_of(WHOLE[0])
    intake.announce(manifest)
    before = intake.nbytes
    intake.damage(manifest)
    intake.announce(manifest)
    intake.damage(manifest)
    intake.announce(manifest)
    assert (intake.nbytes, intake.manifests) == (before, 1)
    with pytest.raises(Damaged, match="3 times"):
        intake.damage(manifest)


def test_the_end_must_name_what_came() -> None:
    offer, manifest = offer_of(), manifests_of()[0][0]
    intake = Intake(offer)
    intake.announce(manifest)
    intake.take(manifest)
    nbytes = frame_nbytes(offer) + manifest_nbytes(manifest)
    intake.check_end(End(NO_ID, NO_ID, 1, nbytes))
    for wrong in ((0, nbytes), (1, nbytes + 1), (1, nbytes - 1)):
        with pytest.raises(ProtocolViolation, match="END"):
            intake.check_end(End(NO_ID, NO_ID, *wrong))


def test_native_bytes_count_every_row_of_the_offer() -> None:
    assert native_nbytes(offer_of()) == 2 * (2 * 12 * 8) * 2 + (2 * 8 * 8) * 4
