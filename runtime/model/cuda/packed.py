"""Many small index arrays in one buffer, so that a step's reach the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Every array begins at a multiple of 16 bytes, which is what Triton assumes of a pointer once it has seen it so.
_WORDS = 4


def align(count: int) -> int:
    return -(-count // _WORDS) * _WORDS


class Packed:
    """Where int32 arrays of given shapes lie in one buffer of `size` numbers, behind each other."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.size = 0
        self._places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            count = prod(shape)
            self._places[name] = self.size, self.size + count, shape
            self.size += align(count)

    def host(self, device: torch.device) -> Tensor:
        """A zeroed buffer of the host, from which a copy to the device is not waited for. Torch's cache of pinned
        memory gives it to nobody else before the copy is done."""
        return torch.empty(self.size, dtype=torch.int32, pin_memory=device.type == "cuda").zero_()

    def arrays(self, buffer: Tensor) -> dict[str, NDArray[np.int32]]:
        """The arrays of a buffer of the host, to write."""
        return self._views(buffer.numpy())

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        return self._views(buffer)

    def _views(self, flat: Any) -> dict[str, Any]:
        return {name: flat[start:end].reshape(shape) for name, (start, end, shape) in self._places.items()}
