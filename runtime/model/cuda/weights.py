"""A model's weights on a device, by their official names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from weft.kernels.gpu.base import Arch, arch_of
from weft.kernels.gpu.expert_weights import (
    Experts,
    Matrix,
    StoredExpert,
    float_experts,
    fp4_experts,
    fp8_experts,
)
from weft.kernels.gpu.hyper import HeadMixer, Mixer
from weft.kernels.gpu.weights import FloatWeight, pack_fp8
from weft.runtime.checkpoint.quant import Quantised
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError
from weft.runtime.model.cuda.linear import Weight
from weft.runtime.model.cuda.memory import ExpertFormat


class DeviceWeights:
    """A view of official-name tensors under a prefix; each is moved to the device as it is asked for.

    Matrices that are stored as FP8 or FP4 stay so. `dtype` is the model's compute dtype, that of matrices stored
    as floats. What DeepSeek-V4 multiplies in float32 whatever that is (gates, compressors, head) is read with
    `wide_linear`; small tables (norms, hyper-connections, sinks) are float32.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | Quantised],
        dtype: torch.dtype,
        device: torch.device,
        expert_format: ExpertFormat | None = None,
        deterministic: bool = True,
        prefix: str = "",
    ) -> None:
        """expert_format: how FP4 experts are held; None: `default_format` of the architecture. deterministic: of
        the model, for those who may run something else if bits do not count."""
        self._tensors = tensors
        self.deterministic = deterministic
        self.expert_format = expert_format
        self.dtype = dtype
        self.device = device
        self._prefix = prefix

    def under(self, prefix: str) -> DeviceWeights:
        return DeviceWeights(
            self._tensors,
            self.dtype,
            self.device,
            self.expert_format,
            self.deterministic,
            self._prefix + prefix,
        )

    def _stored(self, name: str) -> Tensor | Quantised:
        return self._tensors[self._prefix + name]

    def _float(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """On the device, in the dtype that it is stored in if none is given."""
        found = self._stored(name)
        if isinstance(found, Quantised):
            return found.dequantised(dtype or self.dtype).to(self.device)
        return found.to(self.device, dtype or found.dtype)

    def wide(self, name: str) -> Tensor:
        return self._float(name, torch.float32)

    def model(self, name: str) -> Tensor:
        return self._float(name, self.dtype)

    def ids(self, name: str) -> Tensor:
        """int32."""
        found = self._stored(name)
        assert isinstance(found, Tensor)
        return found.to(self.device, torch.int32)

    def linear(self, *names: str) -> Weight:
        """One linear from the rows of several weights."""
        return _packed([self._stored(name) for name in names], self.dtype, self.device)

    def wide_linear(self, *names: str) -> FloatWeight:
        """In bfloat16 if inputs and all of the weights are, else in float32: sums are float32 in any case."""
        found = [self._float(name, None) for name in names]
        narrow = all(part.dtype == self.dtype == torch.bfloat16 for part in found)
        return FloatWeight.of(*(part if narrow else part.float() for part in found))

    def experts(self, count: int) -> Experts:
        """The routed experts and the shared one: FP8, FP4 as `format` says, or floats, as they are stored."""
        routed: Iterator[tuple[Tensor | Quantised, ...]] = (
            _triple(self.under(f"experts.{number}.")) for number in range(count)
        )
        first = next(routed)
        shared = _triple(self.under("shared_experts."))
        every = chain([first], routed)
        if not isinstance(first[0], Quantised) or not isinstance(shared[0], Quantised):
            return self._float_experts([*every, shared])
        arch = arch_of(self.device.type, self.device.index)
        try:
            stored = (_as_stored(triple) for triple in every)
            if not first[0].is_fp4 or (self.expert_format or default_format(arch)) == "fp8":
                return fp8_experts(stored, count, _as_stored(shared), self.device)
            return fp4_experts(stored, count, _as_stored(shared), self.device)
        except ValueError as error:
            raise CheckpointError(f"{self._prefix}experts: {error}") from error

    def _float_experts(self, every: Sequence[tuple[Tensor | Quantised, ...]]) -> Experts:
        floats = [
            [part.dequantised(self.dtype) if isinstance(part, Quantised) else part for part in triple]
            for triple in every
        ]
        w1, w2, w3 = (
            torch.stack([part.to(self.device, self.dtype) for part in parts])
            for parts in zip(*floats, strict=True)
        )
        return float_experts(w1, w2, w3)

    def mixer(self, name: str, config: ModelConfig) -> Mixer:
        fn, base, scale = (self.wide(f"{name}_{part}") for part in ("fn", "base", "scale"))
        return Mixer(fn, base, scale, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)

    def head_mixer(self, config: ModelConfig) -> HeadMixer:
        fn, base, scale = (self.wide(f"hc_head_{part}") for part in ("fn", "base", "scale"))
        return HeadMixer(fn, base, scale, config.hc_eps, config.rms_norm_eps)


def _packed(found: Sequence[Tensor | Quantised], dtype: torch.dtype, device: torch.device) -> Weight:
    codes = [part for part in found if isinstance(part, Quantised) and not part.is_fp4]
    if len(codes) == len(found):
        return pack_fp8([(part.codes.to(device), part.scale.to(device)) for part in codes])
    floats = [part.dequantised(dtype) if isinstance(part, Quantised) else part for part in found]
    return FloatWeight.of(*(part.to(device, dtype) for part in floats))


def _triple(weights: DeviceWeights) -> tuple[Tensor | Quantised, ...]:
    """w1, w2, w3 of an expert."""
    return tuple(weights._stored(f"{name}.weight") for name in ("w1", "w2", "w3"))


def _as_stored(triple: Sequence[Tensor | Quantised]) -> StoredExpert:
    """All three are quantised, as the first expert's are."""
    parts = []
    for part in triple:
        if not isinstance(part, Quantised):
            raise CheckpointError("some experts of a layer are quantised, and others are not")
        parts.append(Matrix(part.codes, part.scale))
    return StoredExpert(*parts)


def default_format(arch: Arch) -> ExpertFormat:
    """How FP4 experts are held if nobody says: as they are where the architecture multiplies them."""
    return "fp4" if arch == "sm100" else "fp8"
