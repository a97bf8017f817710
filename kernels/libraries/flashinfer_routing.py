"""FlashInfer's routing of layers whose experts are listed per token id: the table's row and its weights.

It wants the gate's scores of all experts, so it comes after a product that Weft's `route` has within. A row's bits
depend on that row alone, but the weights are summed in another order than by Weft, so they are not Weft's bits:
an engine stays with one of the two. Source: signature and kernel of flashinfer-python 0.7.2.post1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.gpu.base import check, check_tensor
from weft.kernels.libraries.flashinfer import require


def hash_routes(scores: Tensor, table: Tensor, ids: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The experts of each token and then the shared one, number E: [T, k + 1] int32, and their weights, float32.

    scores: [T, E] float32, products with the gate. table: [V, k] int32 experts of each id, ascending. ids: [T]
    int32, -1: any experts. weights: sqrt(softplus(score)), normalised to sum 1, times `scaling`; 1 for the shared.
    """
    require("hash_topk")
    from flashinfer.fused_moe import hash_topk

    check_tensor("scores", scores, (None, None), torch.float32)
    check_tensor("table", table, (None, None), torch.int32)
    check_tensor("ids", ids, (len(scores),), torch.int32)
    check(scores.is_contiguous() and table.is_contiguous(), "scores and table are contiguous")
    # The kernel checks no id. Its own scaling is only divided by, for the shared expert.
    weights, experts = hash_topk(scores, ids.long().clamp_min_(0), table, 1, 1.0)
    weights[:, :-1] *= scaling
    return experts, weights
