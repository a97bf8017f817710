"""The ops around attention at V4-Flash's sizes: hyper-connections, linears, routing, experts, sampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from support.ops import Case, Prepared
from weft.kernels.gpu import experts, hyper, linear, routing, sampling
from weft.kernels.libraries import deep_gemm
from weft.kernels.reference import experts as experts_inputs
from weft.kernels.reference import hyper as hyper_inputs
from weft.kernels.reference import linear as linear_inputs
from weft.kernels.reference import routing as routing_inputs
from weft.kernels.reference import sampling as sampling_inputs

DIM, EXPERTS, CHOSEN = 4096, 256, 6
# What the interpreter counts: the same tiles, fewer of them.
SMALL = {"dim": 512, "inner": 256, "count": 8, "k": 3}


def _hyper(tokens: int, device: str, parts: int) -> Prepared:
    given = hyper_inputs.example(tokens, device, parts=parts)
    return Prepared(
        lambda name: hyper.hyper_post_pre(**given, implementation=name),
        hyper.least_bytes(tokens, DIM, parts, 2),
        2.0 * tokens * 24 * 4 * DIM,
    )


def _linear(tokens: int, device: str, name: str) -> Prepared:
    shape = linear_inputs.FLASH[name]
    given = linear_inputs.example(tokens, device, shape)
    call = linear.fp8_linear if shape.fp8 else linear.linear
    peers: dict[str, Callable[[], object]] = {}
    if device == "cuda" and shape.groups == 1:
        peers["cublas bf16"] = _cublas(given)
        if shape.fp8 and not deep_gemm.absence():
            peers["deep_gemm"] = deep_gemm.fp8_gemm(given["x"].contiguous(), given["weight"])
    return Prepared(
        lambda name: call(**given, implementation=name),
        linear.least_bytes(tokens, given["weight"], shape.groups, 2, shape.dtype.itemsize),
        2.0 * tokens * shape.rows * shape.columns,
        peers,
    )


def _cublas(given: dict[str, Any]) -> Callable[[], object]:
    """The same product with weights in bfloat16: twice the bytes of FP8 ones."""
    x = given["x"].contiguous()
    weight = torch.randn(given["weight"].shape, device=x.device).bfloat16()
    return partial(torch.nn.functional.linear, x, weight)


def _route(tokens: int, device: str) -> Prepared:
    given = routing_inputs.example(tokens, device)
    return Prepared(
        lambda name: routing.route(**given, implementation=name),
        routing.least_bytes(tokens, EXPERTS, DIM, CHOSEN, 2),
        2.0 * tokens * EXPERTS * DIM,
    )


def _experts(tokens: int, device: str, form: str) -> Prepared:
    given = experts_inputs.example(tokens, form, device, **({} if device == "cuda" else SMALL))
    ids = given["ids"]
    _, dim, inner = given["experts"].shape
    used = len(ids[:, :-1].unique())
    return Prepared(
        lambda name: experts.run_experts(**given, implementation=name),
        experts.least_bytes(tokens, ids.shape[1], used, given["experts"], 2),
        6.0 * ids.numel() * dim * inner,
    )


def _sample(rows: int, device: str, **filters: float) -> Prepared:
    given = sampling_inputs.example(rows, device, **filters)  # type: ignore[arg-type]
    width = given["scores"].logits.shape[1]
    return Prepared(
        lambda name: sampling.sample_rows(**given, implementation=name),
        sampling.least_bytes(rows, width, warm=rows, filtered=rows if filters else 0),
    )


def _linears() -> tuple[Case, ...]:
    of_kinds = {"wq_b": "w8", "wq_b|indexer.wq_b": "4", "compressor c4": "4", "compressor c128": "8", "head": ""}
    return tuple(
        Case(
            f"linear {name}",
            partial(_linear, name=name),
            "both" if name != "head" else "decode",
            of_kinds.get(name, "w48"),
        )
        for name in linear_inputs.FLASH
    )


STEP_CASES = (
    Case("hyper-connections after attention", partial(_hyper, parts=1), "both", "w48"),
    Case("hyper-connections after experts", partial(_hyper, parts=CHOSEN + 1), "both", "w48"),
    *_linears(),
    Case("gate and routes", _route, "both", "w48"),
    Case("experts, FP8", partial(_experts, form="fp8"), "both", "w48"),
    Case("experts, FP4", partial(_experts, form="fp4"), "both", ""),
    Case("sampling, temperature", _sample, "decode", ""),
    Case("sampling, top-k 50, top-p 0.9", partial(_sample, top_k=50, top_p=0.9), "decode", ""),
)
