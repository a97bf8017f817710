# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Gluon source of sparse decode on Blackwell. Design, budgets and launch: `attention_sm100`.

Four partitions of one thread block share two slots of 64 rows. A barrier's n-th use waits for parity n % 2; a slot
is used by every second tile, hence (tile // 2) % 2.

    fetch       waits slot_free, fills the slot's raw bytes and its scales              -> raw_full
    dequantise  waits raw_full, turns the slot into a 64 x 512 tile in place            -> key_full
    multiply    waits key_full: logits of the tile                                      -> logits_full
                waits weights_full: adds the tile before to the sums                    -> slot_free, summed
    soften      waits logits_full and the tile before's summed, writes the tile's weights  -> weights_full
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    async_copy,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tma,
)

from weft.kernels.triton.attention_sm100_softmax import DIM, HEADS, KEYS, finish

# Bytes of a row's data, and of its data and scales in units of a scale word.
DATA = gl.constexpr(576)
WORDS = gl.constexpr(72)
FETCH_WARPS = gl.constexpr(1)
DEQUANTISE_WARPS = gl.constexpr(8)


@gluon.jit
def fetch(tensors, slots, barriers, first_row, begin, end, tiles, PAGE: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """The queries once, then each tile's rows by gather4 and its scales by asynchronous 8-byte copies.

    The pool is one array of 576-byte rows, PAGE_ROWS to a page: PAGE of data, the rest scales and padding.
    """
    q, codes, tail, plain, words, index = tensors
    query, wide, narrow, bare, scales = slots
    query_full, raw_full, slot_free = barriers
    warps: gl.constexpr = gl.num_warps()
    quads: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 4], [32, 1], [1, warps], [1, 0]))
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    mbarrier.expect(query_full, q.nbytes_per_cta, pred=tiles > 0)
    tma.async_load(q, [first_row, 0], query_full, query, pred=tiles > 0)
    for tile in range(tiles):
        column = begin + KEYS * tile
        slot = tile % 2
        full = raw_full.index(slot)
        # No key (-1 or beyond the row's length) reads the null row: finite bytes, which a weight of 0 removes.
        at = column + gl.arange(0, KEYS, quads)
        row = gl.maximum(gl.load(index + at, mask=at < end, other=0), 0)
        place = row // PAGE * PAGE_ROWS + row % PAGE
        at = column + gl.arange(0, KEYS, lanes)
        row = gl.load(index + at, mask=at < end, other=-1)
        word = (row // PAGE).to(gl.int64) * (PAGE_ROWS * WORDS) + (PAGE * WORDS + row % PAGE)
        mbarrier.wait(slot_free.index(slot), (tile // 2 + 1) % 2)
        async_copy.async_load(scales.index(slot), words + word, mask=row >= 0)
        async_copy.mbarrier_arrive(full, increment_count=False)
        mbarrier.expect(full, KEYS * DATA)
        for piece in gl.static_range(3):
            tma.async_gather(codes, place, 128 * piece, full, wide.index(8 * slot + 3 + piece))
        tma.async_gather(tail, place, 384, full, narrow.index(16 * slot + 12))
        tma.async_gather(plain, place, 224, full, bare.index(8 * slot + 7))


@gluon.jit
def dequantise(slots, barriers, tiles):
    """Raw bytes -> the products' type, in the same slot.

    e4m3 * 2^s is exact in bfloat16; in float16 it is for s of -15 to 7, else to 2^-25.
    All codes are in registers before the first value is written over them. The 64 bfloat16 channels of a row were
    put in place by `fetch`; float16 products convert them.
    """
    wide, narrow, bare, chunks, pairs, scales = slots
    raw_full, key_full = barriers
    # A warp reads and writes whole 128-byte lines: no bank conflicts on either side.
    across: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    half: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    for tile in range(tiles):
        slot = tile % 2
        mbarrier.wait(raw_full.index(slot), tile // 2 % 2)
        word = scales.index(slot)
        first = wide.index(8 * slot + 3).load(across)
        second = wide.index(8 * slot + 4).load(across)
        third = wide.index(8 * slot + 5).load(across)
        last = narrow.index(16 * slot + 12).load(half)
        gl.barrier()
        spread(pairs.index(4 * slot), first, word, 0)
        spread(pairs.index(4 * slot + 1), second, word, 2)
        spread(pairs.index(4 * slot + 2), third, word, 4)
        value = last.to(gl.float8e4nv, bitcast=True).to(chunks.dtype)
        chunks.index(8 * slot + 6).store(value * powers(word, 6, 1, chunks.dtype, half))
        if chunks.dtype == gl.float16:
            rest = bare.index(8 * slot + 7).load(half)
            chunks.index(8 * slot + 7).store(rest.to(gl.float32).to(gl.float16))
        fence_async_shared()
        mbarrier.arrive(key_full.index(slot))


@gluon.jit
def spread(target, code, words, at: gl.constexpr):
    """code [KEYS, 128]: two groups of codes, each times its own factor."""
    value = code.to(gl.float8e4nv, bitcast=True).to(target.dtype).reshape([KEYS, 2, 64])
    factor = powers(words, at, 2, target.dtype, gl.SliceLayout(2, value.type.layout))
    target.store((value * gl.expand_dims(factor, 2)).reshape([KEYS, 128]))


@gluon.jit
def powers(words, at: gl.constexpr, count: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """[KEYS, count]: 2^s of the groups at.. of each row, made of its biased exponent; 0 where that is 0."""
    word = gl.expand_dims(words.load(gl.SliceLayout(1, layout)), 1)
    shift = 8 * (at + gl.arange(0, count, gl.SliceLayout(0, layout)))
    exponent = (word >> gl.expand_dims(shift, 0).to(gl.int64)) & 255
    if dtype == gl.float16:
        return (exponent.to(gl.int32) << 23).to(gl.float32, bitcast=True).to(gl.float16)
    else:
        return (exponent.to(gl.int16) << 7).to(gl.bfloat16, bitcast=True)


@gluon.jit
def multiply(query, keys, weights, logits, sums, barriers, tiles):
    """Issues every product: a tile's logits [heads, keys] before the sums [channels, heads] of the tile before it.

    So the tensor cores work while `soften` turns logits into weights.
    """
    query_full, key_full, slot_free, logits_full, weights_full, summed = barriers
    mbarrier.wait(query_full, 0, pred=tiles > 0)
    for tile in range(tiles + 1):
        slot = tile % 2
        if tile < tiles:
            mbarrier.wait(key_full.index(slot), tile // 2 % 2)
            tcgen05_mma(query, keys.index(slot).permute((1, 0)), logits.index(slot), use_acc=False)
            tcgen05_commit(logits_full.index(slot))
        if tile > 0:
            mbarrier.wait(weights_full, (tile - 1) % 2)
            values = keys.index(slot ^ 1)
            for part in gl.static_range(DIM // 128):
                value = values.slice(128 * part, 128, dim=1).permute((1, 0))
                tcgen05_mma(value, weights.permute((1, 0)), sums.index(part), use_acc=tile > 1)
            tcgen05_commit(slot_free.index(slot ^ 1))
            tcgen05_commit(summed)


@gluon.jit
def barrier_pair(count: gl.constexpr):
    pair = mbarrier.allocate_mbarrier(batch=2)
    mbarrier.init(pair.index(0), count=count)
    mbarrier.init(pair.index(1), count=count)
    return pair


@gluon.jit
def barrier_one():
    one = mbarrier.allocate_mbarrier()
    mbarrier.init(one, count=1)
    return one


@gluon.jit
def barriers():
    # The scales' copies arrive once for each thread.
    raw_full = barrier_pair(1 + 32 * FETCH_WARPS)
    key_full, slot_free, logits_full = barrier_pair(1), barrier_pair(1), barrier_pair(1)
    return barrier_one(), barrier_one(), barrier_one(), raw_full, key_full, slot_free, logits_full


@gluon.jit
def shared_memory(q):
    """Queries, weights, scale words of both slots, and a factor a head."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query = gl.allocate_shared_memory(q.dtype, [HEADS, DIM], q.layout)
    weights = gl.allocate_shared_memory(q.dtype, [HEADS, KEYS], q.layout)
    scales = gl.allocate_shared_memory(gl.int64, [2, KEYS], flat)
    return query, weights, scales, gl.allocate_shared_memory(gl.float32, [HEADS], flat)


@gluon.jit
def slots(q, codes, tail, plain):
    """Both slots: one memory, seen as chunks of 64 and 128 channels, as tiles, and as raw bytes."""
    chunks = gl.allocate_shared_memory(q.dtype, [2 * DIM // 64, KEYS, 64], q.layout)
    pairs = chunks.reinterpret(q.dtype, [2 * DIM // 128, KEYS, 128], q.layout)
    keys = chunks.reinterpret(q.dtype, [2, KEYS, DIM], q.layout)
    bare = chunks.reinterpret(gl.bfloat16, [2 * DIM // 64, KEYS, 64], plain.layout)
    wide = chunks.reinterpret(gl.uint8, [2 * DIM // 64, KEYS, 128], codes.layout)
    narrow = chunks.reinterpret(gl.uint8, [4 * DIM // 64, KEYS, 64], tail.layout)
    return chunks, pairs, keys, bare, wide, narrow


@gluon.jit
def tensor_memory():
    """Logits of two tiles, and the sums in four parts of 128 channels."""
    by_key: gl.constexpr = TensorMemoryLayout([HEADS, KEYS], col_stride=1)
    by_head: gl.constexpr = TensorMemoryLayout([128, HEADS], col_stride=1)
    logits = allocate_tensor_memory(gl.float32, [2, HEADS, KEYS], by_key)
    return logits, allocate_tensor_memory(gl.float32, [DIM // 128, 128, HEADS], by_head)


@gluon.jit
def attend(
    q,
    codes,
    tail,
    plain,
    words,
    index,
    lengths,
    sink,
    out,
    parts,
    tops,
    totals,
    index_token,
    heads,
    splits,
    scale,
    SPLIT: gl.constexpr,
    PAGE: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
):
    """Grid (T * blocks of 64 heads, splits).

    q: descriptor of [T * H, 512], of the products' type; codes, tail [R, 576] u8 and plain [R, 288] bf16: of the
    pool as rows of 576 bytes; words: the pool as int64; parts [T, splits, H, 512], tops and totals [T, splits, H].
    Descriptors bring the layouts in shared memory: lines of 128 bytes, of 64 for `tail`.
    """
    blocks = gl.cdiv(heads, HEADS)
    token = gl.program_id(0) // blocks
    first = gl.program_id(0) % blocks * HEADS
    split = gl.program_id(1)
    length = gl.load(lengths + token)
    begin = split * SPLIT
    end = gl.minimum(begin + SPLIT, length)
    tiles = gl.maximum(gl.cdiv(end - begin, KEYS), 0)
    single = (length <= SPLIT) & (split == 0)
    at = gl.where(length <= SPLIT, token, token * splits + split) * heads + first
    index += token.to(gl.int64) * index_token

    query, weights, scales, factors = shared_memory(q)
    chunks, pairs, keys, bare, wide, narrow = slots(q, codes, tail, plain)
    logits, sums = tensor_memory()
    query_full, weights_full, summed, raw_full, key_full, slot_free, logits_full = barriers()

    softening = (logits, sums, weights, factors, (logits_full, weights_full, summed), index, begin, end, scale)
    results = (out, parts, tops, totals)
    tensors = (q, codes, tail, plain, words, index)
    steps = (query_full, key_full, slot_free, logits_full, weights_full, summed)
    raw = (query, wide, narrow, bare, scales)
    ready = (query_full, raw_full, slot_free)
    gl.warp_specialize(
        [
            (finish, (softening, results, sink, at, first, heads, single, tiles)),
            (dequantise, ((wide, narrow, bare, chunks, pairs, scales), (raw_full, key_full), tiles)),
            (multiply, (query, keys, weights, logits, sums, steps, tiles)),
            (fetch, (tensors, raw, ready, token * heads + first, begin, end, tiles, PAGE, PAGE_ROWS)),
        ],
        [DEQUANTISE_WARPS, 1, FETCH_WARPS],
        [96, 64, 128],
    )
