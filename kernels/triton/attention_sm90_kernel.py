# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Gluon source of sparse attention on Hopper. Design, budgets and launch: `attention_sm90`.

An item of work is a query's block of 64 heads and 128 of its columns. Three partitions of one thread block work
through the same items. A barrier's n-th use waits for parity n % 2, n counting the block's items.

    fill (one for each half, 64 rows)   fetches rows, waits key_free, dequantises them into its half  -> key_full
                                        the first also waits query_free and fetches the queries (TMA) -> query_full
    attend                              waits for all three: logits -> query_free; weights, sums      -> key_free
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

DIM = gl.constexpr(512)
HEADS = gl.constexpr(64)
KEYS = gl.constexpr(64)
SPLIT = gl.constexpr(128)
CODED = gl.constexpr(448)
DATA = gl.constexpr(576)
FILL_WARPS = gl.constexpr(4)
# The same functions under the names of Triton 3.6 and of later ones.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def reinterpret(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    if RENAMED:
        view = memory.reinterpret(dtype, shape, layout)
    else:
        view = memory._reinterpret(dtype, shape, layout)
    return view


@gluon.jit
def work_item(item, lengths, heads, splits):
    """item -> token, split, first head, the token's number of columns."""
    blocks = gl.cdiv(heads, HEADS)
    token = item // (splits * blocks)
    return token, item % splits, item // splits % blocks * HEADS, gl.load(lengths + token)


@gluon.jit
def tile_rows(index, column, end, ROWS: gl.constexpr):
    at = column + gl.arange(0, KEYS, ROWS)
    return gl.load(index + at, mask=at < end, other=-1)


@gluon.jit
def addresses(rows, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr):
    """Byte offsets of the rows' data and of their scales."""
    row = gl.maximum(rows, 0)
    page = (row // PAGE).to(gl.int64) * PAGE_BYTES
    place = row % PAGE
    return page + place * DATA, page + PAGE * DATA + place * 8


@gluon.jit
def fetch(pool, data, valid, first: gl.constexpr, LAYOUT: gl.constexpr, WORDS: gl.constexpr):
    """[KEYS, WORDS] int32 of the rows' data, from word `first` on. A row's data are multiples of 64 bytes away."""
    word = first + gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))
    at = gl.expand_dims(pool + data // 4, 1) + gl.expand_dims(word, 0)
    return gl.load(at, mask=gl.expand_dims(valid, 1), other=0)


@gluon.jit
def spread(target, codes, scales, group: gl.constexpr):
    """[KEYS, 16] words of four codes, times their power of two, into channels 64 * group.. of the slot.

    Words, not codes: single bytes would take a register each between two rounds of the loop.
    """
    exponent = ((scales >> (8 * group)) & 255).to(gl.int32) << 23
    factor = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [exponent], dtype=gl.int32, is_pure=True, pack=1
    )
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        .reg .b32 c, d;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 c, a;
        cvt.rn.f16x2.e4m3x2 d, b;
        mul.rn.f16x2 $0, c, $3;
        mul.rn.f16x2 $1, d, $3;
        }""",
        "=r,=r,r,r",
        [codes, gl.expand_dims(factor, 1)],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    target.slice(32 * group, 32, dim=1).store(gl.join(low, high).reshape([KEYS, 32]))


@gluon.jit
def spread_plain(target, pairs):
    """[KEYS, 32] words of two bfloat16 channels, into the slot's last 64 channels."""
    value = gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        shl.b32 a, $1, 16;
        and.b32 b, $1, 0xffff0000;
        cvt.rn.f16x2.f32 $0, b, a;
        }""",
        "=r,r",
        [pairs],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    target.slice(CODED // 2, 32, dim=1).store(value)


@gluon.jit
def fill(tensors, query, keys, barriers, numbers, HALF: gl.constexpr, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr):
    """Rows of an item's half in registers while the slot is still in use. Asked for at once: waiting for some of
    them would be waiting for all that share a scoreboard."""
    q, pool, words, index, lengths = tensors
    query_full, query_free, key_full, key_free = barriers
    index_token, heads, splits, items = numbers
    codes: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [FILL_WARPS, 1], [1, 0])
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [FILL_WARPS, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, codes)
    pair_rows: gl.constexpr = gl.SliceLayout(1, pairs)
    target = keys.slice(KEYS * HALF, KEYS, dim=0)
    full = key_full.index(HALF)
    free = key_free.index(HALF)
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, split, first, length = work_item(item, lengths, heads, splits)
        if split * SPLIT < length:
            rows = tile_rows(index + token.to(gl.int64) * index_token, split * SPLIT + KEYS * HALF, length, row_layout)
            data, scales = addresses(rows, PAGE, PAGE_BYTES)
            valid = rows >= 0
            word = gl.load(words + scales // 8, mask=valid, other=0)
            c0 = fetch(pool, data, valid, 0, codes, 16)
            c1 = fetch(pool, data, valid, 16, codes, 16)
            c2 = fetch(pool, data, valid, 32, codes, 16)
            c3 = fetch(pool, data, valid, 48, codes, 16)
            c4 = fetch(pool, data, valid, 64, codes, 16)
            c5 = fetch(pool, data, valid, 80, codes, 16)
            c6 = fetch(pool, data, valid, 96, codes, 16)
            at, inside = gl.convert_layout(data, pair_rows), gl.convert_layout(valid, pair_rows)
            bare = fetch(pool, at, inside, 112, pairs, 32)
            if HALF == 0:
                mbarrier.wait(query_free, (turn + 1) & 1)
                mbarrier.expect(query_full, HEADS * DIM * 2)
                load_box(q, [token * heads + first, 0], query_full, query)
            mbarrier.wait(free, (turn + 1) & 1)
            spread(target, c0, word, 0)
            spread(target, c1, word, 1)
            spread(target, c2, word, 2)
            spread(target, c3, word, 3)
            spread(target, c4, word, 4)
            spread(target, c5, word, 5)
            spread(target, c6, word, 6)
            spread_plain(target, bare)
            fence_async_shared()
            mbarrier.arrive(full, count=1)
            turn += 1


@gluon.jit
def attend(tensors, query, keys, weights, barriers, numbers, scale):
    index, lengths, sink, out, part, tops, totals = tensors
    query_full, query_free, key_full, key_free = barriers
    index_token, heads, splits, items = numbers
    logit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 16])
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, split, first, length = work_item(item, lengths, heads, splits)
        if split * SPLIT < length:
            column = split * SPLIT + gl.arange(0, SPLIT, gl.SliceLayout(0, logit_layout))
            rows = gl.load(index + token.to(gl.int64) * index_token + column, mask=column < length, other=-1)
            mbarrier.wait(query_full, turn & 1)
            mbarrier.wait(key_full.index(0), turn & 1)
            mbarrier.wait(key_full.index(1), turn & 1)
            logits = gl.zeros([HEADS, SPLIT], gl.float32, logit_layout)
            logits = warpgroup_mma(query, keys.permute((1, 0)), logits, use_acc=False)
            mbarrier.arrive(query_free, count=1)
            logits = gl.where(gl.expand_dims(rows >= 0, 0), logits * scale, float("-inf"))
            top = gl.max(logits, 1)
            base = gl.where(top == float("-inf"), 0.0, top)
            weight = gl.exp2(logits - gl.expand_dims(base, 1))
            weights.store(weight.to(gl.float16))
            fence_async_shared()
            synchronise()
            acc = gl.zeros([HEADS, DIM], gl.float32, sum_layout)
            for half in gl.static_range(2):
                left = weights.slice(KEYS * half, KEYS, dim=1)
                right = keys.slice(KEYS * half, KEYS, dim=0)
                acc = warpgroup_mma(left, right, acc, use_acc=half > 0, is_async=True)
            total = gl.sum(weight, 1)
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(key_free.index(0), count=1)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(key_free.index(1), count=1)
            turn += 1
            if length <= SPLIT:
                finish_whole(acc, top, total, sink, out, token, first, heads)
            else:
                finish_part(acc, top, total, part, tops, totals, token * splits + split, first, heads)
        elif split == 0:
            top = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, logit_layout))
            total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, logit_layout))
            acc = gl.zeros([HEADS, DIM], gl.float32, sum_layout)
            finish_whole(acc, top, total, sink, out, token, first, heads)


@gluon.jit
def finish_whole(acc, top, total, sink, out, token, first, heads):
    flat: gl.constexpr = top.type.layout
    layout: gl.constexpr = acc.type.layout
    lane = first + gl.arange(0, HEADS, flat)
    bias = gl.load(sink + lane, mask=lane < heads, other=0.0) * 1.4426950408889634
    highest = gl.maximum(top, bias)
    share = gl.exp2(top - highest)
    factor = share / (total * share + gl.exp2(bias - highest))
    value = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, layout)), 1)
    head = first + gl.arange(0, HEADS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    at = gl.expand_dims((token * heads + head).to(gl.int64) * DIM, 1) + gl.expand_dims(channel, 0)
    gl.store(out + at, value.to(out.dtype.element_ty), mask=gl.expand_dims(head < heads, 1))


@gluon.jit
def finish_part(acc, top, total, part, tops, totals, row, first, heads):
    """Channels in an order in which a thread's values lie together: of 32, by lane of four, then by group of 8. The
    layout is that of the sums with registers in the order of memory."""
    order: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 256]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 128]],
        [],
        [HEADS, DIM],
    )
    flat: gl.constexpr = top.type.layout
    factor = gl.where(total > 0, 1.0 / total, 0.0)
    value = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout)), 1)
    value = value.to(gl.float16).reshape([HEADS, DIM // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([HEADS, DIM])
    value = gl.convert_layout(value, order)
    head = first + gl.arange(0, HEADS, gl.SliceLayout(1, order))
    place = gl.arange(0, DIM, gl.SliceLayout(0, order))
    at = gl.expand_dims((row * heads + head).to(gl.int64) * DIM, 1) + gl.expand_dims(place, 0)
    gl.store(part + at, value, mask=gl.expand_dims(head < heads, 1))
    lane = first + gl.arange(0, HEADS, flat)
    gl.store(tops + row * heads + lane, top, mask=lane < heads)
    gl.store(totals + row * heads + lane, total, mask=lane < heads)


@gluon.jit
def barrier_one():
    one = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(one, count=1)
    return one


@gluon.jit
def barrier_pair():
    pair = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(pair.index(0), count=1)
    mbarrier.init(pair.index(1), count=1)
    return pair


@gluon.jit
def sparse(
    q,
    pool,
    words,
    index,
    lengths,
    sink,
    out,
    part,
    tops,
    totals,
    index_token,
    heads,
    splits,
    items,
    scale,
    PAGE: gl.constexpr,
    PAGE_BYTES: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    """Grid: any number of blocks; they share the items (token, 64 heads, split) evenly.

    q: descriptor of [T * H, 512] float16. pool, words: the pool as int32 and int64. part [T, splits,
    H, 512] float16, tops and totals [T, splits, H].
    """
    query = gl.allocate_shared_memory(gl.float16, [HEADS, DIM], q.layout)
    keys = gl.allocate_shared_memory(gl.float16, [SPLIT, DIM], q.layout)
    as_words: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    key_words = reinterpret(keys, gl.int32, [SPLIT, DIM // 2], as_words)
    weights = gl.allocate_shared_memory(gl.float16, [HEADS, SPLIT], q.layout)
    barriers = (barrier_one(), barrier_one(), barrier_pair(), barrier_pair())
    numbers = (index_token, heads, splits, items)
    results = (index, lengths, sink, out, part, tops, totals)
    tensors = (q, pool, words, index, lengths)
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (attend, (results, query, keys, weights, barriers, numbers, scale)),
            (fill, (tensors, query, key_words, barriers, numbers, 0, PAGE, PAGE_BYTES)),
            (fill, (tensors, query, key_words, barriers, numbers, 1, PAGE, PAGE_BYTES)),
        ],
        [FILL_WARPS, FILL_WARPS],
        [FILL_REGISTERS, FILL_REGISTERS],
    )
