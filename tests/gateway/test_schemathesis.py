"""Asked for anything, the gateway never fails, and says nothing that its OpenAPI document does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from support.engine import byte_tokenizer, small_model
from support.gateway import MODEL, Gateway, serving
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


# So that what is asked reaches a program, and not only the search for one.
CONFIG = """
[parameters]
"path.name" = "ask"
"path.model" = "deepseek-v4"
"""


@pytest.fixture
def short() -> Iterator[Gateway]:
    """Its model draws to the end of a short context at once; any name is its."""
    programs = ["support.served"]
    with serving(open_engine, programs=programs, names=[MODEL, "*"], keepalive=5.0) as made:
        yield made


def open_engine() -> Engine:
    pools = PoolSizes(tokens=8192, slots=32, context=192, burst=512)
    return Engine(small_model(), byte_tokenizer(), EngineConfig(pools=pools))


def fuzz(gateway: Gateway, folder: Path, seconds: int) -> None:
    (folder / "schemathesis.toml").write_text(CONFIG)
    command = [str(Path(sys.executable).parent / "st"), "run", f"{gateway.url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "examples,fuzzing", "--max-time", str(seconds), "--max-examples", "1000000"]
    command += ["--mode", "all", "--request-timeout", "20", "--workers", "2", "--no-color"]
    command += ["--suppress-health-check", "all"]
    home = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 240, cwd=folder, env=home)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_for_half_a_minute(short: Gateway, tmp_path: Path) -> None:
    fuzz(short, tmp_path, 30)


@pytest.mark.slow
def test_for_ten_minutes(short: Gateway, tmp_path: Path) -> None:
    fuzz(short, tmp_path, 600)


def document(gateway: Gateway) -> dict[str, Any]:
    with gateway.http() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_the_document_has_every_route_and_resolves(gateway: Gateway) -> None:
    made = document(gateway)
    assert made["openapi"] == "3.1.0"
    text = json.dumps(made)
    for name in set(part.split('"')[0] for part in text.split("#/components/schemas/")[1:]):
        assert name in made["components"]["schemas"], name
    for schema in made["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert {route.path.replace(":[^/:]+}", "}") for route in gateway.state.routes} == set(made["paths"])


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing", "/v1/messages/nothing"])
def test_what_is_not_there(gateway: Gateway, path: str) -> None:
    with gateway.http() as client:
        answer = client.get(path)
        assert answer.status_code == 404 and "error" in answer.json()
        wrong = client.put("/v1/chat/completions", json={})
        assert wrong.status_code == 405 and "POST" in wrong.headers["allow"] and "error" in wrong.json()
