"""What the layers of a step share, made on the device: index lists, plans and rotations, and the streams' ends.

The host knows of a step a few numbers per sequence and the pages that each holds. Of these, one launch makes
everything that a layer asks for per token and per entry. A token's lists depend on its position and its sequence's
pages alone: its window's rows from column 0 on, oldest first, then, at column W, its compressed entries.

A step may be padded, in tokens, sequences, entries and pages: then one captured graph serves many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.reference import steps as reference


@dataclass(frozen=True)
class EntrySpans:
    """A step's entries of one kind. int32, contiguous.

    first: [S] the number of the first entry that a sequence completes. entries: [S + 1]: of the plan, sequence s
    has entries[s]..entries[s + 1] - 1; one that pads has none. table: [S, P] page numbers of a sequence's entries.
    """

    first: Tensor
    entries: Tensor
    table: Tensor


@dataclass(frozen=True)
class StepSpans:
    """What the host says of a step's sequences. int32, contiguous.

    start, count, offset: [S] position of a sequence's first token, how many tokens, and the flat row of the
    first; sequences without tokens pad the step, behind the others, at an offset of the number of tokens.
    window_first: [S] the first page that a sequence's window needs; window: [S, P] page numbers from it on.
    c4, c128: None if no layer is of that kind.
    """

    start: Tensor
    count: Tensor
    offset: Tensor
    window_first: Tensor
    window: Tensor
    c4: EntrySpans | None = None
    c128: EntrySpans | None = None


@dataclass(frozen=True)
class StepSizes:
    """tokens: rows of the step, padding included. window, top_k: of the model. columns: c128a entries that a list
    has room for, as many as any token sees. c4_entries, c128_entries: of the plans, padding included. page: rows
    of a page. c4_base, c128_base: row of a pool at which entries of that kind begin."""

    tokens: int
    window: int
    top_k: int
    columns: int
    c4_entries: int
    c128_entries: int
    page: int
    c4_base: int
    c128_base: int


@dataclass(frozen=True)
class Listed:
    """index: [T, N] int32 rows of a pool, -1 for none; lengths: [T] int32, how many columns count."""

    index: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Entries:
    """The plan's side of a kind of entry. sequence, number, target, key_target: [E] int32, as in `C4Plan`; -1, but
    number 0, where they pad. turn: [E, rope] float32 rotations at the positions of their groups' first tokens."""

    sequence: Tensor
    number: Tensor
    target: Tensor
    key_target: Tensor
    turn: Tensor


@dataclass(frozen=True)
class StepIndex:
    """position, sequence, window_rows, c4_visible: [T] int32; of tokens that pad 0, 0, -1 and 0. plain,
    compressed: [T, rope] float32 rotations: cosines, then sines. Lists of tokens that pad are empty."""

    position: Tensor
    sequence: Tensor
    window_rows: Tensor
    c4_visible: Tensor
    plain: Tensor
    compressed: Tensor
    window: Listed
    c4: Listed
    c128: Listed
    c4_entries: Entries
    c128_entries: Entries


def step_index(
    spans: StepSpans, sizes: StepSizes, plain: Tensor, compressed: Tensor, *, implementation: str | None = None
) -> StepIndex:
    """Lists, plans and rotations of a step.

    plain, compressed: [rope / 2] float32 frequencies. An angle is position times frequency, in float32. Source:
    DeepSeek-V4 report, section 2.3, for what a token attends to.
    """
    _check_spans(spans, sizes)
    check_tensor("plain", plain, (None,), torch.float32)
    check_tensor("compressed", compressed, (plain.numel(),), torch.float32)
    out = _empty(spans, sizes, 2 * plain.numel())
    if sizes.tokens == 0:
        return out
    if (implementation or choose(arch(spans.start), installed()).implementation) == "reference":
        reference.step_index(spans, sizes, plain, compressed, out)
        return out
    from weft.kernels.triton.steps import step_index as launch

    launch(spans, sizes, plain, compressed, out)
    return out


def _check_spans(spans: StepSpans, sizes: StepSizes) -> None:
    sequences = spans.start.numel()
    for name in ("start", "count", "offset", "window_first"):
        check_tensor(name, getattr(spans, name), (sequences,), torch.int32)
    check_tensor("window", spans.window, (sequences, None), torch.int32)
    check(spans.window.is_contiguous() and sequences > 0, "window")
    for kind, count in ((spans.c4, sizes.c4_entries), (spans.c128, sizes.c128_entries)):
        check(kind is not None or count == 0, "entries without a table")
        if kind is not None:
            check_tensor("first", kind.first, (sequences,), torch.int32)
            check_tensor("entries", kind.entries, (sequences + 1,), torch.int32)
            check_tensor("table", kind.table, (sequences, None), torch.int32)
            check(kind.table.is_contiguous(), "table")


def _empty(spans: StepSpans, sizes: StepSizes, rope: int) -> StepIndex:
    """Everything in two allocations. Each array begins at a multiple of 16 bytes."""
    tokens, window = sizes.tokens, sizes.window
    c4 = window + sizes.top_k if spans.c4 else 0
    c128 = window + sizes.columns if spans.c128 else 0
    many4, many128 = sizes.c4_entries, sizes.c128_entries
    device = spans.start.device
    whole: list[tuple[int, ...]] = [(tokens,)] * 7
    whole += [(tokens, columns) for columns in (window, c4, c128)] + [(many4,)] * 4 + [(many128,)] * 4
    turns = [(tokens, rope)] * 2 + [(many4, rope), (many128, rope)]
    position, sequence, rows, visible, *rest = _carve(whole, torch.int32, device)
    plain, compressed, c4_turn, c128_turn = _carve(turns, torch.float32, device)
    return StepIndex(
        position,
        sequence,
        rows,
        visible,
        plain,
        compressed,
        window=Listed(rest[3], rest[0]),
        c4=Listed(rest[4], rest[1]),
        c128=Listed(rest[5], rest[2]),
        c4_entries=Entries(rest[6], rest[7], rest[8], rest[9], c4_turn),
        c128_entries=Entries(rest[10], rest[11], rest[12], rest[13], c128_turn),
    )


def _carve(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of 4-byte numbers in one allocation."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    padded = [-(-count // 4) * 4 for count in counts]
    parts = torch.empty(sum(padded), dtype=dtype, device=device).split(padded)
    return [part[:count].view(shape) for part, count, shape in zip(parts, counts, shapes, strict=True)]


def embed_streams(weight: Tensor, ids: Tensor, streams: int, *, implementation: str | None = None) -> Tensor:
    """[T, streams, D]: every stream begins as the token's embedding. weight: [V, D]; ids: [T] int32, -1: zeros."""
    check_tensor("weight", weight, (None, None), torch.bfloat16, torch.float32)
    check_tensor("ids", ids, (None,), torch.int32)
    check(weight.is_contiguous(), "weight")
    out = torch.empty(ids.numel(), streams, weight.shape[1], dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    if (implementation or choose(arch(weight), installed()).implementation) == "reference":
        reference.embed_streams(weight, ids, out)
        return out
    from weft.kernels.triton.steps import embed_streams as launch

    launch(weight, ids, out)
    return out


def store_rows(
    rows: Tensor, source: Tensor, target: Tensor, out: Tensor, *, implementation: str | None = None
) -> None:
    """out[target[i]] = rows[source[i]], for source[i] >= 0. rows: [T, ...], out: [N, ...] of the same dtype, both
    contiguous; source, target: [S] int32, no target twice. Keeps the last streams of each sequence."""
    check_tensor("source", source, (None,), torch.int32)
    check_tensor("target", target, (source.numel(),), torch.int32)
    check(rows.shape[1:] == out.shape[1:] and rows.dtype == out.dtype, rows.shape, out.shape)
    check(rows.is_contiguous() and out.is_contiguous(), "contiguous")
    if source.numel() == 0 or rows.numel() == 0:
        return
    if (implementation or choose(arch(rows), installed()).implementation) == "reference":
        reference.store_rows(rows, source, target, out)
        return
    from weft.kernels.triton.steps import store_rows as launch

    launch(rows, source, target, out)


def choose(arch: Arch, libraries: frozenset[str]) -> Choice:
    return portable("steps", arch, libraries)


def least_bytes(spans: StepSpans, sizes: StepSizes, rope: int) -> int:
    """What `step_index` writes, and the pages and numbers that it is told, once."""
    tokens, sequences = sizes.tokens, spans.start.numel()
    kinds = [kind for kind in (spans.c4, spans.c128) if kind is not None]
    columns = sizes.window + (sizes.window + sizes.top_k if spans.c4 else 0)
    columns += sizes.window + sizes.columns if spans.c128 else 0
    written = tokens * (7 + columns + 2 * rope) + (sizes.c4_entries + sizes.c128_entries) * (4 + rope)
    told = 4 * sequences + spans.window.numel() + sum(2 * sequences + kind.table.numel() for kind in kinds)
    return 4 * (written + told + rope)


OP = Op(
    "steps",
    "lists of rows, plans of entries and rotations of a step; embeddings in, last streams out",
    ("reference", "triton"),
    (Example("any shape", choose),),
)
