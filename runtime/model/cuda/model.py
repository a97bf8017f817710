"""The whole network over one flattened batch on a device, and its MTP block. See `weft.runtime.model.base`.

A decode or verify step is padded to one of few shapes (`shape`), for which a captured graph is replayed
(`graphs`); on the CPU, or without graphs, the same function runs on the same buffers. Prefill and replays run as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from weft.kernels.gpu.steps import embed_streams, store_rows
from weft.runtime.cache.capacity import IndexFormat, KvFormat, PoolSizes
from weft.runtime.cache.device_pools import DevicePools
from weft.runtime.checkpoint.quant import Quantised
from weft.runtime.config import LayerKind, ModelConfig
from weft.runtime.model.batch import Batch
from weft.runtime.model.context import Rope
from weft.runtime.model.cuda.block import Block, Streams
from weft.runtime.model.cuda.graphs import CudaCapture, Graphs
from weft.runtime.model.cuda.linear import project
from weft.runtime.model.cuda.memory import ExpertFormat
from weft.runtime.model.cuda.readout import MtpBlock, Readout
from weft.runtime.model.cuda.shape import SIZES, StepShape, decodes, padded, size_of
from weft.runtime.model.cuda.side import Side
from weft.runtime.model.cuda.step import DeviceStep, host_input, idle_input
from weft.runtime.model.cuda.weights import DeviceWeights

_MTP_KINDS: frozenset[LayerKind] = frozenset({"window"})
# Captured steps of a pool, and of the head: a graph is some megabytes of the driver's memory.
_MOST_STEPS = 192
_MOST_HEADS = 32
# Rows of logits from which on the head is not captured: its results would take more memory than its launches time.
_HEAD_ROWS = 64


class _Inputs(NamedTuple):
    """Buffers of a step: `host_input` on the device, and streams [T, hc, D] if it begins with some."""

    given: Tensor
    h: Tensor | None


class _Outputs(NamedTuple):
    """h: [T, hc, D]; folds: as in `DeviceStep`. Rows that pad included."""

    h: Tensor
    folds: dict[int, Tensor] | None


class DeviceModel:
    """A DeepSeek-V4 network on device tensors. Stateless: all sequence state is in the batch's `DevicePools`.

    Threads take turns: while one captures a step, another must not touch the second stream."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor | Quantised],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        deterministic: bool = True,
        graphs: bool = True,
        experts: ExpertFormat | None = None,
    ) -> None:
        """tensors: official names to weights, as they are stored or as floats; each is asked for once. device:
        "cpu" runs the ops' references, or Triton's interpreter, for tests. deterministic: drafts are accepted only
        if they are what would have been drawn; a row has the same bits in every batch anyway. graphs: decode and
        verify steps are padded, and on GPUs captured and replayed. experts: how FP4 experts are held; None: as the
        architecture multiplies them best."""
        self.device = torch.device(device)
        weights = DeviceWeights(tensors, dtype, self.device, experts, deterministic)
        self.config = config
        self.dtype = dtype
        self.deterministic = deterministic
        self.rope = Rope(config, self.device)
        self.embed = weights.model("embed.weight")
        self.blocks = [
            Block(config, weights.under(f"layers.{i}."), i, kind, hashed=config.is_hash_layer(i))
            for i, kind in enumerate(config.layer_kinds)
        ]
        self.readout = Readout(config, weights)
        self.head = weights.wide_linear("head.weight")
        self.mtp = MtpBlock(config, weights.under("mtp.0.")) if config.has_mtp else None
        self._kinds = frozenset(config.layer_kinds)
        self._side = Side(self.device)
        self._turn = Lock()
        self._pads = graphs
        self._capture = CudaCapture(self.device) if graphs and self.device.type == "cuda" else None
        # A graph reads and writes the pools that it was captured over, by address, and goes with them.
        self._steps: WeakKeyDictionary[DevicePools, Graphs] = WeakKeyDictionary()
        self._heads = Graphs(self._capture, _MOST_HEADS)

    def make_pools(self, sizes: PoolSizes, kv_format: KvFormat, index_format: IndexFormat) -> DevicePools:
        return DevicePools(
            self.config,
            sizes,
            self.dtype,
            kv_format=kv_format,
            index_format=index_format,
            device=self.device,
        )

    # -- the backbone -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """Backbone streams of every token, before the readout.

        ids: [T] int64 on the host, in batch order. Returns [T, hc, D] on the device; zeros for rows of a replay
        that are left out. Writes KV rows, entries, tails and last streams of the batch's sequences. The batch's
        folds are valid until the next step.
        """
        if batch.replays:
            with self._turn:
                return self._replay(ids, batch)
        h, folds = self._step("forward", ids, batch, self._kinds, self._backbone)
        if batch.folds is not None:
            assert folds is not None
            batch.folds.update({layer: rows[: batch.tokens] for layer, rows in folds.items()})
        return h

    def _backbone(self, step: DeviceStep, _: Tensor | None) -> Tensor:
        streams = Streams(embed_streams(self.embed, step.ids, self.config.hc_mult))
        for block in self.blocks:
            streams = block(streams, step.ids, step)
        h = streams.whole()
        store_rows(h, step.last, step.slots, step.pools.streams)
        return h

    def _replay(self, ids: Tensor, batch: Batch) -> Tensor:
        """`forward` with fewer rows from layer to layer."""
        out = torch.zeros(
            len(ids), self.config.hc_mult, self.config.hidden_size, dtype=self.dtype, device=self.device
        )
        streams = Streams(embed_streams(self.embed, ids.int().to(self.device), self.config.hc_mult))
        rows = torch.arange(batch.tokens)
        step: DeviceStep | None = None
        for layer, block in enumerate(self.blocks):
            part, keep = batch.at_layer(layer)
            if part is None:
                return out
            kept = torch.from_numpy(keep)
            if step is None or len(kept) < len(rows):
                # Rows that are not exact may be computed from anything; they are left out from here on.
                streams = Streams(streams.whole()[torch.searchsorted(rows, kept).to(self.device)])
                rows, step = kept, DeviceStep.of(part, ids[kept], self.rope, self._kinds, self._side)
            streams = block(streams, step.ids, step)
            part.folds = step.folds
            batch.take_folds(part, keep)
        assert step is not None
        h = streams.whole()
        out[rows.to(self.device)] = h
        store_rows(h, step.last, step.slots, step.pools.streams)
        return out

    # -- the MTP block ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward_mtp(self, h: Tensor, next_ids: Tensor, batch: Batch) -> Tensor:
        """MTP streams of each row, from which `mtp_logits` predicts the token after next.

        h: [T, hc, D] backbone (or, when drafting further, MTP) streams at the batch's positions; next_ids: [T] on
        the host, the tokens that follow them. Returns [T, hc, D], zeros for rows of a replay that are left out;
        writes the MTP layer's window rows.
        """
        if not batch.replays:
            return self._step("forward_mtp", next_ids, batch, _MTP_KINDS, self._drafted, h).h
        out = torch.zeros_like(h)
        part, keep = batch.at_layer(self.config.num_hidden_layers)
        if part is not None:
            kept = torch.from_numpy(keep)
            rows = kept.to(self.device)
            out[rows] = self._step("forward_mtp", next_ids[kept], part, _MTP_KINDS, self._drafted, h[rows]).h
        return out

    def _drafted(self, step: DeviceStep, h: Tensor | None) -> Tensor:
        assert self.mtp is not None, "the config has no MTP block"
        assert h is not None
        return self.mtp(h, embed_streams(self.embed, step.ids, 1)[:, 0], step)

    # -- logits -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] backbone streams -> [n, V] float32 on the device."""
        return self._logits("logits", h, self.readout)

    @torch.inference_mode()
    def mtp_logits(self, h: Tensor) -> Tensor:
        """[n, hc, D] MTP streams -> [n, V] float32 on the device."""
        assert self.mtp is not None, "the config has no MTP block"
        return self._logits("mtp_logits", h, self.mtp.readout)

    def _logits(self, name: str, h: Tensor, readout: Readout) -> Tensor:
        def run(rows: Tensor) -> Tensor:
            return project(readout(rows), self.head, dtype=torch.float32)

        if not self._pads or not 0 < len(h) <= _HEAD_ROWS:
            return run(h)
        size = size_of(len(h))
        with self._turn:
            out = self._heads.run(
                (name, size), lambda: h.new_zeros(size, *h.shape[1:]), lambda rows: rows[: len(h)].copy_(h), run
            )
            return out[: len(h)].clone()

    # -- steps ------------------------------------------------------------------------------------------

    def _step(
        self,
        name: str,
        ids: Tensor,
        batch: Batch,
        kinds: frozenset[LayerKind],
        run: Callable[[DeviceStep, Tensor | None], Tensor],
        h: Tensor | None = None,
    ) -> _Outputs:
        """`run` of a batch, and of streams h that it begins with; padded and replayed if it is of a shape for
        that.

        Streams that it returns are the caller's; folds are written anew by the next step of that shape."""
        pools = batch.pools
        assert isinstance(pools, DevicePools)
        shape = padded(batch, kinds) if self._pads else None
        with self._turn:
            if shape is None:
                step = DeviceStep.of(batch, ids, self.rope, kinds, self._side)
                return _Outputs(run(step, h), step.folds)
            out = self._replayed(name, host_input(batch, ids, shape), shape, pools, run, h)
            return _Outputs(out.h[: batch.tokens].clone(), out.folds)

    def _replayed(
        self,
        name: str,
        host: Tensor,
        shape: StepShape,
        pools: DevicePools,
        run: Callable[[DeviceStep, Tensor | None], Tensor],
        h: Tensor | None,
    ) -> _Outputs:
        def inputs() -> _Inputs:
            streams = None if h is None else h.new_zeros(shape.tokens, *h.shape[1:])
            return _Inputs(torch.empty(host.shape, dtype=host.dtype, device=self.device), streams)

        def fill(inputs: _Inputs) -> None:
            inputs.given.copy_(host, non_blocking=True)
            if h is not None and inputs.h is not None:
                inputs.h[: len(h)].copy_(h)

        def function(inputs: _Inputs) -> _Outputs:
            step = DeviceStep(shape, inputs.given, pools, self.rope, self._side)
            return _Outputs(run(step, inputs.h), step.folds)

        graphs = self._steps.setdefault(pools, Graphs(self._capture, _MOST_STEPS))
        return graphs.run((name, shape), inputs, fill, function)

    @torch.inference_mode()
    def prepare(self, pools: DevicePools) -> int:
        """Run and capture every step of one token a sequence for pools that nobody uses yet, on tokens that only
        pad, so that none is captured while requests wait. Returns how many steps are held."""
        if not self._pads:
            return 0
        for shape in decodes(pools, self._kinds, pools.sizes.slots):
            with self._turn:
                self._replayed("forward", idle_input(shape, self.device), shape, pools, self._backbone, None)
        streams = pools.streams.new_zeros(_HEAD_ROWS, *pools.streams.shape[1:])
        for size in SIZES:
            if size <= min(_HEAD_ROWS, pools.sizes.slots):
                self.logits(streams[:size])
        return len(self._steps[pools])
