"""What each op of a decode step moves and launches, counted by Triton's interpreter on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from support.ops import CASES
from weft.kernels.gpu import experts, hyper, linear, routing, sampling
from weft.kernels.gpu.interpreter import launches, traffic
from weft.kernels.reference import experts as experts_inputs
from weft.kernels.reference import hyper as hyper_inputs
from weft.kernels.reference import linear as linear_inputs
from weft.kernels.reference import routing as routing_inputs
from weft.kernels.reference import sampling as sampling_inputs

TOKENS = 4
# Experts have these sizes here: their tiles are the same as in V4-Flash's, only fewer.
EXPERTS = {"dim": 512, "inner": 256, "count": 8, "k": 3}


@dataclass(frozen=True)
class Count:
    """Of one call. least: as the op's module says it."""

    tokens: int
    moved: int
    least: float
    kernels: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.moved / self.least

    @property
    def of_a_token(self) -> float:
        """Least bytes, of ops that move nothing but what tokens need."""
        return self.least / self.tokens


def counted(run: Callable[[], object], least: float, tokens: int = TOKENS) -> Count:
    with traffic() as moved, launches() as seen:
        run()
    assert not seen.torch_ops, seen.names
    return Count(tokens, moved.total, least, tuple(seen.names))


def count_all() -> dict[str, Count]:
    """By op. Keys are those that `timeline` asks for."""
    return {**_attention_side(), **_linears(), **_others()}


def _attention_side() -> dict[str, Count]:
    names = {
        "norm, RoPE, store": "norm_rope_store",
        "c4 compression": "compress_c4",
        "c128 compression": "compress_c128",
        "index query": "index_query",
        "index logits, 2,048 keys (8k)": "index_logits",
        "top 512 of 2,048 (8k)": "top_k_rows",
    }
    out = {}
    for case in CASES:
        if case.name in names and case.phase != "prefill":
            prepared = case.make(TOKENS, "cpu")
            out[names[case.name]] = counted(partial(prepared.run, "triton"), prepared.least)
    return out


def _linears() -> dict[str, Count]:
    out = {}
    for name, shape in (
        ("fp8_linear", linear_inputs.FLASH["wq_a|wkv"]),
        ("linear", linear_inputs.FLASH["compressor c128"]),
    ):
        given = linear_inputs.example(TOKENS, "cpu", shape)
        call = linear.fp8_linear if shape.fp8 else linear.linear
        least = linear.least_bytes(TOKENS, given["weight"], shape.groups, 2, shape.dtype.itemsize)
        out[name] = counted(partial(call, **given, implementation="triton"), least)
    return out


def _others() -> dict[str, Count]:
    given = hyper_inputs.example(TOKENS, "cpu")
    least = hyper.least_bytes(TOKENS, 4096, 1, 2)
    out = {"hyper": counted(partial(hyper.hyper_post_pre, **given, implementation="triton"), least)}
    mixer = given["mixer"]
    head = hyper.HeadMixer(mixer.fn[:4], mixer.base[:4], mixer.scale[:1], mixer.hc_eps, mixer.norm_eps)
    gather = partial(hyper.hyper_head, given["h"], head, given["norm"], implementation="triton")
    out["hyper_head"] = counted(gather, 4 * head.fn.numel() + 2 * TOKENS * 5 * 4096)
    given = routing_inputs.example(TOKENS, "cpu")
    least = routing.least_bytes(TOKENS, 256, 4096, 6, 2)
    out["route"] = counted(partial(routing.route, **given, implementation="triton"), least)
    for format in ("fp8", "fp4"):
        given = experts_inputs.example(TOKENS, format, "cpu", **EXPERTS)
        ids = given["ids"]
        used = len(ids[:, :-1].unique())
        least = experts.least_bytes(TOKENS, ids.shape[1], used, given["experts"], 2)
        out[f"experts {format}"] = counted(partial(experts.run_experts, **given, implementation="triton"), least)
    given = sampling_inputs.example(2, "cpu")
    width = given["scores"].logits.shape[1]
    least = sampling.least_bytes(2, width, warm=2)
    out["sample_rows"] = counted(partial(sampling.sample_rows, **given, implementation="triton"), least, 2)
    return out
