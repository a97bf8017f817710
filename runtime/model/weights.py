"""Access to a model's weights by their official names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from weft.kernels.linear import Array, Linear


class Draining(Mapping[str, Tensor]):
    """Hands each tensor out once and forgets it, so that building a model from freshly loaded weights never holds
    both them and the fused copies. Owns the dict it is given, and empties it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Weights:
    """A view of official-name tensors under a prefix.

    `dtype` is the model's compute dtype. Tensors that DeepSeek-V4 keeps in float32 whatever the model's dtype
    (norms, gates, compressors, hyper-connections, sinks, head) are read with `wide`.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, deterministic: bool = True, prefix: str = ""
    ) -> None:
        self._tensors = tensors
        self.dtype = dtype
        self.deterministic = deterministic
        self._prefix = prefix

    def under(self, prefix: str) -> Weights:
        return Weights(self._tensors, self.dtype, self.deterministic, self._prefix + prefix)

    def raw(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def wide(self, name: str) -> Tensor:
        return self.raw(name).float()

    def array(self, name: str) -> Array:
        """A vector or table in float32, for numpy."""
        out: Array = self.wide(name).numpy()
        return out

    def model(self, name: str) -> Tensor:
        return self.raw(name).to(self.dtype)

    def linear(self, *names: str) -> Linear:
        """One linear from the rows of several weights, in the model's dtype."""
        return self.packed(*(self.model(name) for name in names))

    def wide_linear(self, *names: str) -> Linear:
        """The same in float32."""
        return self.packed(*(self.wide(name) for name in names))

    def packed(self, *parts: Tensor) -> Linear:
        """One linear from the rows of several tensors."""
        return Linear(parts[0] if len(parts) == 1 else torch.cat(parts), deterministic=self.deterministic)
