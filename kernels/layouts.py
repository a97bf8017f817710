"""Byte layouts of paged rows: what a page holds, and where. Defined once, for the pools and for every kernel.

A page holds the data of its rows, one after the other, then their scales, then padding. Row i of a page begins at
i * data_bytes, its scales at rows * data_bytes + i * scale_bytes. Imports no torch: capacity is counted with it.

Sources: FlashMLA's and DeepGEMM's public address arithmetic for DeepSeek-V4 (584-byte KV rows, 132- and 68-byte
indexer keys) and for V4.1 (528 and 288 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Codes = Literal["e4m3", "e2m1"]
Scales = Literal["e8m0", "e4m3", "float32"]

CODE_BITS = {"e4m3": 8, "e2m1": 4}
SCALE_BYTES = {"e8m0": 1, "e4m3": 1, "float32": 4}
# Largest magnitude that a code can take.
CODE_MAX = {"e4m3": 448.0, "e2m1": 6.0}


@dataclass(frozen=True)
class RowLayout:
    """`page` rows of `coded` quantised channels and `plain` bfloat16 channels behind them.

    group: channels that share a scale; the last group may be short. align: a row's scales are padded to a multiple
    of so many bytes. pad: a page is padded to a multiple of so many bytes, 0 for a multiple of a row's data.
    least: a group's largest magnitude counts as at least this much, so that scales stay finite.
    """

    page: int
    coded: int
    plain: int
    group: int
    codes: Codes = "e4m3"
    scales: Scales = "e8m0"
    align: int = 1
    pad: int = 1
    least: float = 1e-4

    def __post_init__(self) -> None:
        assert self.page > 0 and self.coded > 0 and self.plain >= 0 and self.group > 0
        assert self.codes == "e4m3" or self.coded % 2 == 0

    @property
    def channels(self) -> int:
        return self.coded + self.plain

    @property
    def groups(self) -> int:
        return math.ceil(self.coded / self.group)

    @property
    def coded_bytes(self) -> int:
        return self.coded * CODE_BITS[self.codes] // 8

    @property
    def data_bytes(self) -> int:
        """Of a row: codes, then bfloat16 channels."""
        return self.coded_bytes + 2 * self.plain

    @property
    def scale_bytes(self) -> int:
        """Of a row, padding included."""
        return math.ceil(self.groups * SCALE_BYTES[self.scales] / self.align) * self.align

    @property
    def scales_at(self) -> int:
        """Where in a page the scales begin."""
        return self.page * self.data_bytes

    @property
    def page_bytes(self) -> int:
        multiple = self.pad or self.data_bytes
        return math.ceil(self.page * (self.data_bytes + self.scale_bytes) / multiple) * multiple

    @property
    def row_bytes(self) -> int:
        """What reading one row takes: data and scales, no padding of the page."""
        return self.data_bytes + self.scale_bytes


def kv_fp8(page: int, nope: int, rope: int) -> RowLayout:
    """V4's KV rows: 448 + 128 + 8 = 584 bytes at its sizes."""
    return RowLayout(page, nope, rope, group=64, align=8, pad=0)


def is_v4(layout: RowLayout) -> bool:
    """Whether rows are V4's 584 bytes, for which libraries and kernels of one architecture are written. Their
    pages are whole multiples of a row's 576 bytes of data."""
    return layout == kv_fp8(layout.page, 448, 64)


def kv_fp8_v41(page: int, dim: int = 512) -> RowLayout:
    """V4.1's: every channel quantised, a scale per 32: 528 bytes at 512 channels."""
    return RowLayout(page, dim, 0, group=32, align=8, pad=0)


def kv_fp4_v41(page: int, dim: int = 512) -> RowLayout:
    """V4.1's FP4 rows, an e4m3 scale per 16: 288 bytes at 512 channels."""
    return RowLayout(page, dim, 0, group=16, codes="e2m1", scales="e4m3", align=8, pad=0)


def keys_fp8(page: int, dim: int) -> RowLayout:
    """Indexer keys: one float32 scale per key: 132 bytes at 128 channels."""
    return RowLayout(page, dim, 0, group=dim, scales="float32")


def keys_fp4(page: int, dim: int) -> RowLayout:
    """Indexer keys: a power-of-two scale per 32 channels: 68 bytes at 128 channels."""
    return RowLayout(page, dim, 0, group=min(32, dim), codes="e2m1", least=6.0 * 2.0**-126)
