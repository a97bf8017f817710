"""Asked for anything, the gateway never fails, and says nothing that its OpenAPI document does not."""

from __future__ import annotations

import json
import os
import re
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
# Requests of so many fields are hardly ever right by chance: most are given what they need, and some of the fields
# that were made up.
SAID: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
RIGHT: dict[str, dict[str, Any]] = {
    "/generate": {"text": "x", "input_ids": None, "sampling_params": {"max_new_tokens": 4}},
    "/v1/chat/completions": SAID,
    "/v1/completions": {"model": MODEL, "prompt": "x", "max_tokens": 4},
    "/v1/messages": SAID,
    "/v1/messages/count_tokens": SAID,
    "/v1/programs/{name}/runs": {"arguments": {"question": "x"}},
    "/v1/programs/{name}:explain": {"arguments": {"question": "x"}},
    "/v1/responses": {"model": MODEL, "input": "x", "max_output_tokens": 4},
    "/v1/runs": {"program": {"steps": [{"do": "gen", "name": "x", "max_tokens": 4}]}},
    "/v1/runs:explain": {"program": {"steps": [{"do": "gen", "name": "x", "max_tokens": 4}]}},
}
HOOKS = f"""
import zlib
import schemathesis

RIGHT = {RIGHT!r}

@schemathesis.hook
def map_body(context, body):
    right = RIGHT.get(context.operation.path)
    if right is None or not isinstance(body, dict):
        return body
    dice = zlib.crc32(repr(body).encode(errors="replace"))
    if dice % 4 == 0:
        return body
    others = [name for name in body if name not in right]
    return {{**right, **{{name: body[name] for name in others[: max(0, dice // 4 % 4 - 1)]}}}}
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
    (folder / "weft_hooks.py").write_text(HOOKS)
    command = [str(Path(sys.executable).parent / "st"), "run", f"{gateway.url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "examples,fuzzing", "--max-time", str(seconds), "--max-examples", "1000000"]
    command += ["--mode", "all", "--request-timeout", "20", "--workers", "2", "--no-color"]
    command += ["--suppress-health-check", "all"]
    home = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(folder), "SCHEMATHESIS_HOOKS": "weft_hooks"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 240, cwd=folder, env=home)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout[done.stdout.index("= SUMMARY =") :])
    with gateway.http() as client:
        told = re.findall(r'weft_requests_total{route="(.*)",status="(\d+)"} (\d+)', client.get("/metrics").text)
    print(*(f"{count} x {status} {route}" for route, status, count in told), sep="\n")
    good = {route.replace(":[^/:]+}", "}") for route, status, _ in told if status == "200"}
    assert good >= RIGHT.keys(), "what is asked has to be served, too"
    assert {status for _, status, _ in told} <= {"200", "400", "401", "403", "404", "409", "413", "415", "429"}


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
