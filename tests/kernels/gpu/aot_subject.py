"""Kernels to compile in test_aot.py, in a process in which Triton does not interpret."""

import json

import triton
import triton.language as tl

from weft.kernels.gpu.aot import AotCase, compile_case


@triton.jit
def multiply(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(x + i * K + k[None, :]), tl.load(y + k[:, None] * N + j)
    tl.store(out + i * N + j, tl.dot(a, b))


@triton.jit
def twice(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Two accumulators that are live at a time."""
    i, j, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    first = tl.zeros([M, N], tl.float32)
    second = tl.zeros([M, N], tl.float32)
    for step in range(4):
        a, b = tl.load(x + i * K + k[None, :] + step), tl.load(y + k[:, None] * N + j)
        first = tl.dot(a, b, first)
        second = tl.dot(a + a, b, second)
    tl.store(out + i * N + j, first + second)


SIGNATURE = {"x": "*bf16", "y": "*bf16", "out": "*fp32", **dict.fromkeys("MNK", "constexpr")}
CASES = {
    "good": (multiply, (64, 64, 64), 4, {"sm90": ("wgmma",), "sm100": (r"tcgen05\.mma",)}),
    "another instruction": (multiply, (64, 64, 64), 4, {"sm90": (r"tcgen05\.mma",), "sm100": ("wgmma",)}),
    "spills": (multiply, (128, 512, 64), 4, {}),
    "too many TMEM columns": (twice, (128, 512, 64), 8, {}),
}


def faults(name: str) -> dict[str, list[str]]:
    kernel, sizes, warps, expect = CASES[name]
    case = AotCase(name, kernel, SIGNATURE, dict(zip("MNK", sizes, strict=True)), warps, expect=expect)
    return {arch: compile_case(case, arch).faults(case) for arch in ("sm90", "sm100")}


if __name__ == "__main__":
    print(json.dumps({name: faults(name) for name in CASES}))
