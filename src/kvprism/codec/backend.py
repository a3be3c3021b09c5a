"""Which codec runs: the C kernels where they were compiled and suit the tensors, else torch.

Both make the same bytes. `KVPRISM_CODEC=reference` keeps to the definition, `KVPRISM_CODEC=cpu`
insists on the kernels; what serves others refuses to be slow unless told (`refuse_slow`).
"""

import os
from collections.abc import Mapping, Sequence

import torch

from kvprism.codec import cpu, reference
from kvprism.codec.reference import Conditioned
from kvprism.core import KEYS, Tier
from kvprism.errors import CodecError, UnknownName
from kvprism.layout import Plane, TierArray

VARIABLE = "KVPRISM_CODEC"
AUTO, CPU, REFERENCE = "auto", "cpu", "reference"


def selected() -> str:
    """`cpu` or `reference`: what encodes and decodes tensors that the kernels suit.

    Raises:
        UnknownName: the variable names no codec.
        CodecError: the kernels are there and broken, or insisted on and not there.
    """
    wanted = os.environ.get(VARIABLE) or AUTO
    if wanted not in (AUTO, CPU, REFERENCE):
        raise UnknownName(VARIABLE, wanted, [AUTO, CPU, REFERENCE])
    if wanted == REFERENCE:
        return REFERENCE
    if cpu.library() is not None:
        return CPU
    if wanted == CPU:
        raise CodecError(
            f"{VARIABLE}=cpu, but {cpu.LIBRARY.name} was not compiled: install a C compiler and "
            "kvprism again"
        )
    return REFERENCE


def refuse_slow() -> None:
    """What serves others begins with this: it does not run in the torch reference unasked.

    Raises:
        CodecError: no kernels were compiled, and `KVPRISM_CODEC` does not ask for the reference.
        UnknownName: as `selected`.
    """
    if selected() == REFERENCE and os.environ.get(VARIABLE) != REFERENCE:
        raise CodecError(
            f"{cpu.LIBRARY.name} was not compiled, and the torch reference is far slower than "
            "memory (`kvprism doctor` says by how much): install a C compiler and kvprism again, "
            f"or set {VARIABLE}={REFERENCE} to serve with it all the same"
        )


def encode_into(
    x: torch.Tensor,
    tier_of: TierArray,
    menu: Sequence[Tier],
    planes: Mapping[Plane, memoryview],
    first: tuple[int, int] = (0, 0),
    conditioned: Conditioned | None = None,
    component: str = KEYS,
) -> None:
    """`reference.encode_into`, by whichever codec is selected and suits."""
    x = x.cpu()
    if selected() == CPU and cpu.suits(x, menu, conditioned, component):
        cpu.encode_into(x, tier_of, menu, planes, first, conditioned, component)
    else:
        reference.encode_into(x, tier_of, menu, planes, first, conditioned, component)


def decode_into(
    planes: Mapping[Plane, memoryview],
    tier_of: TierArray,
    menu: Sequence[Tier],
    out: torch.Tensor,
    conditioned: Conditioned | None = None,
    component: str = KEYS,
) -> None:
    """`reference.decode_into`, by whichever codec is selected and suits; `out` of any strides."""
    if selected() == CPU and cpu.suits(out, menu, conditioned, component):
        cpu.decode_into(planes, tier_of, menu, out, conditioned, component)
        return
    # A part of the heads over a part of the tokens is not contiguous, and decoded beside it.
    dense = out.contiguous()
    reference.decode_into(planes, tier_of, menu, dense, conditioned, component)
    if dense is not out:
        out.copy_(dense)
