"""Blocks as the attention kernels fill them, slot by slot, against the views that read them."""

import pytest
import torch

from kvprism.errors import ShapeMismatch, Unsupported
from kvprism.integrations.vllm.layouts import (
    PagedCache,
    Views,
    cpu_views,
    flash_views,
    layer_number,
    layout_of,
)

BLOCKS, HEADS, SLOTS, CHANNELS = 7, 2, 4, 6
TABLE = (5, 0, 3, 6)  # the blocks of one request, in order


def fill_cpu(
    kv: torch.Tensor, block: int, slot: int, key: torch.Tensor, value: torch.Tensor
) -> None:
    """CPU_ATTN: per block and head, keys as [channel, slot], then values as [slot, channel]."""
    memory = kv.view(BLOCKS, HEADS, -1)
    for head in range(HEADS):
        for channel in range(CHANNELS):
            memory[block, head, channel * SLOTS + slot] = key[head, channel]
            at = SLOTS * CHANNELS + slot * CHANNELS + channel
            memory[block, head, at] = value[head, channel]


def fill_flash(
    kv: torch.Tensor, block: int, slot: int, key: torch.Tensor, value: torch.Tensor
) -> None:
    """FlashAttention: per block, head and slot, the key and then the value."""
    kv[block, :, slot, :CHANNELS] = key
    kv[block, :, slot, CHANNELS:] = value


def filled(layout: str, n: int) -> tuple[torch.Tensor, Views, torch.Tensor, torch.Tensor]:
    """A layer with `n` tokens in it: tensor, views, keys and values `[head, token, channel]`."""
    keys, values = torch.randn(2, HEADS, n, CHANNELS)
    kv = torch.zeros(BLOCKS, HEADS, SLOTS, 2 * CHANNELS)
    if layout == "flash-by-token":  # the same, but the memory of a block goes token by token
        kv = kv.transpose(1, 2).contiguous().transpose(1, 2)
    fill, views = (fill_cpu, cpu_views) if layout == "cpu" else (fill_flash, flash_views)
    for token in range(n):
        block, slot = TABLE[token // SLOTS], token % SLOTS
        fill(kv, block, slot, keys[:, token], values[:, token])
    return kv, views(kv), keys, values


LAYOUTS = ["cpu", "flash", "flash-by-token"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("start", "stop"), [(0, 14), (0, 1), (3, 9), (4, 8), (13, 14)])
def test_gathered_rows_are_those_of_the_tokens(layout: str, start: int, stop: int) -> None:
    _, views, keys, values = filled(layout, 14)
    got = PagedCache({0: views}).gather(0, TABLE, start, stop)
    assert torch.equal(got[0], keys[:, start:stop])
    assert torch.equal(got[1], values[:, start:stop])
    assert all(x.is_contiguous() for x in got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("start", "stop"), [(0, 14), (3, 9), (13, 14)])
def test_scattered_rows_lie_where_the_kernel_reads_them(layout: str, start: int, stop: int) -> None:
    whole, _, keys, values = filled(layout, 14)
    kv, views, _, _ = filled(layout, 0)
    cache = PagedCache({0: views})
    for first, last in ((0, start), (stop, 14), (start, stop)):
        if first < last:
            cache.scatter(0, TABLE, first, keys[:, first:last], values[:, first:last])
    assert torch.equal(kv, whole)


def test_a_gathered_copy_does_not_change_with_the_blocks() -> None:
    kv, views, keys, _ = filled("cpu", 4)
    got, _ = PagedCache({0: views}).gather(0, TABLE, 0, 4)
    kv.zero_()
    assert torch.equal(got, keys[:, :4])


def test_tokens_arrive_in_the_dtype_of_the_cache() -> None:
    kv = torch.zeros(BLOCKS, HEADS, SLOTS, 2 * CHANNELS)
    rows = torch.randn(HEADS, 3, CHANNELS, dtype=torch.bfloat16)
    cache = PagedCache({0: cpu_views(kv)})
    cache.scatter(0, TABLE, 0, rows, rows)
    assert torch.equal(cache.gather(0, TABLE, 0, 3)[0], rows.float())


def test_tokens_beyond_the_blocks_are_refused() -> None:
    _, views, _, _ = filled("cpu", 4)
    with pytest.raises(ShapeMismatch, match=r"\[14, 17\) do not lie in 4 blocks of 4"):
        PagedCache({0: views}).gather(0, TABLE, 14, 17)


def test_untried_fillings_are_refused_by_name() -> None:
    assert layout_of("CPU_ATTN", "vec") is cpu_views
    with pytest.raises(Unsupported, match="CPU_ATTN amx"):
        layout_of("CPU_ATTN", "amx")
    with pytest.raises(Unsupported, match="FLASHINFER fills"):
        layout_of("FLASHINFER")


def test_layer_numbers() -> None:
    assert layer_number("model.layers.11.self_attn.attn") == 11
    with pytest.raises(Unsupported, match=r"decoder\.attn"):
        layer_number("decoder.attn")
