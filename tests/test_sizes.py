"""Derived sizes against the published figures."""

from __future__ import annotations

import dataclasses

import pytest

from weft.runtime.config import preset
from weft.runtime.sizes import (
    IndexFormat,
    KvFormat,
    checkpoint_size,
    index_row_bytes,
    kv_bytes,
    kv_row_bytes,
    parameters,
    report,
)

MILLION = 1_048_576


@pytest.mark.parametrize(("name", "total", "active"), [("flash", "284.33", "13.27"), ("pro", "1573.00", "48.85")])
def test_parameters(name: str, total: str, active: str) -> None:
    count = parameters(preset(name))
    assert f"{count.total / 1e9:.2f}" == total
    assert f"{count.active / 1e9:.2f}" == active


def test_no_mtp_parameters_without_the_block() -> None:
    config = dataclasses.replace(preset("tiny"), num_nextn_predict_layers=0)
    count = parameters(config)
    assert count == dataclasses.replace(parameters(preset("tiny")), mtp=0)


def test_row_bytes() -> None:
    pro = preset("pro")
    assert (kv_row_bytes(pro, "bf16"), kv_row_bytes(pro, "fp8")) == (1024, 584)
    formats: tuple[IndexFormat, ...] = ("bf16", "fp8", "fp4")
    assert [index_row_bytes(pro, fmt) for fmt in formats] == [256, 132, 68]


def test_kv_bytes_is_the_published_arithmetic() -> None:
    c4a = (128 + MILLION // 4) * 1024 + MILLION // 4 * 256
    c128a = (128 + MILLION // 128) * 1024
    assert kv_bytes(preset("pro"), MILLION) == 30 * c4a + 31 * c128a
    assert kv_bytes(preset("flash"), MILLION) == 21 * c4a + 20 * c128a + 2 * 128 * 1024


@pytest.mark.parametrize(
    ("name", "kv", "index", "gib"),
    [
        ("pro", "bf16", "bf16", "9.62"),
        ("pro", "fp8", "fp8", "5.39"),
        ("pro", "fp8", "fp4", "4.92"),
        ("flash", "bf16", "bf16", "6.72"),
        ("flash", "fp8", "fp8", "3.76"),
        ("flash", "fp8", "fp4", "3.43"),
    ],
)
def test_kv_of_a_million_tokens(name: str, kv: KvFormat, index: IndexFormat, gib: str) -> None:
    assert f"{kv_bytes(preset(name), MILLION, kv, index) / 2**30:.2f}" == gib


def test_kv_of_short_sequences() -> None:
    tiny = preset("tiny")  # window 32, rows of 128 B, 7 layers, 3 of them ratio 4
    assert kv_bytes(tiny, 0) == 0
    assert kv_bytes(tiny, 3) == 7 * 3 * 128
    assert kv_bytes(tiny, 4) == 7 * 4 * 128 + 3 * (128 + 64)


def test_report() -> None:
    rows = dict(report(preset("pro")))
    assert rows["parameters"] == "1,573.00 B (48.85 B active per token)"
    assert rows["layers"] == "61: 30 c4a, 31 c128a"
    assert rows["checkpoint tensors"] == "145,116"
    assert rows["checkpoint bytes"] == "805.32 GiB"
    assert rows["KV cache, bf16"] == "9.62 GiB for 1,048,576 tokens"
    assert checkpoint_size(preset("pro"))[0] == 145_116
