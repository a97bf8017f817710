"""Give the tensors of a checkpoint other names, without touching a byte of their data.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name ->
dtype, shape, place) and the data. Only names are changed, so a renamed file keeps order, places and
data, and the original is had back by putting its header in front again. `Record` is what a renamed
checkpoint carries for that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.runtime.checkpoint.headers import INDEX_NAME
from weft.runtime.checkpoint.reader import Progress
from weft.runtime.errors import CheckpointError

RECORD_NAME = "weft_official.json"

Rename = Callable[[str], str]

_METADATA = "__metadata__"
_VERSION = 1
_CHUNK = 1 << 20
_ALIGN = 8  # the header is padded so that the data begins at a multiple of this


@dataclass(frozen=True)
class Record:
    """The texts of an official checkpoint that its renamed copy does not keep."""

    config: str
    index: str | None
    headers: dict[str, str]  # file -> header, with its padding
    version: int = _VERSION

    @classmethod
    def of(cls, folder: Path, files: Sequence[str]) -> Record:
        index = folder / INDEX_NAME
        return cls(
            read_text(folder / "config.json"),
            read_text(index) if index.exists() else None,
            {file: read_header_text(folder / file) for file in files},
        )

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record in `folder`, None without one; `CheckpointError` for one that is damaged."""
        path = folder / RECORD_NAME
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_bytes())
            record = cls(**raw)
            texts = [record.config, record.index or "", *record.headers.values()]
            if record.version != _VERSION or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"version {record.version}")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a record of weft convert ({error!r})") from error
        return record

    def save(self, folder: Path) -> None:
        (folder / RECORD_NAME).write_bytes(json.dumps(asdict(self)).encode())

    def check(self, folder: Path, rename: Rename) -> None:
        """`CheckpointError` unless `folder` holds the same tensors at the same places.

        `rename` is applied to both sides and has to bring their names together.
        """
        for file, text in self.headers.items():
            official = _parse(text, folder / RECORD_NAME)
            found = _parse(read_header_text(folder / file), folder / file)
            if _renamed(found, rename) != _renamed(official, rename):
                raise CheckpointError(
                    f"{folder / file}: not the file that {RECORD_NAME} describes; without that record "
                    f"the folder is converted like any other"
                )

    def restore(self, folder: Path, target: Path, progress: Progress | None) -> None:
        """Write the official files to `target` from the renamed ones in `folder`."""
        (target / "config.json").write_bytes(self.config.encode())
        if self.index is not None:
            (target / INDEX_NAME).write_bytes(self.index.encode())
        _copy_files(folder, target, self.headers, progress)


def relabel(
    folder: Path,
    target: Path,
    files: Sequence[str],
    rename: Rename,
    progress: Progress | None = None,
) -> None:
    """Write `files` of `folder` and their index to `target`, every tensor under its new name."""
    headers: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        header = _renamed(_parse(read_header_text(folder / file), folder / file), rename)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        headers[file] = text + " " * (-len(text.encode()) % _ALIGN)
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != _METADATA}
        weight_map |= dict.fromkeys(places, file)
        total += sum(end - begin for begin, end in places.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_files(folder, target, headers, progress)


def read_text(path: Path) -> str:
    """The text exactly as it is, line ends included; `CheckpointError` if it is not UTF-8."""
    return _decode(path.read_bytes(), path)


def read_header_text(path: Path) -> str:
    """The header of a safetensors file that was opened without complaint before."""
    with path.open("rb") as file:
        return _decode(file.read(int.from_bytes(file.read(8), "little")), path)


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error


def _parse(header: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(header)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors header: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: not a safetensors header")
    return parsed


def _renamed(header: dict[str, Any], rename: Rename) -> dict[str, Any]:
    return {name if name == _METADATA else rename(name): entry for name, entry in header.items()}


def _copy_files(folder: Path, target: Path, headers: dict[str, str], progress: Progress | None) -> None:
    total = sum((folder / file).stat().st_size for file in headers)
    done = 0
    for file, text in headers.items():
        header = text.encode()
        with (folder / file).open("rb") as source, (target / file).open("wb") as copy:
            copy.write(len(header).to_bytes(8, "little") + header)
            source.seek(8 + int.from_bytes(source.read(8), "little"))
            shutil.copyfileobj(source, copy, _CHUNK)
        done += (folder / file).stat().st_size
        if progress is not None:
            progress(done, total, file)
