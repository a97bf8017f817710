"""A model's weights on a device, by their official names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.runtime.model.cuda.linear import GroupedLinear, Linear


class DeviceWeights:
    """A view of official-name tensors under a prefix; each is moved to the device as it is asked for.

    `dtype` is the model's compute dtype; what DeepSeek-V4 keeps in float32 whatever that is (norms, gates,
    compressors, hyper-connections, sinks, head) is read with `wide`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool,
        prefix: str = "",
    ) -> None:
        self._tensors = tensors
        self.dtype = dtype
        self.device = device
        self.deterministic = deterministic
        self._prefix = prefix

    def under(self, prefix: str) -> DeviceWeights:
        return DeviceWeights(self._tensors, self.dtype, self.device, self.deterministic, self._prefix + prefix)

    def _take(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._tensors[self._prefix + name].to(self.device, dtype)

    def wide(self, name: str) -> Tensor:
        return self._take(name, torch.float32)

    def model(self, name: str) -> Tensor:
        return self._take(name, self.dtype)

    def ids(self, name: str) -> Tensor:
        return self._take(name, torch.int64)

    def linear(self, *names: str) -> Linear:
        """One linear from the rows of several weights, in the model's dtype."""
        return self.packed(*(self.model(name) for name in names))

    def wide_linear(self, *names: str) -> Linear:
        return self.packed(*(self.wide(name) for name in names))

    def grouped_linear(self, name: str, groups: int) -> GroupedLinear:
        return GroupedLinear(self.model(name), groups, deterministic=self.deterministic)

    def packed(self, *parts: Tensor) -> Linear:
        """One linear from the rows of several tensors."""
        return Linear(parts[0] if len(parts) == 1 else torch.cat(parts), deterministic=self.deterministic)
