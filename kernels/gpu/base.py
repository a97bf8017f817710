"""The contract of device ops.

An op is a module of `weft.kernels.gpu`. Its functions are wrappers, in this order: docstring (shapes, dtypes, what
is written, source), checks, outputs, empty case, launch. They own nothing, keep nothing, and allocate only what
they return. What runs is named by a `Choice`, made by a pure function of shapes and architecture; a caller may
name another implementation, as tests and benchmarks do:

- "reference": plain torch in float64 (`weft.kernels.reference`), anywhere; what the others are tested against;
- "triton": `weft.kernels.triton`, on NVIDIA GPUs from sm_89 on, or anywhere under TRITON_INTERPRET=1;
- "triton_sm90", "triton_sm100": Hopper's or Blackwell's own instructions;
- a library, behind the same wrapper (`weft.kernels.libraries`), where it is installed.

Every implementation gives a row the same bits whatever other rows are in the call: tiles and splits depend on a
row's own sequence and on constants, never on the batch. Index tensors are int32; rows of a pool are numbered
page * layout.page + place; -1 is no row. Row 0 is the null row, never written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from weft.kernels.layouts import RowLayout

Arch = Literal["cpu", "interpreter", "sm80", "sm89", "sm90", "sm100", "sm120"]
# In `installed`: a Triton whose Gluon is the one that Blackwell's kernels are written in.
GLUON = "gluon of triton 3.9"


class Paged(Protocol):
    """A pool of rows in pages: bytes [pages, layout.page_bytes] uint8, contiguous."""

    @property
    def bytes(self) -> Tensor: ...

    @property
    def layout(self) -> RowLayout: ...


@dataclass(frozen=True)
class Pages:
    """The plainest `Paged`."""

    bytes: Tensor
    layout: RowLayout

    @classmethod
    def empty(cls, pages: int, layout: RowLayout, device: torch.device | str = "cpu") -> Pages:
        """Zeroed, page 0 being the null page."""
        return cls(torch.zeros(pages, layout.page_bytes, dtype=torch.uint8, device=device), layout)


@dataclass(frozen=True)
class Choice:
    """What runs an op, and why; printable."""

    op: str
    implementation: str
    why: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.why})"


@dataclass(frozen=True)
class Example:
    """A shape that `weft kernels` shows the choice for."""

    label: str
    choose: Callable[[Arch, frozenset[str]], Choice]


@dataclass(frozen=True)
class Op:
    """One op for `weft kernels`: what it does, who implements it, and a few choices."""

    name: str
    summary: str
    implementations: tuple[str, ...]
    examples: tuple[Example, ...]


@cache
def arch_of(kind: str, index: int | None = None) -> Arch:
    """The architecture behind a torch device type and index."""
    if kind != "cuda":
        return "interpreter" if interpreting() else "cpu"
    capability = torch.cuda.get_device_capability(index)
    known: tuple[tuple[tuple[int, int], Arch], ...] = (
        ((11, 0), "sm120"),  # and whatever comes: Triton's common sources
        ((10, 0), "sm100"),
        ((9, 0), "sm90"),
        ((8, 9), "sm89"),
    )
    return next((arch for least, arch in known if capability >= least), "sm80")


def arch(tensor: Tensor) -> Arch:
    return arch_of(tensor.device.type, tensor.device.index)


@cache
def interpreting() -> bool:
    """Whether Triton is installed and interprets its kernels, on CPU tensors."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def installed() -> frozenset[str]:
    """What there is for choices to take: of FlashInfer, which only fast mode may choose, each module by its name.
    Other libraries whose bits depend on the batch are never chosen."""
    from weft.kernels.libraries import flashinfer

    if find_spec("triton") is None:
        return flashinfer.usable()
    major, minor = version("triton").split(".")[:2]
    triton = {"triton", GLUON} if (int(major), int(minor)) >= (3, 9) else {"triton"}
    return flashinfer.usable() | triton


def portable(op: str, arch: Arch, libraries: frozenset[str]) -> Choice:
    """The choice of an op that has a reference and one Triton kernel."""
    if arch == "cpu":
        return Choice(op, "reference", "no GPU")
    if "triton" not in libraries:
        return Choice(op, "reference", "Triton is not installed")
    if arch == "sm80":
        return Choice(op, "reference", "Triton has e4m3 from sm_89 on")
    why = "Triton's interpreter" if arch == "interpreter" else "one source for every architecture"
    return Choice(op, "triton", why)


def check(condition: bool, *what: object) -> None:
    """Callers are ours, so a wrong argument is our bug; the message says which."""
    assert condition, what


def check_tensor(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Dtype, number and size of dimensions (None: any), and that the last dimension is contiguous."""
    assert x.dtype in dtypes, f"{name}: dtype {x.dtype}, not one of {dtypes}"
    assert x.dim() == len(shape), f"{name}: shape {tuple(x.shape)}, expected {shape}"
    fits = all(want is None or want == have for want, have in zip(shape, x.shape, strict=True))
    assert fits, f"{name}: shape {tuple(x.shape)}, expected {shape}"
    assert x.shape[-1] <= 1 or x.stride(-1) == 1 or x.numel() == 0, f"{name}: last dimension is not contiguous"
