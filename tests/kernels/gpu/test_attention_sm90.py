"""Sparse attention for Hopper, without one: its source run on the CPU, launched as it is on the device.

On a Hopper GPU the kernel itself runs, in test_attention.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from support.gluon import T
from support.gluon_hopper import Hopper, inline_asm_elementwise
from support.kernels import same_bits
from weft.kernels.gpu.output import inverse_rope
from weft.kernels.layouts import is_v4, kv_fp8
from weft.kernels.reference.attention import Example, example
from weft.kernels.reference.attention import sparse_attention as reference
from weft.kernels.reference.heads import angles
from weft.kernels.reference.rows import gather, store
from weft.kernels.triton import attention_sm90, attention_sm90_kernel
from weft.kernels.triton.attention_sm90 import DIM, aot, sparse_attention

V4 = kv_fp8(64, 448, 64)
Without = tuple[str, str, int]
# The merge of items is interpreted, so on the CPU.
runs_source = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested where a GPU is")


class Emulated:
    """The kernel, launched on `Hopper`; holds the last launch's arguments."""

    def __init__(self, seed: int, without: Without | None) -> None:
        self.device = Hopper(seed, without)
        self.kernel = self.device.functions([attention_sm90_kernel])["sparse"]
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int) -> None:
            self.arguments = arguments
            self.device.run(self.kernel, grid, arguments)

        return run


class Interpreted:
    """The merge, without the options of an early launch."""

    def __init__(self) -> None:
        self.kernel: Any = attention_sm90.merge

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, num_warps, launch_pdl: self.kernel[grid](*arguments)


@contextmanager
def in_place(emulated: Emulated, blocks: int) -> Iterator[None]:
    """The launch finds a device of so many multiprocessors. Triton 3.9 interprets a mask made of a scalar and a
    tensor as int32, and then refuses it."""
    from triton.runtime.interpreter import InterpreterBuilder

    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, kind: Any, value: Any) -> Any:
        made = splat(self, kind, value)
        made.data = made.data.astype(bool) if kind.scalar.is_int1() else made.data
        return made

    with (
        patch.object(attention_sm90_kernel, "sparse", emulated),
        patch.object(attention_sm90, "merge", Interpreted()),
        patch.object(attention_sm90, "gdc_wait", lambda: None),
        patch.object(attention_sm90, "multiprocessors", lambda index: blocks),
        patch.object(InterpreterBuilder, "create_splat", create_splat),
    ):
        yield


def launch(
    e: Example,
    blocks: int = 3,
    seed: int = 0,
    without: Without | None = None,
    dtype: torch.dtype = torch.float32,
    cos_sin: Tensor | None = None,
) -> Tensor:
    with in_place(Emulated(seed, without), blocks):
        return sparse_attention(e.q, e.pool, e.index, e.lengths, e.sink, e.scale, dtype, cos_sin)


def some(e: Example, *tokens: int) -> Example:
    """Queries and their lists, no wider than they must be."""
    these = list(tokens)
    width = max(1, int(e.lengths[these].max()))
    return replace(e, q=e.q[these], index=e.index[these, :width], lengths=e.lengths[these])


def check(e: Example) -> None:
    """The bounds of `check` in test_attention, where they are derived; here the output is float32."""
    out, want = launch(e).double(), reference(e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
    assert out.shape == want.shape and torch.isfinite(out).all()
    unit, columns = 2.0**-11, e.index.shape[1]
    for token in range(len(e.q)):
        rows = e.index[token, : int(e.lengths[token])]
        keys = gather(e.pool, rows[rows >= 0]).abs()
        if not len(keys):
            assert (out[token] == 0).all()
            continue
        shift = (e.q[token].double().abs() @ keys.T).max(1).values * e.scale * (2 * unit + columns * 2.0**-23)
        share = torch.expm1(shift) * 2 + 4 * unit + columns * 2.0**-23
        bound = share[:, None] * keys.max(0).values + want[token].abs() * 2.0**-23 + 2.0**-24
        assert ((out[token] - want[token]).abs() <= bound).all()


@runs_source
@pytest.mark.parametrize("heads", [1, 5])
def test_gaps_and_lengths(heads: int) -> None:
    """Lengths around items; -1 at the front, in between, of a whole item, throughout; columns not to be read."""
    e = example(12, 640, heads, V4)
    e.lengths[:] = torch.tensor([0, 1, 63, 64, 65, 127, 128, 129, 640, 640, 300, 128])
    for token, length in enumerate(e.lengths.tolist()):
        e.index[token, length:] = 1 << 30
    e.index[6, ::3] = -1
    e.index[7, :128] = -1
    e.index[9, 10:300] = -1
    e.index[10, :300] = -1
    e.index[11, :128] = -1
    check(e)


@runs_source
@pytest.mark.parametrize("heads", [17, 64, 96])
def test_many_heads(heads: int) -> None:
    """A box of 64 heads reaches into the next query's, and beyond the last one's."""
    e = example(3, 130, heads, V4)
    e.lengths[:] = torch.tensor([70, 130, 128])
    check(e)


@runs_source
def test_full_width() -> None:
    check(example(1, 640, 64, V4))


@runs_source
@pytest.mark.parametrize("page", [1, 2, 64])
def test_rows_at_the_ends_of_pages(page: int) -> None:
    """Of magnitude 2^-9 to 2^6, so with scales down to 2^-19."""
    layout = kv_fp8(page, 448, 64)
    assert is_v4(layout)
    e = example(1, 14, 16, layout, pages=9)
    rows = torch.arange(page, 9 * page, dtype=torch.int32)
    rows = rows[(rows % page < 2) | (rows % page >= page - 2)][-14:]
    store(e.pool, rows, torch.randn(len(rows), DIM) * 2.0 ** torch.randint(-9, 7, (len(rows), 1)))
    e.index[0], e.lengths[0] = torch.nn.functional.pad(rows, (0, 14 - len(rows)), value=-1), len(rows)
    check(e)


@runs_source
@pytest.mark.parametrize("spread", [1e-5, 30.0, 2000.0])
def test_extreme_rows(spread: float) -> None:
    """Scales at the format's floor, above 1, and logits that leave one row all the weight."""
    e = example(2, 140, 4, V4, spread=spread)
    e.lengths[0] = 40
    if spread < 2000:
        check(e)
    out, want = launch(e), reference(e.q, e.pool, e.index, e.lengths, e.sink, e.scale)
    assert torch.isfinite(out).all() and (out - want).abs().max() <= 0.05 * want.abs().max()


@runs_source
@pytest.mark.parametrize("bias", [float("-inf"), -1e30, 1e4])
def test_extreme_sinks(bias: float) -> None:
    """Of a list that is one item, and of one that is two."""
    e = example(2, 129, 4, V4)
    e.lengths[0] = 20
    e.sink.fill_(bias)
    check(e)
    e.index[1] = -1  # then nothing at all has weight, if the bias has none
    check(some(e, 1))
    e.index[0] = -1
    check(some(e, 0))


@runs_source
def test_logits_that_grow() -> None:
    """Each item's rows are twice as large as the last one's: early parts nearly vanish."""
    e = example(1, 900, 4, V4)
    size = 2.0 ** (torch.arange(900) // 128 - 3)
    store(e.pool, e.index.flatten(), torch.randn(900, DIM) * size[:, None])
    check(e)


@runs_source
def test_dtypes_and_strides() -> None:
    """The list may be a part of a wider one."""
    e = example(2, 140, 4, V4)
    e.lengths[0] = 100
    out = launch(e, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and torch.equal(out, launch(e).bfloat16())
    part = replace(e, index=torch.cat((e.index, e.index), 1)[:, :140])
    assert torch.equal(launch(part, dtype=torch.bfloat16), out)


@runs_source
def test_rotated_back_as_by_a_launch_of_its_own() -> None:
    """Lists in one item, in several, without rows; and calls in which no list is split."""
    e = example(5, 300, 4, V4)
    e.lengths[:] = torch.tensor([300, 5, 129, 128, 0])
    turn = angles(torch.randint(0, 100_000, (5,)), 64)
    for dtype in (torch.bfloat16, torch.float32):
        whole = inverse_rope(launch(e, dtype=dtype), turn)
        assert same_bits(launch(e, dtype=dtype, cos_sin=turn), whole)
        assert same_bits(launch(some(e, 1, 3), dtype=dtype, cos_sin=turn[[1, 3]]), whole[[1, 3]])
    with patch.object(attention_sm90, "PART_BYTES", 1):
        assert same_bits(launch(e, cos_sin=turn), whole)


@runs_source
def test_rows_that_are_not_listed_are_not_read() -> None:
    """The null row neither."""
    e = example(2, 150, 4, V4, pages=8)
    e.index[:, ::7] = -1
    before = launch(e)
    others = torch.ones(8 * 64, dtype=torch.bool)
    others[e.index[e.index >= 0].long()] = False
    for page, row in (divmod(row, 64) for row in others.nonzero()[:, 0].tolist()):
        e.pool.bytes[page, row * 576 : (row + 1) * 576] = 0x7F
        e.pool.bytes[page, 64 * 576 + row * 8 : 64 * 576 + (row + 1) * 8] = 0xFF
    assert torch.equal(launch(e), before)


@runs_source
def test_a_query_has_the_same_bits_in_any_batch() -> None:
    """Alone, in another order, on however many multiprocessors, in whatever order the device does things."""
    e = example(5, 300, 4, V4)
    e.lengths[:] = torch.tensor([300, 5, 129, 128, 0])
    together = launch(e)
    for blocks, seed in ((1, 1), (2, 2), (132, 3)):
        assert torch.equal(launch(e, blocks, seed), together)
    for token in range(5):
        for seed in (4, 5):
            assert torch.equal(launch(some(e, token), seed=seed), together[token : token + 1])
    # The last is two queries of three items each on blocks that take two: one block's are of both.
    for tokens in ((3, 0, 4, 1, 2), (2, 1), (2, 0)):
        assert torch.equal(launch(some(e, *tokens)), together[list(tokens)])


@runs_source
def test_any_order_of_events() -> None:
    e = example(4, 260, 1, V4)
    e.lengths[:] = torch.tensor([260, 0, 129, 1])
    want = launch(e, 1)
    for seed in range(1, 30):
        assert torch.equal(launch(e, 1 + seed % 3, seed), want)


@runs_source
def test_slabs_of_queries() -> None:
    """Prefill goes through in slabs of 16 queries here: their parts share one memory, one slab after the other."""
    e = example(35, 140, 2, V4)
    e.lengths[::3], e.lengths[1::3] = 9, 0
    together = launch(e)
    with patch.object(attention_sm90, "PART_BYTES", 1):
        assert torch.equal(launch(e), together)
    check(some(e, 17))
    assert torch.equal(launch(some(e, 17)), together[17:18])


FILL = [("mbarrier.wait", 0), ("mbarrier.wait", 1), ("mbarrier.expect", 0), ("mbarrier.arrive", 0)]
ATTEND = [("mbarrier.wait", 0), ("mbarrier.wait", 1), ("mbarrier.wait", 2), ("warpgroup_mma_wait", 0)]
ATTEND += [("warpgroup_mma_wait", 1), ("mbarrier.arrive", 0), ("mbarrier.arrive", 1), ("mbarrier.arrive", 2)]
FENCE = ("fence_async_shared", 0)
STEPS = [("fill", *call) for call in (*FILL, FENCE)] + [("attend", *call) for call in (*ATTEND, FENCE)]


@runs_source
@pytest.mark.parametrize("without", STEPS, ids=lambda w: f"{w[0]}-{w[1]}-{w[2]}")
def test_no_step_of_the_protocol_is_too_many(without: Without) -> None:
    """Without any of them some order of events goes wrong: so this device sees what they are for."""
    e = example(4, 128, 4, V4)
    want = launch(e, 1)

    def fails(seed: int) -> bool:
        try:
            return not torch.equal(launch(e, 1, seed, without), want)
        except AssertionError:
            return True

    assert any(fails(seed) for seed in range(100))


def test_only_known_assembly_has_a_meaning() -> None:
    """Of the kernel's text, one letter is another."""
    word = [T(torch.zeros(1, dtype=torch.int32))]
    text = "cvt.rn.f16x2.f32 $0, $1, $1;"
    inline_asm_elementwise(text, "=r,r", word, torch.int32, True, 1)
    with pytest.raises(AssertionError, match="no meaning"):
        inline_asm_elementwise(text.replace("rn", "rz"), "=r,r", word, torch.int32, True, 1)


def test_views_of_the_rows_alias() -> None:
    """What is stored as words of 32 bits is read as pairs of float16."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    if not hasattr(NVMMASharedLayout, "format_hardware_view"):
        pytest.skip("this Triton does not show where a layout puts its elements")

    def places(bits: int, columns: int) -> list[tuple[int, int]]:
        view = NVMMASharedLayout(128, bits, rank=2).format_hardware_view([16, columns])
        return [(int(a), int(b)) for a, b in re.findall(r"-> \( *(\d+), *(\d+)\)", view)]

    words, halves = places(32, DIM // 2), places(16, DIM)
    assert len(words) == 16 * DIM // 2
    assert halves == [(row, 2 * column + half) for row, column in words for half in range(2)]


@runs_source
def test_launches_what_was_compiled() -> None:
    e = example(2, 140, 4, V4)
    emulated = Emulated(0, None)
    with in_place(emulated, 3):
        sparse_attention(e.q, e.pool, e.index, e.lengths, e.sink, e.scale, torch.bfloat16)
    signature = aot()[0].signature
    kinds = {torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16"}
    kinds |= {torch.float32: "fp32", int: "i32", float: "fp32"}
    box, *rest = emulated.arguments
    wanted = list(signature.values())
    assert len(wanted) == len(emulated.arguments) and box.__mangle__() == wanted[0]
    for value, kind in zip(rest, wanted[1:], strict=True):
        if isinstance(value, Tensor):
            assert kind == "*" + kinds[value.dtype]
        else:
            assert kind in ("constexpr", kinds[type(value)])
    assert dict(zip(signature, emulated.arguments, strict=True)).items() >= aot()[0].constexprs.items()
