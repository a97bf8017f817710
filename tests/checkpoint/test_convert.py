"""The official layout and back, byte for byte; all or nothing; what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weft.runtime.checkpoint.convert import convert
from weft.runtime.checkpoint.dummy import write_dummy_checkpoint
from weft.runtime.checkpoint.headers import INDEX_NAME, read_headers
from weft.runtime.checkpoint.hf_names import hf_name, official_name
from weft.runtime.checkpoint.layout import tensor_specs
from weft.runtime.checkpoint.reader import Checkpoint, load_weights
from weft.runtime.checkpoint.relabel import RECORD_NAME
from weft.runtime.config import ModelConfig
from weft.runtime.errors import CheckpointError, ConfigError, RequestError, WeftError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def there_and_back(folder: Path) -> Path:
    """The Hugging Face copy of `folder`, after a check that it gives `folder` again."""
    hf = folder.with_name("hf")
    before = tree(folder)
    convert(folder, hf, "huggingface")
    convert(hf, folder.with_name("back"), "official")
    assert tree(folder) == before
    assert tree(folder.with_name("back")) == before
    return hf


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_weights(a, torch.float32), load_weights(b, torch.float32)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [100_000, 5 << 30])
@pytest.mark.parametrize("variant", ["fp4", "fp8", "plain", "no mtp", "refresh"])
def test_round_trip(
    tmp_path: Path,
    config: ModelConfig,
    plain: ModelConfig,
    refresh: ModelConfig,
    variant: str,
    shard_bytes: int,
) -> None:
    chosen = {
        "fp4": config,
        "fp8": dataclasses.replace(config, expert_dtype="fp8"),
        "plain": plain,
        "no mtp": dataclasses.replace(config, num_nextn_predict_layers=0),
        "refresh": refresh,
    }[variant]
    write_dummy_checkpoint(tmp_path / "m", chosen, 3, tokenizer_json="{}", max_shard_bytes=shard_bytes)
    hf = there_and_back(tmp_path / "m")
    assert Checkpoint.open(hf).layout == "huggingface"
    assert same_weights(hf, tmp_path / "m")


@pytest.mark.parametrize("seed", range(4))
def test_round_trip_of_foreign_files(folder: Path, scatter: Callable[..., None], seed: int) -> None:
    """Scales in other files than their matrices, and texts no writer of ours makes."""
    scatter(folder, seed, prefix="model." if seed == 3 else "")
    hf = there_and_back(folder)
    assert same_weights(hf, folder)
    files = {official_name(s.spec.name): s.file for s in read_headers(folder).tensors}
    assert any(files[name] != files[f"{name[:-5]}weight"] for name in files if name.endswith(".scale"))
    for path in hf.glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so is where the data begins
        with safe_open(path, framework="np") as shard:
            assert shard.metadata() == {"by": "ö", "format": "pt"}


def test_round_trip_of_one_file_without_index(tmp_path: Path, config: ModelConfig) -> None:
    write_dummy_checkpoint(tmp_path / "m", config, 1)
    (tmp_path / "m" / INDEX_NAME).unlink()
    hf = there_and_back(tmp_path / "m")
    assert (hf / INDEX_NAME).exists()  # transformers looks for model.safetensors or an index


def test_other_files_go_along(folder: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", ".gitattributes", "inference/model.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\xff\r\n" + name.encode())
    hf = there_and_back(folder)
    assert tree(hf)["inference/model.py"] == b"\xff\r\ninference/model.py"
    # Not part of a checkpoint: what git and the hub keep for themselves, and weights beside the index.
    (folder / ".git").mkdir()
    (folder / ".git/pack").write_text("")
    (folder / "inference/.cache").mkdir()
    (folder / "stray.safetensors").write_text("")
    (folder / "link.txt").symlink_to(folder / "LICENSE")
    convert(folder, folder.with_name("again"), "huggingface")
    assert tree(folder.with_name("again")) == tree(hf) | {"link.txt": tree(hf)["LICENSE"]}
    assert not (folder.with_name("again") / "link.txt").is_symlink()
    assert not (folder.with_name("again") / "inference/.cache").exists()


def test_huggingface_files(folder: Path, config: ModelConfig) -> None:
    """The same shards with the same data, in other words."""
    hf = there_and_back(folder)
    official, renamed = read_headers(folder), read_headers(hf)
    assert {(s.file, hf_name(s.spec.name), s.spec.dtype, s.spec.shape) for s in official.tensors} == {
        (s.file, s.spec.name, s.spec.dtype, s.spec.shape) for s in renamed.tensors
    }
    names = {stored.spec.name for stored in renamed.tensors}
    assert {
        "lm_head.weight",
        "model.layers.1.self_attn.compressor.indexer.q_b_proj.weight_scale_inv",
        "model.layers.1.mlp.experts.3.w2.weight_scale_inv",
        "model.layers.0.attn_hc.scale",
        "mtp.0.attn.wq_a.scale",
    } <= names
    assert {official_name(name) for name in names} == {spec.name for spec in tensor_specs(config)}
    index = json.loads((hf / INDEX_NAME).read_text())
    assert index["weight_map"] == {stored.spec.name: stored.file for stored in renamed.tensors}
    assert index["metadata"] == json.loads((folder / INDEX_NAME).read_text())["metadata"]
    assert (hf / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("stored", "said", "told"), [("fp4", None, "fp4"), ("fp8", "fp4", "fp8"), ("fp8", None, None)]
)
def test_experts_are_described_as_they_are(
    tmp_path: Path, config: ModelConfig, stored: str, said: str | None, told: str | None
) -> None:
    """transformers takes FP8 for granted; the first releases keep FP4 without a word in the config."""
    write_dummy_checkpoint(tmp_path / "m", dataclasses.replace(config, expert_dtype=stored), 1)
    raw = json.loads((tmp_path / "m/config.json").read_text())
    del raw["expert_dtype"]
    (tmp_path / "m/config.json").write_text(json.dumps(raw | ({"expert_dtype": said} if said else {})))
    hf = there_and_back(tmp_path / "m")
    assert json.loads((hf / "config.json").read_text()).get("expert_dtype") == told


# -- Hugging Face files from elsewhere -------------------------------------------------------------


def test_quantised_files_keep_their_codes(folder: Path, config: ModelConfig) -> None:
    hf = there_and_back(folder)
    (hf / RECORD_NAME).unlink()
    shard = sorted(hf.glob("*.safetensors"))[0]  # with scales of a kind that E8M0 cannot hold
    tensors = {k: v.float() * 1.1 if k.endswith("_scale_inv") else v for k, v in load_file(shard).items()}
    save_file(tensors, shard)
    convert(hf, folder.with_name("m"), "official")
    assert Checkpoint.open(folder.with_name("m")).layout == "official"
    assert ModelConfig.load(folder.with_name("m")) == config
    assert same_weights(hf, folder.with_name("m"))
    assert not same_weights(folder, folder.with_name("m"))


def test_prefixed_names_become_official(folder: Path, scatter: Callable[..., None]) -> None:
    scatter(folder, 5, prefix="model.")
    assert Checkpoint.open(folder).layout == "prefixed"
    convert(folder, folder.with_name("m"), "official")
    assert Checkpoint.open(folder.with_name("m")).layout == "official"
    assert same_weights(folder, folder.with_name("m"))


# -- all or nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["huggingface", "dequantise", "official", "quantise"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_an_interrupted_conversion(folder: Path, way: str, error: Any) -> None:
    work = folder.parent
    if way in ("official", "quantise"):
        convert(folder, work / "hf", "huggingface", dequantise=way == "quantise")
        shutil.rmtree(folder)
        (work / "hf").rename(folder)
    before = tree(work)

    def stop(done: int, total: int, file: str) -> None:
        assert 0 < done < total
        raise error

    to, expected = ("huggingface", "official")[way in ("official", "quantise")], error
    if isinstance(error, OSError):
        expected = CheckpointError
    with pytest.raises(expected):
        convert(folder, work / "deep/m", to, dequantise=way == "dequantise", progress=stop, max_shard_bytes=10**5)  # type: ignore[arg-type]
    assert tree(work) == before
    assert list((work / "deep").iterdir()) == []


def test_progress(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    for to, source in (("huggingface", folder), ("official", folder.with_name("huggingface"))):
        calls.clear()
        convert(source, folder.with_name(to), to, progress=lambda *call: calls.append(call))  # type: ignore[arg-type]
        assert [file for _, _, file in calls] == sorted(p.name for p in folder.glob("*.safetensors"))
        assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
        total = sum(p.stat().st_size for p in source.glob("*.safetensors"))
        assert calls[-1][0] == total and {total for _, total, _ in calls} == {total}
    calls.clear()
    convert(
        folder,
        folder.with_name("plain"),
        "huggingface",
        dequantise=True,
        progress=lambda *call: calls.append(call),
        max_shard_bytes=10**6,
    )
    assert len(calls) > 1 and calls[-1][0] == calls[-1][1]


def test_renaming_holds_no_file_in_memory(tmp_path: Path, plain: ModelConfig) -> None:
    write_dummy_checkpoint(tmp_path / "m", dataclasses.replace(plain, vocab_size=30_000), 1)
    assert (tmp_path / "m/model-00001-of-00001.safetensors").stat().st_size > 15e6
    tracemalloc.start()
    try:
        convert(tmp_path / "m", tmp_path / "hf", "huggingface")
        convert(tmp_path / "hf", tmp_path / "back", "official")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


# -- what is refused -------------------------------------------------------------------------------


def refusal(kind: type[WeftError], *args: Any, **options: Any) -> str:
    before = tree(Path(args[0]).parent)
    with pytest.raises(kind) as caught:
        convert(*args, **options)
    assert tree(Path(args[0]).parent) == before
    return str(caught.value)


def test_wrong_arguments(folder: Path) -> None:
    target = folder.with_name("m")
    assert "must be one of official, huggingface" in refusal(RequestError, folder, target, "gguf")
    assert "is in the official layout already" in refusal(CheckpointError, folder, target, "official")
    assert "dequantise" in refusal(RequestError, folder, target, "official", dequantise=True)
    hf = there_and_back(folder)
    assert "is in the huggingface layout already" in refusal(CheckpointError, hf, target, "huggingface")
    assert "file not found" in refusal(ConfigError, folder.with_name("none"), target, "huggingface")


def test_target_has_to_be_new(folder: Path) -> None:
    for target in (folder, folder / "inside", folder / "../model/inside"):
        assert "lies inside" in refusal(CheckpointError, folder, target, "huggingface")
    full = folder.with_name("full")
    full.mkdir()
    (full / "precious").write_text("")
    assert "not an empty folder" in refusal(CheckpointError, folder, full, "huggingface")
    assert "not an empty folder" in refusal(CheckpointError, folder, full / "precious", "huggingface")
    assert "not an empty folder" in refusal(CheckpointError, folder, folder.parent, "huggingface")
    (full / "precious").unlink()
    convert(folder, full, "huggingface")


def test_incomplete_source(folder: Path) -> None:
    hf = there_and_back(folder)
    target = folder.with_name("m")
    last = sorted(folder.glob("*.safetensors"))[-1].name
    for source, to in ((folder, "huggingface"), (hf, "official")):
        data = (source / last).read_bytes()
        (source / last).write_bytes(data[:-1])
        assert last in refusal(CheckpointError, source, target, to)
        (source / last).unlink()
        assert last in refusal(CheckpointError, source, target, to)
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    (folder / INDEX_NAME).unlink()
    save_file(tensors, folder / "all.safetensors")
    for file in folder.glob("model-*"):
        file.unlink()
    text = refusal(CheckpointError, folder, target, "huggingface")
    assert "missing" in text and "unexpected" not in text


@pytest.mark.parametrize("to", ["huggingface", "official", "official by record"])
def test_files_of_other_folders(folder: Path, to: str) -> None:
    source = folder if to == "huggingface" else there_and_back(folder)
    to, _, with_record = to.partition(" ")
    index = json.loads((source / INDEX_NAME).read_text())
    last = sorted(source.glob("*.safetensors"))[-1]
    last.rename(source.with_name("outside.safetensors"))
    places = {n: "../outside.safetensors" if f == last.name else f for n, f in index["weight_map"].items()}
    (source / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    if with_record:
        record = (source / RECORD_NAME).read_text()
        (source / RECORD_NAME).write_text(record.replace(f'"{last.name}": ', '"../outside.safetensors": '))
    else:
        (source / RECORD_NAME).unlink(missing_ok=True)
    assert "in another folder: ../outside.safetensors" in refusal(
        CheckpointError, source, folder.with_name("m"), to
    )


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"config": 1, "index": null, "headers": {}}', '{"headers": 3}']
)
def test_damaged_record(folder: Path, record: str) -> None:
    hf = there_and_back(folder)
    (hf / RECORD_NAME).write_text(record)
    assert "not a record" in refusal(CheckpointError, hf, folder.with_name("m"), "official")


def test_record_of_other_files(folder: Path) -> None:
    hf = there_and_back(folder)
    record = json.loads((hf / RECORD_NAME).read_text())
    target, first = folder.with_name("m"), sorted(record["headers"])[0]

    def told(headers: dict[str, str], **more: Any) -> str:
        (hf / RECORD_NAME).write_text(json.dumps(record | {"headers": headers} | more))
        return refusal(CheckpointError, hf, target, "official")

    assert "describes other files" in told({})
    assert "describes other files" in told(record["headers"] | {"../x": "{}"})
    assert "version 2" in told(record["headers"], version=2)
    for header in ("{", "[]"):
        assert "not a safetensors header" in told(record["headers"] | {first: header})
    swapped = record["headers"][first].replace("[64,128]", "[128,64]")
    assert swapped != record["headers"][first]
    assert "not the file that" in told(record["headers"] | {first: swapped})


@pytest.mark.parametrize(("encoding", "message"), [("latin-1", "not an index"), ("utf-16", "not UTF-8")])
def test_texts_have_to_be_utf8(folder: Path, encoding: str, message: str) -> None:
    text = (folder / INDEX_NAME).read_text().replace("{", '{"é": 0, ', 1)
    (folder / INDEX_NAME).write_bytes(text.encode(encoding))
    assert message in refusal(CheckpointError, folder, folder.with_name("m"), "huggingface")
