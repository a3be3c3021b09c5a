"""Rows that come twice: 4 bits first, then what turns them into 8, or the row itself."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import INT4, INT8, NATIVE, cache, caches, conditioning_of, plan_of, same_cache

from codec.pieces import stream_of
from codec.test_stream import golden_cache
from kvprism.codec.stream import Assembler, Encoded, decode, encode, encode_layer, stages
from kvprism.core import CONDITIONED_MENU, MENU, PUBLISHED_MENU, UPGRADES
from kvprism.errors import BadInput, KVPrismError, ProtocolViolation, Truncated, Unsupported
from kvprism.layout import Split, TierArray
from kvprism.plans import Plan, offer_of
from kvprism.profiles import Profile
from kvprism.staged import StagedPlan, staged_menu
from kvprism.tensors import LayerKV, RequestKV
from kvprism.wire.stream import Segments

GOLDEN = Path(__file__).parent / "golden" / "staged-1.0.kvp"


def staged(
    kv: RequestKV, final: Plan, cuts: tuple[int, ...] | None = None, sinks: int = 1
) -> StagedPlan:
    """`final` after a map of 4 bits; what is native in it among the first tokens is so at once."""

    def first(layer: LayerKV, name: str) -> TierArray:
        last = final.layers[[la.layer_id for la in kv.layers].index(layer.layer_id)].tier_of[name]
        kept = (np.arange(last.shape[1]) < sinks) & (last == NATIVE)
        return np.where(kept, np.uint8(NATIVE), np.uint8(INT4))

    provisional = plan_of(kv, first)
    start, stop = kv.layers[0].shape().token_range
    menu = staged_menu(final.menu)
    return StagedPlan(
        final.layers, menu, final.split, provisional=provisional.layers, cuts=cuts or (start, stop)
    )


def pieces_of(kv: RequestKV, plan: StagedPlan) -> list[Encoded]:
    pieces: list[Encoded] = []
    for layer, planned in stages(kv, plan):
        pieces += encode_layer(layer, planned, plan.menu, plan.split, len(pieces))
    return pieces


def example() -> tuple[RequestKV, Plan, StagedPlan, list[Encoded]]:
    kv = cache(layers=2, heads=2, tokens=12)
    final = plan_of(kv, np.random.default_rng(3).integers(0, 3, (2, 12)), split=Split(tokens=7))
    plan = staged(kv, final, (0, 5, 12))
    return kv, final, plan, pieces_of(kv, plan)


@given(st.data())
def test_what_arrives_is_the_final_plan_to_the_bit(data: st.DataObject) -> None:
    kv = data.draw(caches())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    palette = data.draw(st.lists(st.sampled_from([NATIVE, INT8, INT4]), min_size=1, unique=True))
    size = st.none() | st.integers(1, 9)
    split = data.draw(st.builds(Split, size, size))
    final = plan_of(kv, lambda la, n: rng.choice(palette, la.components[n].shape[:2]), split=split)
    start, stop = kv.layers[0].shape().token_range
    inner = data.draw(st.sets(st.integers(start + 1, stop - 1))) if stop - start > 1 else set()
    plan = staged(kv, final, (start, *sorted(inner), stop), sinks=data.draw(st.integers(0, 3)))
    stream = encode(kv, plan)
    assert len(stream) == plan.nbytes
    assert same_cache(decode(stream), decode(encode(kv, final)))


def test_conditioned_keys_are_refined_where_they_stand() -> None:
    kv = cache(layers=2, heads=2, tokens=9, channels=16, start=40)
    profile = Profile("00" * 32, conditioning=conditioning_of(kv, rotate=True))
    final = plan_of(kv, np.arange(9) % 3, CONDITIONED_MENU)
    plan = staged(kv, final, (40, 42, 49))
    got = decode(encode(kv, plan, profile=profile), profile=profile)
    assert same_cache(got, decode(encode(kv, final, profile=profile), profile=profile))


def test_the_kernels_and_the_definition_make_and_read_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv, _, plan, _ = example()
    stream, got = encode(kv, plan), decode(encode(kv, plan))
    monkeypatch.setenv("KVPRISM_CODEC", "reference")
    assert encode(kv, plan) == stream
    assert same_cache(decode(stream), got)


def test_only_residuals_are_sent_of_a_row_that_goes_from_4_bits_to_8() -> None:
    kv = cache(layers=1, heads=2, tokens=40, channels=64)
    plan = staged(kv, plan_of(kv, INT8))
    *_, upgrade = pieces_of(kv, plan)
    planes = [(s.plane, s.nbytes) for block in upgrade.manifest.blocks for s in block.segments]
    assert planes == [(3, 2 * 40 * 32)] * 2


def test_rows_that_stay_send_nothing_more() -> None:
    kv = cache(layers=2, tokens=10)
    tiers = plan_of(kv, lambda la, _: np.full(10, INT8 if la.layer_id else INT4))
    plan = staged(kv, tiers)
    assert [layer.shape.layer_id for layer in plan.upgrades] == [1]
    assert staged(kv, plan_of(kv, INT4)).upgrades == ()


def golden() -> tuple[RequestKV, StagedPlan]:
    kv = golden_cache("bfloat16")
    final = plan_of(kv, np.array([[0, 1, 2, 1, 0, 2], [0, 2, 1, 1, 0, 2]], np.uint8))
    return kv, staged(kv, final, (0, 4, 6))


def test_not_a_byte_of_the_golden_stream_changes() -> None:
    kv, plan = golden()
    assert encode(kv, plan, fingerprint=bytes(range(32))) == GOLDEN.read_bytes()


def test_the_golden_stream_decodes_to_its_final_plan() -> None:
    kv, plan = golden()
    assert same_cache(decode(GOLDEN.read_bytes()), decode(encode(kv, Plan(plan.layers, MENU))))


def test_an_upgrade_whose_rows_come_damaged_waits_for_them() -> None:
    kv, final, plan, pieces = example()
    assembler = Assembler(offer_of(plan.shape, plan.menu))
    for piece in [*pieces[1:], pieces[0]]:
        assembler.add(Segments(piece.manifest, piece.area))
    assert same_cache(assembler.finish(), decode(encode(kv, final)))


def test_an_upgrade_of_rows_that_never_come_is_refused() -> None:
    _, _, plan, pieces = example()
    assembler = Assembler(offer_of(plan.shape, plan.menu))
    for piece in pieces[1:]:
        assembler.add(Segments(piece.manifest, piece.area))
    with pytest.raises(ProtocolViolation, match="never came"):
        assembler.finish()


def test_a_stream_that_ends_in_its_upgrades_is_truncated() -> None:
    kv, _, plan, pieces = example()
    stream = encode(kv, plan)
    upgrades = sum(len(piece.area) for piece in pieces[-2:])
    for nbytes in (upgrades // 2, upgrades + 50):
        with pytest.raises(Truncated):
            decode(stream[:-nbytes])


def refused(plan: StagedPlan, pieces: list[Encoded], why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        decode(stream_of(offer_of(plan.shape, plan.menu), pieces))


def test_upgrades_in_the_wrong_place_are_refused() -> None:
    _, _, plan, pieces = example()
    first = len(list(plan.parts()))
    base, upgrades = pieces[:first], pieces[first:]
    refused(plan, [*upgrades, *base], "before 24 of its")
    refused(plan, [*base[:-1], *upgrades, base[-1]], "an upgrade of layer 1 'k' before 14 of its")
    refused(plan, [*pieces, upgrades[0]], "had one before|overlap")
    refused(plan, [*base, base[0]], "overlap")
    refused(plan, [*base[1:], *upgrades], "an upgrade of layer 0")


def changed_maps(piece: Encoded, change: Callable[[bytes], bytes]) -> Encoded:
    maps = tuple(msgspec.structs.replace(m, palette=change(m.palette)) for m in piece.manifest.maps)
    return Encoded(msgspec.structs.replace(piece.manifest, maps=maps), piece.area)


def test_upgrades_that_do_not_fit_their_rows_are_refused() -> None:
    kv = cache(layers=1, tokens=8)
    keep, refine = len(MENU), len(MENU) + 1
    all_int8 = staged(kv, plan_of(kv, INT8))
    [base, upgrade] = pieces_of(kv, all_int8)
    native = pieces_of(kv, staged(kv, plan_of(kv, NATIVE), sinks=8))
    refused(all_int8, [native[0], upgrade], "cannot have it")
    refused(all_int8, [base, changed_maps(upgrade, lambda _: bytes([keep]))], "needs planes")
    mixed = staged(kv, plan_of(kv, np.arange(8) % 2 + 1))
    [base, upgrade] = pieces_of(kv, mixed)
    swap = {keep: INT4, refine: refine}
    refused(
        mixed, [base, changed_maps(upgrade, lambda p: bytes(sorted(swap[t] for t in p)))], "mixes"
    )


def test_what_no_upgrade_makes_is_refused_when_it_is_planned() -> None:
    kv = cache(layers=1, tokens=8)
    for first, last in ((INT8, INT4), (NATIVE, INT8), (INT4, 3)):
        provisional, final = plan_of(kv, first), plan_of(kv, last)
        with pytest.raises(BadInput, match="no upgrade turns"):
            StagedPlan(
                final.layers,
                (*MENU, *UPGRADES),
                provisional=provisional.layers,
                cuts=(0, 8),
            )
    with pytest.raises(Unsupported, match="4 bits to 8"):
        staged_menu(PUBLISHED_MENU)


def test_parts_must_hold_the_whole_of_every_layer() -> None:
    kv = cache(layers=1, tokens=8)
    for cuts in ((), (0,), (0, 7), (1, 8), (0, 5, 5, 8), (0, 6, 5, 8)):
        with pytest.raises(KVPrismError, match="parts bounded"):
            staged(kv, plan_of(kv, INT8), cuts or (8,))


def test_no_value_is_taken_back() -> None:
    """A receiver that reads nothing after the base has the 4-bit code of every row."""
    kv = cache(layers=1, tokens=16, channels=32, dtype="float32")
    plan = staged(kv, plan_of(kv, INT8))
    assembler = Assembler(offer_of(plan.shape, plan.menu))
    [base, _] = pieces_of(kv, plan)
    assembler.add(Segments(base.manifest, base.area))
    [layer] = assembler.finish().layers
    [expected] = decode(encode(kv, plan_of(kv, INT4))).layers
    assert all(torch.equal(layer.components[n], expected.components[n]) for n in "kv")
