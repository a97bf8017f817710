"""Match the tensors found in the files with the weights of the model, before anything is read.

How a matrix is stored is taken from the files, not from the config: one that the config would keep
as FP4 may be FP8 (the "-Base" checkpoints) or plain floats (a dequantised copy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from weft.runtime.checkpoint.headers import Headers, Stored
from weft.runtime.checkpoint.hf_names import GATE_UP, merged_name, official_name
from weft.runtime.checkpoint.layout import (
    DTYPE_BYTES,
    Storage,
    TensorSpec,
    Weight,
    draft_weights,
    stored_weights,
    weights,
)
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError

Layout = Literal["official", "prefixed", "huggingface"]

_FLOATS = ("BF16", "F16", "F32")
_INTEGERS = ("I64", "I32")
_SCALES = ("F8_E8M0", "F32")
_QUANTISED: dict[str, Storage] = {"F8_E4M3": "fp8", "I8": "fp4"}
_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Item:
    """How to obtain one weight: the tensor that holds it, its scale, its part of a merged one."""

    weight: Weight
    stored: Stored
    scale: Stored | None = None  # of a quantised matrix
    part: tuple[int, slice] | None = None  # expert and rows, for merged experts

    @property
    def nbytes(self) -> int:
        """Stored bytes read for this weight."""
        if self.part is not None:
            return DTYPE_BYTES[self.stored.spec.dtype] * prod(self.weight.shape)
        return self.stored.spec.nbytes + (self.scale.spec.nbytes if self.scale else 0)


@dataclass(frozen=True)
class Plan:
    """Every weight of `config` with its source.

    `files` are all files of the checkpoint, `skipped` the stored tensors Weft has no use for, and
    `notices` says what a user should know of that.
    """

    config: ModelConfig
    layout: Layout
    files: tuple[str, ...]
    items: tuple[Item, ...]
    skipped: tuple[str, ...]
    notices: tuple[str, ...]


def make_plan(config: ModelConfig, headers: Headers, where: str, *, drafts: bool = False) -> Plan:
    """Find every weight of `config`, or raise one `CheckpointError` that lists all problems.

    transformers saves no `mtp.*`; Hugging Face files without it get a config without MTP block.
    Where the config has no such block, `mtp.*` is skipped: any tensor, or with DSpark keys those of
    the draft stages, by name. With `drafts` the stages are wanted like all other weights. `where`
    names the checkpoint in the message.
    """
    layout = _detect_layout(headers.tensors)
    matcher = _Matcher(config)
    matcher.add(headers.tensors)
    if layout == "huggingface" and not any(name.startswith("mtp.") for name in matcher.found):
        config = _without_mtp(config)
    wanted = stored_weights(config) if drafts else weights(config)
    items = [matcher.match(weight) for weight in wanted]
    skipped = matcher.skip(config)
    matcher.check_all_used()
    matcher.check_files(headers)
    if matcher.problems:
        raise CheckpointError(_message(where, len(headers.files), layout, matcher.problems))
    found = tuple(item for item in items if item)
    return Plan(config, layout, tuple(headers.files), found, skipped, _notices(config, len(skipped)))


def _without_mtp(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config,
        num_nextn_predict_layers=0,
        dspark_block_size=None,
        dspark_noise_token_id=None,
        dspark_target_layer_ids=None,
        dspark_markov_rank=None,
    )


def _notices(config: ModelConfig, skipped: int) -> tuple[str, ...]:
    if not skipped:
        return ()
    count = f"({skipped:,} tensors under mtp.*)"
    if config.dspark_block_size is not None:
        return (f"DSpark draft stages are not used: no speculation {count}",)
    return (f"no MTP block in the config: no speculation {count}",)


def _detect_layout(stored: Sequence[Stored]) -> Layout:
    names = [tensor.spec.name for tensor in stored]
    if any(official_name(name) != name.removeprefix("model.") for name in names):
        return "huggingface"
    return "prefixed" if any(name.startswith("model.") for name in names) else "official"


@dataclass
class _Matcher:
    """Official name -> stored tensor; problems are collected by group, each one once."""

    config: ModelConfig
    found: dict[str, Stored] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: dict[str, dict[str, None]] = field(default_factory=dict)

    def note(self, group: str, text: str) -> None:
        self.problems.setdefault(group, {})[text] = None

    def add(self, stored: Sequence[Stored]) -> None:
        for tensor in stored:
            name = official_name(tensor.spec.name)
            first = self.found.setdefault(name, tensor)
            if first is not tensor:
                self.note("stored twice", f"{name} in {first.file} and {tensor.file}")

    def match(self, weight: Weight) -> Item | None:
        stored = self.found.get(weight.name)
        if stored is None:
            return self._match_merged(weight)
        self.used.add(weight.name)
        dtype = stored.spec.dtype
        quantisable = weight.storage in ("fp8", "fp4")
        if quantisable and dtype in _QUANTISED:
            return self._match_quantised(weight, stored, _QUANTISED[dtype])
        plain = _INTEGERS if weight.storage == "i64" else _FLOATS
        self._check(stored, weight.shape, (*plain, *_QUANTISED) if quantisable else plain)
        return Item(weight, stored)

    def _match_quantised(self, weight: Weight, stored: Stored, storage: Storage) -> Item | None:
        values, scale = weight.tensors(storage)
        self._check(stored, values.shape, (values.dtype,))
        stored_scale = self.found.get(scale.name)
        if stored_scale is None:
            self.note("missing", scale.name)
            return None
        self.used.add(scale.name)
        self._check(stored_scale, scale.shape, _SCALES)
        return Item(weight, stored, stored_scale)

    def _match_merged(self, weight: Weight) -> Item | None:
        merged, expert = merged_name(weight.name) or ("", 0)
        stored = self.found.get(merged)
        if stored is None:
            self.note("missing", weight.name)
            return None
        self.used.add(merged)
        rows, columns = weight.shape
        stacked = 2 if merged.endswith(GATE_UP) else 1
        shape = (self.config.n_routed_experts, stacked * rows, columns)
        self._check(stored, shape, _FLOATS)
        start = rows if weight.name.endswith(".w3.weight") else 0
        return Item(weight, stored, part=(expert, slice(start, start + rows)))

    def skip(self, config: ModelConfig) -> tuple[str, ...]:
        """Take the tensors that Weft has no use for out of `found`; their stored names, sorted."""
        if config.has_mtp:
            return ()
        spare = {name for name in self.found if name.startswith("mtp.") and name not in self.used}
        if config.dspark_block_size is not None:
            spare &= {spec.name for weight in draft_weights(config) for spec in weight.tensors()}
        return tuple(sorted(self.found.pop(name).spec.name for name in spare))

    def _check(self, stored: Stored, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        spec: TensorSpec = stored.spec
        if spec.shape != shape:
            self.note("wrong shape", f"{spec.name} is {list(spec.shape)}, expected {list(shape)}")
        if spec.dtype not in dtypes:
            self.note("wrong dtype", f"{spec.name} is {spec.dtype}, expected {' or '.join(dtypes)}")

    def check_all_used(self) -> None:
        for name, stored in self.found.items():
            if name not in self.used:
                self.note("unexpected", stored.spec.name)

    def check_files(self, headers: Headers) -> None:
        """Report unreadable files; the tensors they are known to hold are then not missing."""
        for file, reason in headers.unreadable.items():
            self.note("unreadable files", f"{file} ({reason})")
        missing = self.problems.get("missing", {})
        for name in headers.lost:
            missing.pop(official_name(name), None)
        if not missing:
            self.problems.pop("missing", None)


def _message(where: str, files: int, layout: Layout, problems: dict[str, dict[str, None]]) -> str:
    total = sum(len(texts) for texts in problems.values())
    lines = [f"{where}: {total:,} problem(s) in {files} file(s), {layout} layout"]
    for group, texts in sorted(problems.items()):
        lines.append(f"  {group} ({len(texts):,}):")
        lines += [f"    {text}" for text in list(texts)[:_NAMES_SHOWN]]
        if len(texts) > _NAMES_SHOWN:
            lines.append(f"    ... and {len(texts) - _NAMES_SHOWN:,} more")
    return "\n".join(lines)
