"""Every device op, for `weft kernels` and for whoever wants to go through them all."""

from __future__ import annotations

from weft.kernels.gpu import (
    attention,
    compress,
    copies,
    experts,
    heads,
    hyper,
    indexer,
    linear,
    output,
    routing,
    sampling,
    steps,
    topk,
    verify,
)
from weft.kernels.gpu.base import Op

OPS: tuple[Op, ...] = (
    steps.OP,
    hyper.OP,
    linear.OP,
    heads.OP,
    compress.OP,
    indexer.OP,
    topk.OP,
    attention.OP,
    output.OP,
    routing.OP,
    experts.OP,
    sampling.OP,
    verify.OP,
    copies.OP,
)
