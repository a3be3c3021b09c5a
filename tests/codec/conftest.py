"""Fixtures of the codec's tests."""

from collections.abc import Iterator

import pytest

from kvprism.codec import cpu


@pytest.fixture(scope="module")
def blocks_of_any_size_are_shared() -> Iterator[None]:
    """Kernels take threads for blocks of any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_NBYTES_PER_THREAD", 1)
        yield
