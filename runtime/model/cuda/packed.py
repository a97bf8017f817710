"""Many small index arrays of the host, moved to a device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Every array begins at a multiple of 16 bytes, which is what Triton assumes of a pointer once it has seen it so.
_WORDS = 4


def move(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Integer arrays -> int32 tensors of the same shapes: views of one buffer, which lives as long as they do."""
    sizes = [-(-array.size // _WORDS) * _WORDS for array in arrays.values()]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    flat, places, start = host.numpy(), [], 0
    for array, size in zip(arrays.values(), sizes, strict=True):
        assert array.size == 0 or (abs(array) < 2**31).all(), "beyond int32"
        flat[start : start + array.size] = array.reshape(-1)
        flat[start + array.size : start + size] = 0
        places.append(slice(start, start + array.size))
        start += size
    moved = host.to(device, non_blocking=True)
    return {
        name: moved[place].view(np.shape(array))
        for (name, array), place in zip(arrays.items(), places, strict=True)
    }
