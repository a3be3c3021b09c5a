"""State that decoding goes on with: named, billed to the byte, refused where nobody wants it."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from peers import TOKEN, exchanged
from strategies import DROP, INT4, NATIVE, cache, plan_of, same_cache, view_of

from kvprism.codec.stream import decode, encode
from kvprism.core import MASS, Capability, ComponentShape, LayerShape
from kvprism.errors import (
    BadInput,
    CodecError,
    LimitExceeded,
    MissingSignal,
    ProtocolViolation,
    Rejected,
)
from kvprism.layout import Split
from kvprism.pipeline import Receiver
from kvprism.planning import plan
from kvprism.plans import offer_of
from kvprism.state import expecting_mass, mass_of, with_mass
from kvprism.tensors import LayerKV, LayerView, RequestKV
from kvprism.wire.frames import frame_nbytes, pack

GOLDEN = Path(__file__).parent / "codec" / "golden" / "mass-1.0.kvp"
LAYERS, HEADS, TOKENS = 2, 2, 96
PER_HEAD = Capability(drop="per_head")
ARMS = [("raw", None), ("int8", None), ("spectrum", 0.5), ("spectrum-2tier", 0.4),
        ("h2o", 0.5), ("snapkv", 0.6), ("cam", 0.5), ("int4-kivi", None)]  # fmt: skip


def captured(dtype: str = "bfloat16") -> tuple[RequestKV, tuple[LayerView, ...]]:
    """Masses between nothing and the length of a long prompt, as sinks have."""
    kv = cache(layers=LAYERS, heads=HEADS, tokens=TOKENS, channels=32, dtype=dtype)
    views = view_of(kv, window=32)
    for i, view in enumerate(views):
        assert view.mass is not None
        view.mass.mul_(torch.logspace(3, -6, TOKENS)).roll(i, dims=1)
    return kv, views


@pytest.mark.parametrize(("policy", "budget"), ARMS)
@pytest.mark.parametrize("capability", [Capability(), PER_HEAD])
def test_the_mass_is_billed_and_comes_with_the_rows_that_are_kept(policy, budget, capability):
    kv, views = with_mass(*captured())
    chosen = plan(views, policy, budget, capability=capability)
    stream = encode(kv, chosen)
    assert len(stream) == chosen.nbytes
    if budget is not None:
        assert chosen.nbytes <= budget * chosen.shape.reference_nbytes
    got = decode(stream, drop=capability.drop)
    for layer, view in zip(got.layers, views, strict=True):
        held = torch.ones_like(layer.components["k"][..., 0]) if layer.held is None else layer.held
        mass = mass_of(layer)
        # Two numbers of 8 bits each: the second is at most half a step of the first, 2^-9 of it.
        expected = view.mass[:, layer.positions] * held
        torch.testing.assert_close(mass, expected, rtol=2**-16, atol=0)
        tiers = chosen.layers[layer.layer_id].tier_of
        assert ((tiers[MASS] == DROP) == (tiers["k"] == DROP)).all()
        assert set(np.unique(tiers[MASS])) <= {NATIVE, DROP}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_its_price_is_two_values_a_row_and_no_fraction_counts_it_below(dtype: str) -> None:
    kv, views = captured(dtype)
    plain = plan(views, "raw")
    with_state = plan(with_mass(kv, views)[1], "raw")
    assert with_state.shape.reference_nbytes == plain.shape.reference_nbytes
    assert with_state.shape.native_nbytes == plain.shape.native_nbytes
    values = LAYERS * HEADS * TOKENS * 2 * plain.shape.layers[0].itemsize
    assert values < with_state.nbytes - plain.nbytes < values + LAYERS * (256 + 100) + 100


def test_at_one_budget_fewer_tokens_are_kept_beside_it() -> None:
    kv, views = captured()
    plain, billed = plan(views, "h2o", 0.5), plan(with_mass(kv, views)[1], "h2o", 0.5)
    kept = [int((p.layers[0].tier_of["k"] == NATIVE).sum()) for p in (plain, billed)]
    assert 0 < kept[0] - kept[1] < 0.1 * kept[0]


def test_a_mass_beyond_the_dtype_is_its_largest_number() -> None:
    kv, views = captured("float16")
    views[0].mass[0, 0] = 1e6
    assert mass_of(with_mass(kv, views)[0].layers[0])[0, 0] == 65504


def test_a_capture_without_it_is_refused() -> None:
    kv = captured()[0]
    bare = tuple(LayerView(layer) for layer in kv.layers)
    with pytest.raises(MissingSignal, match=r"layer 0: .*capture with signals=\{'mass'\}"):
        with_mass(kv, bare)


def test_both_sides_must_mean_it() -> None:
    kv, views = captured()
    shape = kv.shape()
    with_state, state_views = with_mass(kv, views)
    chosen = plan(state_views, "raw")
    with Receiver(TOKEN, expected=expecting_mass(shape)) as receiver:
        _, received = exchanged(receiver, with_state, chosen)
        assert same_cache(received.kv, decode(encode(with_state, chosen)))
        with pytest.raises(Rejected, match="mass 2 x 2"):
            exchanged(receiver, kv, plan(views, "raw"))
    with (
        Receiver(TOKEN, expected=shape) as receiver,
        pytest.raises(Rejected, match="mass 2 x 2"),
    ):
        exchanged(receiver, with_state, chosen)


def test_state_that_is_quantised_is_refused() -> None:
    """By hand: no policy plans so."""
    layer = LayerKV(0, {"k": torch.ones(1, 4, 32), "v": torch.ones(1, 4, 32),
                        MASS: torch.ones(1, 4, 2)}, torch.arange(4))  # fmt: skip
    kv = RequestKV((layer,), 4)
    tiers = {"k": NATIVE, "v": NATIVE, MASS: INT4}
    stream = encode(kv, plan_of(kv, lambda _, name: tiers[name]))
    with pytest.raises(ProtocolViolation, match="layer 0: state 'mass' comes native or not at all"):
        decode(stream)


@pytest.mark.parametrize(("heads", "channels"), [(1, 2), (2, 4)])
def test_state_of_another_shape_is_refused(heads: int, channels: int) -> None:
    parts = (ComponentShape("k", 2, 8), ComponentShape(MASS, heads, channels))
    with pytest.raises(BadInput, match="state 'mass' has the heads of 'k' and 2 channels"):
        LayerShape(0, parts, (0, 4), "bfloat16")


def test_an_offer_of_such_state_is_refused_before_anything_is_allocated() -> None:
    """State is no part of the cache's size, but it is of what a receiver is asked to hold."""
    kv, views = with_mass(*captured())
    chosen = plan(views, "raw")
    whole = sum(x.numel() * 2 for layer in kv.layers for x in layer.components.values())
    decode(encode(kv, chosen), max_nbytes=whole)
    with pytest.raises(LimitExceeded, match=f"decodes to {whole} bytes, at most {whole - 1}"):
        decode(encode(kv, chosen), max_nbytes=whole - 1)
    offer = offer_of(chosen.shape, chosen.menu)
    entry = offer.layers[0]
    huge = msgspec.structs.replace(entry.components[2], heads=60000, channels=60000)
    layers = (msgspec.structs.replace(entry, components=(*entry.components[:2], huge)),)
    forged = msgspec.structs.replace(offer, layers=layers)
    rest = encode(kv, chosen)[frame_nbytes(offer) :]
    with pytest.raises(ProtocolViolation, match=r"the offer describes no cache: .*60000 heads"):
        decode(pack(forged) + rest)


def golden() -> tuple[RequestKV, tuple[LayerView, ...], bytes]:
    """Tokens 3 dropped, the others in every tier; from integers alone."""

    def component(offset: int) -> torch.Tensor:
        values = [((i * 37 + offset) % 239 - 119) / 8 for i in range(2 * 6 * 8)]
        return torch.tensor(values).reshape(2, 6, 8).bfloat16()

    layer = LayerKV(3, {"k": component(0), "v": component(100)}, torch.arange(6))
    mass = torch.tensor([(i * 37 % 239) / 7 for i in range(12)]).reshape(2, 6)
    kv, views = with_mass(RequestKV((layer,), 6), (LayerView(layer, mass=mass),))
    tiers = np.array([[0, 1, 2, 3, 1, 2]], np.uint8)
    state = np.where(tiers == DROP, np.uint8(DROP), np.uint8(NATIVE))
    plan = plan_of(kv, lambda _, name: state if name == MASS else tiers, split=Split(tokens=4))
    return kv, views, encode(kv, plan)


def test_not_a_byte_of_the_golden_stream_changes() -> None:
    assert golden()[2] == GOLDEN.read_bytes()


def test_the_golden_stream_reads_back() -> None:
    _, [view], _ = golden()
    [layer] = decode(GOLDEN.read_bytes()).layers
    assert layer.positions.tolist() == [0, 1, 2, 4, 5]
    assert view.mass is not None
    torch.testing.assert_close(mass_of(layer), view.mass[:, layer.positions], rtol=2**-16, atol=0)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_a_value_that_is_no_mass_is_refused(value: float) -> None:
    rows = {"k": torch.ones(1, 4, 8), MASS: torch.full((1, 4, 2), value)}
    with pytest.raises(CodecError, match="layer 0: state 'mass' has a value that is negative or"):
        mass_of(LayerKV(0, rows, torch.arange(4)))


def test_a_cache_without_it_has_none() -> None:
    kv = captured()[0]
    assert mass_of(kv.layers[0]) is None
