"""Convert a checkpoint between the official and the Hugging Face layout.

Where source and target differ in names only, names are all that is changed (`relabel`): every
official checkpoint becomes a Hugging Face one with the same shards, quantised as it was. The
official headers, index and config go along in `weft_official.json`, and converting back restores the
official folder byte for byte. Otherwise values are read and written anew: `dequantise` makes plain
bf16 files, and floats from elsewhere are quantised as the releases are.

transformers has no modules for `mtp.*`. These tensors go along under their official names.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from weft.runtime.checkpoint.headers import INDEX_NAME, read_headers
from weft.runtime.checkpoint.hf_names import hf_name, official_name
from weft.runtime.checkpoint.layout import stored_weights
from weft.runtime.checkpoint.reader import Checkpoint, Progress
from weft.runtime.checkpoint.relabel import RECORD_NAME, Record, read_text, relabel
from weft.runtime.checkpoint.writer import DEFAULT_SHARD_BYTES, new_folder, write_json, write_weights
from weft.runtime.config import ModelConfig, Quantization
from weft.runtime.errors import CheckpointError, RequestError

To = Literal["official", "huggingface"]

_EXPERT_DTYPE = {"I8": "fp4", "F8_E4M3": "fp8"}


def convert(
    source: Path | str,
    target: Path | str,
    to: To,
    *,
    dequantise: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the checkpoint in `source` to the new folder `target`.

    - Official to Hugging Face: same shards, quantised matrices stay as they are.
    - Anything to Hugging Face with `dequantise`: bf16 where the releases quantise, in new shards.
    - Hugging Face to official: the original bytes if `source` was made by the first kind; else a
      quantised source keeps its codes and floats are quantised as `expert_dtype` says (FP4 by
      default), with the config in its published form.

    Other files (tokenizer.json, generation_config.json, LICENSE, folders that are not hidden) are
    copied. One chunk of a file is in memory at a time; where values change, one shard of at most
    `max_shard_bytes`. `progress` is told the bytes done and in total, of whole files.

    Raises `RequestError` for `to` and `dequantise`, `ConfigError` for the config, `CheckpointError`
    for an incomplete or unreadable source, one that is in that layout already, and a `target` that
    is not empty or lies inside `source`. After any exception nothing is left behind.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    if to not in get_args(To):
        raise RequestError("to", to, f"must be one of {', '.join(get_args(To))}")
    if dequantise and to != "huggingface":
        raise RequestError("dequantise", dequantise, "the official layout is quantised")
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target}: lies inside the checkpoint to convert")
    with new_folder(target) as folder:
        record = Record.load(source) if to == "official" else None
        if record is not None:
            files = _restore(record, source, folder, progress)
        else:
            files = _convert(source, folder, to, dequantise, progress, max_shard_bytes)
        _copy_others(source, folder, files)


def _restore(record: Record, source: Path, folder: Path, progress: Progress | None) -> Collection[str]:
    headers = read_headers(source)
    if headers.unreadable:
        problems = [f"{file} ({reason})" for file, reason in headers.unreadable.items()]
        raise CheckpointError(f"{source}: unreadable files: {', '.join(problems)}")
    if sorted(record.headers) != headers.files:
        raise CheckpointError(f"{source}: {RECORD_NAME} describes other files: {', '.join(record.headers)}")
    _check_names(source, headers.files)
    record.check(source, official_name)
    record.restore(source, folder, progress)
    return headers.files


def _convert(
    source: Path, folder: Path, to: To, dequantise: bool, progress: Progress | None, max_shard_bytes: int
) -> Collection[str]:
    """Convert a checkpoint without record; returns the names of its weight files."""
    checkpoint = Checkpoint.open(source)
    _check_names(source, checkpoint.files)
    if checkpoint.layout == to and not dequantise:
        raise CheckpointError(f"{source}: is in the {to} layout already")
    if to == "huggingface" and not dequantise:
        Record.of(source, checkpoint.files).save(folder)
        (folder / "config.json").write_bytes(_huggingface_config(checkpoint).encode())
        relabel(source, folder, checkpoint.files, lambda name: hf_name(official_name(name)), progress)
    elif to == "official" and _is_quantised(checkpoint):
        write_json(folder / "config.json", _official_config(checkpoint).to_dict())
        relabel(source, folder, checkpoint.files, official_name, progress)
    else:
        _write_anew(source, folder, to, progress, max_shard_bytes)
    return checkpoint.files


def _write_anew(source: Path, folder: Path, to: To, progress: Progress | None, max_shard_bytes: int) -> None:
    checkpoint = Checkpoint.open(source, drafts=True)
    if checkpoint.skipped:
        raise CheckpointError(
            f"{source}: config.json does not describe {len(checkpoint.skipped):,} tensors under mtp.*, "
            f"so their values cannot be converted"
        )
    config = _official_config(checkpoint)
    if to == "official":
        write_json(folder / "config.json", config.to_dict())
    else:
        raw = json.loads(read_text(source / "config.json"))
        raw.pop("quantization_config", None)
        write_json(folder / "config.json", raw | {"expert_dtype": config.expert_dtype})
        config = dataclasses.replace(config, quantization_config=None)
    write_weights(
        folder,
        list(stored_weights(config)),
        # What is quantised fits into bfloat16; what is not may be finer than that.
        checkpoint.on_demand(torch.float32 if to == "official" else torch.bfloat16),
        max_shard_bytes=max_shard_bytes,
        rename=hf_name if to == "huggingface" else str,
        progress=progress,
    )


def _is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether all matrices that the releases quantise are quantised, each by itself."""
    quantisable = {w.name for w in stored_weights(_official_config(checkpoint)) if w.storage in ("fp8", "fp4")}
    return all(item.scale is not None for item in checkpoint.items if item.weight.name in quantisable) and all(
        item.part is None for item in checkpoint.items
    )


def _expert_dtype(checkpoint: Checkpoint) -> str | None:
    """How the routed experts are stored, whatever the config says; None for floats."""
    for item in checkpoint.items:
        if ".ffn.experts." in item.weight.name:
            return _EXPERT_DTYPE.get(item.stored.spec.dtype)
    return None


def _official_config(checkpoint: Checkpoint) -> ModelConfig:
    config = checkpoint.config
    return dataclasses.replace(
        config,
        torch_dtype="bfloat16",
        expert_dtype=_expert_dtype(checkpoint) or config.expert_dtype,
        quantization_config=config.quantization_config or Quantization(),
    )


def _huggingface_config(checkpoint: Checkpoint) -> str:
    """The text of config.json, with the `expert_dtype` of the files where it says otherwise.

    transformers takes FP8 experts for granted, and the first releases hold FP4 without saying so.
    """
    text = read_text(checkpoint.path / "config.json")
    raw: dict[str, Any] = json.loads(text)
    experts = _expert_dtype(checkpoint)
    if experts in (None, raw.get("expert_dtype", "fp8")):
        return text
    return json.dumps(raw | {"expert_dtype": experts}, indent=2) + "\n"


def _check_names(source: Path, files: Collection[str]) -> None:
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{source}: the index names a file in another folder: {file}")


def _copy_others(source: Path, folder: Path, weights: Collection[str]) -> None:
    """Copy what is neither weights nor written already; links are followed, hidden folders left."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if not path.name.startswith("."):
                shutil.copytree(path, folder / path.name, ignore=_hidden_folders)
        elif path.name not in (*weights, "config.json", INDEX_NAME, RECORD_NAME) and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def _hidden_folders(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".") and (Path(folder) / name).is_dir()]
