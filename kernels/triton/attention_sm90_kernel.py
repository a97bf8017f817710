# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Gluon source of sparse attention on Hopper. Design, budgets and launch: `attention_sm90`.

An item of work is a query's block of 64 heads and 128 of its columns. Three partitions of a block work
through the same items. A barrier's n-th use waits for parity n % 2, n counting the block's items (for queries,
its loads).

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
# Columns of one item, in two halves.
SPLIT = gl.constexpr(128)
CODED = gl.constexpr(448)
DATA = gl.constexpr(576)
FILL_WARPS = gl.constexpr(4)
# The sums' layout, but with a thread's values in eights that are neighbours in memory, 16 bytes of float16.
LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 256]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 128]],
        [],
        [64, 512],
    )
)
# The same functions under the names of Triton 3.6 and of later ones.
load_box = getattr(tma, "async_load", tma.async_copy_global_to_shared)
synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpret(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    if RENAMED:
        return memory.reinterpret(dtype, shape, layout)
    else:
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def work_item(item, heads, splits):
    """item -> group (a token and a block of its heads), token, split, first head."""
    blocks = gl.cdiv(heads, HEADS)
    group = item // splits
    return group, group // blocks, item % splits, group % blocks * HEADS


@gluon.jit
def listed_rows(index, lengths, token, column, index_token, columns):
    """Rows at `column` and the list's length, loaded side by side: columns behind it are read, not used."""
    length = gl.load(lengths + token)
    rows = gl.load(index + token.to(gl.int64) * index_token + column, mask=column < columns, other=-1)
    return gl.where(column < length, rows, -1), length


@gluon.jit
def addresses(rows, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr):
    """Byte offsets of the rows' data and of their scales."""
    row = gl.maximum(rows, 0)
    page = (row // PAGE).to(gl.int64) * PAGE_BYTES
    place = row % PAGE
    return page + place * DATA, page + PAGE * DATA + place * 8


@gluon.jit
def fetch(pool, data, valid, first: gl.constexpr, LAYOUT: gl.constexpr):
    """[KEYS, 16] words of the rows' data, from word `first` on; zeros for no row."""
    word = first + gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))
    source = gl.expand_dims(pool + data // 4, 1) + gl.expand_dims(word, 0)
    return gl.load(source, mask=gl.expand_dims(valid, 1), other=0, eviction_policy="evict_first")


@gluon.jit
def spread(target, codes, scales, group: gl.constexpr):
    """[KEYS, 16] words of four codes, times their power of two, into channels 64 * group.. of the slot."""
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
def spread_plain(target, pairs, at: gl.constexpr):
    """[KEYS, 16] words of two bfloat16 channels, into the slot's words `at` and on."""
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
    target.slice(at, 16, dim=1).store(value)


@gluon.jit
def fill(
    tensors, query, keys, barriers, numbers, HALF: gl.constexpr, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr
):
    """Rows of an item's half wait in registers while the half is still in use."""
    q, pool, words, index, lengths = tensors
    query_full, query_free, key_full, key_free = barriers
    index_token, columns, heads, splits, items, chunk = numbers
    # Four lanes, 16 bytes each, on a group of 64 codes: no bank conflicts where the values are stored.
    codes: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [FILL_WARPS, 1], [1, 0])
    target = keys.slice(KEYS * HALF, KEYS, dim=0)
    turn = 0
    held = -1
    for number in range(gl.program_id(0), gl.cdiv(items, chunk), gl.num_programs(0)):
        for item in range(number * chunk, gl.minimum(number * chunk + chunk, items)):
            group, token, split, first = work_item(item, heads, splits)
            column = split * SPLIT + KEYS * HALF + gl.arange(0, KEYS, gl.SliceLayout(1, codes))
            rows, length = listed_rows(index, lengths, token, column, index_token, columns)
            if split * SPLIT < length:
                if HALF == 0 and group != held:
                    mbarrier.wait(query_free, (turn + 1) & 1)
                    mbarrier.expect(query_full, HEADS * DIM * 2)
                    load_box(q, [token * heads + first, 0], query_full, query)
                    held = group
                data, scales = addresses(rows, PAGE, PAGE_BYTES)
                valid = rows >= 0
                word = gl.load(words + scales // 8, mask=valid, other=0)
                c0 = fetch(pool, data, valid, 0, codes)
                c1 = fetch(pool, data, valid, 16, codes)
                c2 = fetch(pool, data, valid, 32, codes)
                c3 = fetch(pool, data, valid, 48, codes)
                c4 = fetch(pool, data, valid, 64, codes)
                c5 = fetch(pool, data, valid, 80, codes)
                c6 = fetch(pool, data, valid, 96, codes)
                p0 = fetch(pool, data, valid, 112, codes)
                p1 = fetch(pool, data, valid, 128, codes)
                mbarrier.wait(key_free.index(HALF), (turn + 1) & 1)
                spread(target, c0, word, 0)
                spread(target, c1, word, 1)
                spread(target, c2, word, 2)
                spread(target, c3, word, 3)
                spread(target, c4, word, 4)
                spread(target, c5, word, 5)
                spread(target, c6, word, 6)
                spread_plain(target, p0, 224)
                spread_plain(target, p1, 240)
                fence_async_shared()
                mbarrier.arrive(key_full.index(HALF), count=1)
                turn += 1


@gluon.jit
def attend(tensors, query, keys, weights, barriers, numbers, scale):
    index, lengths, sink, out, part, tops, totals = tensors
    query_full, query_free, key_full, key_free = barriers
    index_token, columns, heads, splits, items, chunk = numbers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 16])
    turn = 0
    held = -1
    loads = 0
    for number in range(gl.program_id(0), gl.cdiv(items, chunk), gl.num_programs(0)):
        for item in range(number * chunk, gl.minimum(number * chunk + chunk, items)):
            group, token, split, first = work_item(item, heads, splits)
            column = split * SPLIT + gl.arange(0, SPLIT, gl.SliceLayout(0, layout))
            rows, length = listed_rows(index, lengths, token, column, index_token, columns)
            if split * SPLIT < length:
                if group != held:
                    mbarrier.wait(query_full, loads & 1)
                    loads += 1
                    held = group
                mbarrier.wait(key_full.index(0), turn & 1)
                mbarrier.wait(key_full.index(1), turn & 1)
                none = gl.zeros([HEADS, SPLIT], gl.float32, layout)
                logits = warpgroup_mma(query, keys.permute((1, 0)), none, use_acc=False)
                mbarrier.arrive(query_free, count=1)
                logits = gl.where(gl.expand_dims(rows >= 0, 0), logits * scale, float("-inf"))
                top = gl.max(logits, 1)
                base = gl.where(top == float("-inf"), 0.0, top)
                weight = gl.exp2(logits - gl.expand_dims(base, 1))
                weights.store(weight.to(gl.float16))
                fence_async_shared()
                synchronise()
                acc = gl.zeros([HEADS, DIM], gl.float32, sums)
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
                flat: gl.constexpr = gl.SliceLayout(1, layout)
                head = gl.expand_dims(first + gl.arange(0, HEADS, flat), 1)
                channel = gl.expand_dims(gl.arange(0, SPLIT, gl.SliceLayout(0, layout)), 0)
                nothing = gl.zeros([HEADS, SPLIT], out.dtype.element_ty, layout)
                at = out + (token * heads + head).to(gl.int64) * DIM + channel
                for piece in gl.static_range(DIM // SPLIT):
                    gl.store(at + piece * SPLIT, nothing, mask=head < heads)


@gluon.jit
def finish_whole(acc, top, total, sink, out, token, first, heads):
    flat: gl.constexpr = top.type.layout
    layout: gl.constexpr = acc.type.layout
    lane = first + gl.arange(0, HEADS, flat)
    bias = gl.load(sink + lane, mask=lane < heads, other=0.0) * 1.4426950408889634
    highest = gl.maximum(top, bias)
    share = gl.exp2(top - highest)
    factor = gl.where(total > 0, share / (total * share + gl.exp2(bias - highest)), 0.0)
    value = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, layout)), 1)
    value = gl.convert_layout(value.to(out.dtype.element_ty), LINES)
    head = first + gl.arange(0, HEADS, gl.SliceLayout(1, LINES))
    channel = gl.arange(0, DIM, gl.SliceLayout(0, LINES))
    at = gl.expand_dims((token * heads + head).to(gl.int64) * DIM, 1) + gl.expand_dims(channel, 0)
    gl.store(out + at, value, mask=gl.expand_dims(head < heads, 1))


@gluon.jit
def finish_part(acc, top, total, part, tops, totals, row, first, heads):
    """The mean of the part's rows. Channel 32 a + 8 b + 2 c + d is stored at 32 a + 8 c + 2 b + d, which makes a
    thread's 8 values neighbours; `merge` undoes it."""
    flat: gl.constexpr = top.type.layout
    factor = gl.where(total > 0, 1.0 / total, 0.0)
    value = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout)), 1)
    value = (
        value.to(gl.float16).reshape([HEADS, DIM // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([HEADS, DIM])
    )
    value = gl.convert_layout(value, LINES)
    head = first + gl.arange(0, HEADS, gl.SliceLayout(1, LINES))
    place = gl.arange(0, DIM, gl.SliceLayout(0, LINES))
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


@gluon.jit(do_not_specialize=["columns", "heads", "splits", "items", "chunk"])
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
    columns,
    heads,
    splits,
    items,
    chunk,
    scale,
    PAGE: gl.constexpr,
    PAGE_BYTES: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    """Grid: any number of blocks; each takes every so many-th chunk of items, a chunk being items in a row.

    q: descriptor of [T * H, 512] float16. pool, words: the pool as int32 and int64. index: of `columns` columns.
    part [T, splits, H, 512] float16, tops and totals [T, splits, H].
    """
    query = gl.allocate_shared_memory(gl.float16, [HEADS, DIM], q.layout)
    keys = gl.allocate_shared_memory(gl.float16, [SPLIT, DIM], q.layout)
    as_words: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    key_words = reinterpret(keys, gl.int32, [SPLIT, DIM // 2], as_words)
    weights = gl.allocate_shared_memory(gl.float16, [HEADS, SPLIT], q.layout)
    barriers = (barrier_one(), barrier_one(), barrier_pair(), barrier_pair())
    numbers = (index_token, columns, heads, splits, items, chunk)
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
