"""Which experts a token goes to, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, Choice, Example, Op, arch, check, check_tensor, installed, portable
from weft.kernels.gpu.weights import FloatWeight
from weft.kernels.reference import routing as reference

_FLOATS = (torch.bfloat16, torch.float32)
# From so many tokens on FlashInfer's four launches beside the product with the gate took less than our one: on an
# H200 0.85 of our time at 512 tokens, 0.56 at 4,096.
MANY = 512


@dataclass(frozen=True)
class Routes:
    """experts: [T, k + 1] int32: the chosen ones, ascending, then the shared one, whose number is E. weights:
    [T, k + 1] float32: what each one's hidden values are multiplied by; 1 for the shared one."""

    experts: Tensor
    weights: Tensor


def route(
    x: Tensor,
    gate: FloatWeight,
    bias: Tensor | None,
    table: Tensor | None,
    ids: Tensor,
    k: int,
    scaling: float,
    *,
    deterministic: bool = True,
    implementation: str | None = None,
) -> Routes:
    """Scores s = sqrt(softplus(x . g)), experts and weights, in one launch.

    x: [T, D] bfloat16 or float32, rows may be strided. gate: [E, D]. Exactly one of bias and table: bias [E]
    float32: the k experts of the largest s + bias, of equal ones the lower; table [V, k] int32, rows ascending:
    the experts of a token are table[ids[t]]. ids: [T] int32, read with a table only; -1 (padding) is read as 0. A
    weight is s / (the sum of the chosen s, added left to right) * scaling. deterministic: False lets a
    library add in another order where tokens are many. Source: DeepSeek-V4's published inference code."""
    check_tensor("x", x, (None, None), *_FLOATS)
    tokens, experts = len(x), gate.shape[0]
    check_tensor("gate", gate.weight, (None, x.shape[1]), *_FLOATS)
    check((bias is None) != (table is None) and 0 < k <= experts, "bias or table", k, experts)
    if bias is not None:
        check_tensor("bias", bias, (experts,), torch.float32)
    if table is not None:
        check_tensor("table", table, (None, k), torch.int32)
        check(table.is_contiguous(), "table is contiguous")
        check_tensor("ids", ids, (tokens,), torch.int32)
    choice = choose(arch(x), installed(), table is not None, tokens, deterministic)
    name = implementation or choice.implementation
    if name == "flashinfer" and tokens:
        return _hashed(x, gate, table, ids, scaling)
    chosen = torch.empty(tokens, k + 1, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, k + 1, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return Routes(chosen, weights)
    if name == "reference":
        chosen[:, k], weights[:, k] = experts, 1.0
        chosen[:, :k], weights[:, :k] = reference.route(x, gate.weight, bias, table, ids, k, scaling)
        return Routes(chosen, weights)
    from weft.kernels.triton.routing import route as launch

    launch(x, gate, bias, table, ids, k, scaling, chosen, weights)
    return Routes(chosen, weights)


def _hashed(x: Tensor, gate: FloatWeight, table: Tensor | None, ids: Tensor, scaling: float) -> Routes:
    """A product of ours, then FlashInfer's kernel with what it needs around it: five launches."""
    from weft.kernels.gpu.linear import linear
    from weft.kernels.libraries.flashinfer_routing import hash_routes

    assert table is not None, "FlashInfer routes by tables only"
    return Routes(*hash_routes(linear(x, gate, dtype=torch.float32), table, ids, scaling))


def choose(
    arch: Arch, libraries: frozenset[str], hashed: bool = False, tokens: int = 1, deterministic: bool = True
) -> Choice:
    """Only where bits may depend on the batch does the number of tokens matter."""
    on_gpu = arch not in ("cpu", "interpreter")
    many = not deterministic and tokens >= MANY
    if on_gpu and hashed and many and "flashinfer.hash_topk" in libraries:
        return Choice("route", "flashinfer", f"fast mode, experts by token id, {MANY} tokens or more")
    return portable("route", arch, libraries)


def least_bytes(tokens: int, experts: int, dim: int, k: int, itemsize: int) -> int:
    """With a bias, x and gate in one type: each read once, experts and weights written."""
    return (tokens + experts) * dim * itemsize + 4 * experts + 8 * tokens * (k + 1)


OP = Op(
    "route",
    "scores of the experts, the best of them or those of a token's table, and their weights",
    ("reference", "triton", "flashinfer"),
    (
        Example("any shape", choose),
        Example("hashed, prefill, fast mode", partial(choose, hashed=True, tokens=MANY, deterministic=False)),
    ),
)
