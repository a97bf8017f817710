# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""What both orientations of `attention` use: dequantising a tile of rows, and merging a list's splits.

The merge also rotates the output back where that is asked for (rope > 0), that of unsplit lists in place. It
rounds to the output's type before it does, so that the bits are those of two launches.
"""

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.layouts import RowLayout
from weft.kernels.triton.common import load_rotation, rotate_back


def sizes(layout: RowLayout) -> tuple[int, ...]:
    """What `rows_tile` reads: where rows and scales are, channels, and groups rounded up to a power of two."""
    at = layout.page, layout.page_bytes, layout.data_bytes, layout.scale_bytes, layout.scales_at
    groups = int(triton.next_power_of_2(-(-layout.channels // layout.group)))
    return *at, layout.coded, layout.channels, layout.group, groups


@triton.jit
def rows_tile(
    pool,
    plain,
    rows,
    valid,
    LAYOUT: tl.constexpr,
):
    """[N] rows -> [N, GROUPS * GROUP] float16; zeros where a row is not valid and beyond the layout's channels.

    LAYOUT: from `sizes`.
    """
    PAGE: tl.constexpr = LAYOUT[0]
    PAGE_BYTES: tl.constexpr = LAYOUT[1]
    DATA: tl.constexpr = LAYOUT[2]
    SCALE: tl.constexpr = LAYOUT[3]
    SCALES_AT: tl.constexpr = LAYOUT[4]
    CODED: tl.constexpr = LAYOUT[5]
    CHANNELS: tl.constexpr = LAYOUT[6]
    GROUP: tl.constexpr = LAYOUT[7]
    GROUPS: tl.constexpr = LAYOUT[8]
    page = (rows // PAGE).to(tl.int64) * PAGE_BYTES
    place = rows % PAGE
    data = (page + place * DATA)[:, None, None]
    group = tl.arange(0, GROUPS)
    channel = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None]
    codes = tl.load(pool + data + channel, mask=valid[:, None, None] & (channel < CODED), other=0)
    at = pool + (page + SCALES_AT + place * SCALE)[:, None] + group[None, :]
    exponent = tl.load(at, mask=valid[:, None] & (group * GROUP < CODED)[None, :], other=0)
    factor = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True).to(tl.float16)
    tile = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16) * factor[:, :, None]
    if CODED < CHANNELS:
        inside = (channel >= CODED) & (channel < CHANNELS)
        half = (rows // PAGE).to(tl.int64) * (PAGE_BYTES // 2) + place * (DATA // 2)
        value = tl.load(
            plain + half[:, None, None] + (channel - CODED // 2), mask=valid[:, None, None] & inside, other=0.0
        )
        tile = tl.where(channel < CODED, tile, value.to(tl.float32).to(tl.float16))
    return tl.reshape(tile, [rows.shape[0], GROUPS * GROUP])


@triton.jit
def turn_in_place(
    out, cos_sin, token, head, heads, CHANNELS: tl.constexpr, ROPE: tl.constexpr, LANES: tl.constexpr
):
    """Rotate the last ROPE channels of a head of `out` back. token: int64."""
    lane = tl.arange(0, LANES)[None, :]
    pair = tl.arange(0, LANES // 2)[None, :]
    at = out + (token * heads + head) * CHANNELS + (CHANNELS - ROPE) + lane
    x = tl.load(at, mask=lane < ROPE, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + token * ROPE + pair, mask=pair < ROPE // 2, other=1.0)
    sin = tl.load(cos_sin + token * ROPE + ROPE // 2 + pair, mask=pair < ROPE // 2, other=0.0)
    x = rotate_back(x, cos, sin)
    tl.debug_barrier()  # several threads may have read the same channel
    tl.store(at, x.to(out.dtype.element_ty), mask=lane < ROPE)


@triton.jit
def merge(
    out,
    part,
    tops,
    totals,
    lengths,
    sink,
    cos_sin,
    heads,
    splits,
    SPLIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (T, H): add a query's splits, first to last. Queries with one split were written already. cos_sin: read
    if ROPE > 0."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + token)
    if length > SPLIT:
        used = tl.cdiv(length, SPLIT)
        channel = tl.arange(0, WIDTH)
        at = token * splits * heads + head
        bias = tl.load(sink + head) * 1.4426950408889634
        highest = bias
        for split in range(used):
            highest = tl.maximum(highest, tl.load(tops + at + split * heads))
        # Nothing may have weight, the sink included; then differences from -inf would be NaN.
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.exp2(bias - highest)
        acc = tl.zeros([WIDTH], tl.float32)
        for split in range(used):
            share = tl.exp2(tl.load(tops + at + split * heads) - highest)
            total += tl.load(totals + at + split * heads) * share
            where = part + (at + split * heads) * CHANNELS + channel
            acc += tl.load(where, mask=channel < CHANNELS, other=0.0) * share
        target = out + (token * heads + head) * CHANNELS + channel
        whole = tl.where(total > 0, acc / total, 0.0).to(out.dtype.element_ty)
        if ROPE > 0:
            one = token + tl.arange(0, 1)
            cos, sin = load_rotation(cos_sin, one, one >= 0, CHANNELS, ROPE, WIDTH)
            turned = rotate_back(whole.to(tl.float32)[None, :], cos, sin)
            whole = tl.reshape(turned, [WIDTH]).to(out.dtype.element_ty)
        tl.store(target, whole, mask=channel < CHANNELS)
    elif ROPE > 0:
        turn_in_place(out, cos_sin, token, head, heads, CHANNELS, ROPE, LANES)


def turns(cos_sin: Tensor | None, lengths: Tensor) -> tuple[Tensor, int, int]:
    """What a merge is given to rotate: cos_sin or, not read, something; ROPE and LANES."""
    if cos_sin is None:
        return lengths, 0, 2
    rope = cos_sin.shape[1]
    return cos_sin, rope, max(2, triton.next_power_of_2(rope))
