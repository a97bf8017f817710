"""Every device op, for `weft kernels` and for whoever wants to go through them all."""

from __future__ import annotations

from weft.kernels.gpu import attention, compress, copies, heads, indexer, output, topk
from weft.kernels.gpu.base import Op

OPS: tuple[Op, ...] = (
    heads.OP,
    compress.OP,
    indexer.OP,
    topk.OP,
    attention.OP,
    output.OP,
    copies.OP,
)
