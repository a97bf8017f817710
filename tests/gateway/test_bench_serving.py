"""sglang's own load generator against a gateway: every request succeeds, and what is cached is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.gateway import Gateway
from support.programs import NEWEST
from weft.runtime.engine.front import EMBEDDED

# What other parts of sglang and its other data sets import, which are not used here and would need a GPU stack.
_BOOT = """
import sys, types
from unittest.mock import MagicMock
from transformers import AutoProcessor, AutoTokenizer  # before PIL seems to be there
sys.path.insert(0, {newest!r})
for name in ("utils", "utils.hf_transformers_patches", "disaggregation", "disaggregation.utils"):
    sys.modules["sglang.srt." + name] = types.ModuleType("sglang.srt." + name)
for name in ("PIL", "PIL.Image", "datasets", "zmq", "zmq.auth", "zmq.auth.thread"):
    sys.modules[name] = MagicMock()
sys.modules["sglang.srt.utils"].__path__ = [{newest!r} + "/sglang/srt/utils"]
sys.modules["sglang.srt.utils.hf_transformers_patches"].apply_all = lambda: None
sys.modules["sglang.srt.disaggregation.utils"].FAKE_BOOTSTRAP_HOST = "2.2.2.2"
import sglang
assert {newest!r}.endswith("sglang-" + sglang.__version__), sglang.__version__
from sglang.benchmark.serving import cli_main
cli_main()
"""
GROUPS, PROMPTS = 2, 3


def bench(gateway: Gateway, folder: Path, backend: str, *options: str) -> dict[str, Any]:
    if not (NEWEST / "sglang" / "benchmark").is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no {NEWEST}")
        pytest.skip(f"no {NEWEST}; `make test` makes it")
    command = [sys.executable, "-c", _BOOT.format(newest=str(NEWEST)), "--backend", backend]
    command += ["--host", "127.0.0.1", "--port", gateway.url.rpartition(":")[2]]
    command += ["--dataset-name", "generated-shared-prefix", "--tokenizer", str(EMBEDDED), "--disable-tqdm"]
    command += ["--gsp-num-groups", str(GROUPS), "--gsp-prompts-per-group", str(PROMPTS)]
    command += ["--gsp-system-prompt-len", "96", "--gsp-question-len", "12", "--gsp-output-len", "6"]
    command += [
        "--num-prompts",
        str(GROUPS * PROMPTS),
        "--cache-report",
        "--output-details",
        "--output-file",
        str(folder / "out"),
    ]
    home = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, cwd=folder, env=home)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out").read_text().splitlines()[-1])
    return found


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
def test_shared_prefixes(gateway: Gateway, tmp_path: Path, backend: str) -> None:
    found = bench(gateway, tmp_path, backend)
    assert found["completed"] == GROUPS * PROMPTS
    assert sum(found["cached_tokens"]) > 0


def test_several_turns(gateway: Gateway, tmp_path: Path) -> None:
    found = bench(gateway, tmp_path, "sglang-oai-chat", "--gsp-num-turns", "3", "--max-concurrency", "2")
    assert found["completed"] == 3 * GROUPS * PROMPTS
    # All turns but the first of each conversation go on from what is known.
    assert sum(map(bool, found["cached_tokens"])) >= 2 * GROUPS * PROMPTS
