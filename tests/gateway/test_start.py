"""How a server starts and ends, and what it says of itself meanwhile."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.engine import core_of, wait_for
from support.gateway import LONG, MODEL, SHORT, Gateway, serving, small_engine
from weft.gateway.http import health, state
from weft.runtime.engine.front import Engine
from weft.runtime.errors import ConfigError, EngineDead


def test_it_answers_while_it_loads() -> None:
    may_load = threading.Event()

    def slow() -> Engine:
        assert may_load.wait(30)
        return small_engine()

    with serving(slow, wait=False) as gateway, gateway.http() as client:
        assert client.get("/health").json()["stage"] == "loading"
        assert client.get("/ready").status_code == 503
        refused = client.post("/generate", json=SHORT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert client.get("/openapi.json").status_code == client.get("/metrics").status_code == 200
        may_load.set()
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.post("/generate", json=SHORT).status_code == 200
        assert client.get("/health_generate").status_code == 200


def test_a_model_that_cannot_be_loaded() -> None:
    def broken() -> Engine:
        raise ConfigError("model", "x", "is none")

    with serving(broken, wait=False) as gateway, gateway.http() as client:
        wait_for(lambda: client.get("/health").status_code == 503)
        with pytest.raises(ConfigError):
            gateway.call(gateway.server.ready())


def test_metrics(small: Gateway) -> None:
    with small.http() as client:
        client.post("/generate", json=SHORT)
        client.post("/generate", json={**SHORT, "sampling_params": {"temperature": -1}})
        text = client.get("/metrics").text
    for name in ("sglang:num_running_reqs", "sglang:token_usage", "vllm:num_requests_waiting", "weft_ready 1.0"):
        assert name in text
    assert 'weft_requests_total{route="/generate",status="200"} 1.0' in text
    assert 'weft_requests_total{route="/generate",status="400"} 1.0' in text
    assert "sglang:generation_tokens_total 1.0" in text


def test_a_draining_server_ends_what_it_began() -> None:
    with serving(small_engine) as gateway:
        body = {"text": "x", "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(gateway.post("/generate", body)))
        thread.start()
        wait_for(lambda: bool(core_of(gateway.engine).calls))
        stop = asyncio.run_coroutine_threadsafe(gateway.server.stop(), gateway.loop)
        wait_for(lambda: gateway.state.gate.closed)
        with gateway.http() as client:
            assert client.get("/ready").status_code == 503
            refused = client.post("/generate", json=SHORT)
            assert refused.status_code == 503 and refused.json()["error"]["type"] == "draining"
        stop.result(30)
        thread.join()
        assert answers[0].status_code == 200 and len(answers[0].json()["output_ids"]) == 300


def test_the_command(tmp_path: Path) -> None:
    """In a process of its own, with the engine in another: keys, a request, SIGTERM."""
    code = "import sys; from weft.gateway.cli import main; sys.exit(main())"
    made = subprocess.run([sys.executable, "-c", code, "key", "alice"], capture_output=True, text=True, check=True)
    (tmp_path / "keys").write_text(made.stdout)
    key = made.stderr.split()[-1]
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--api-keys", str(tmp_path / "keys")]
    command += [
        "--programs",
        "weft.programs.fork_and_judge",
        "weft.programs.extraction:extraction",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            url = line.split()[3].rstrip(",")
            assert url.startswith("http://127.0.0.1:")
            with httpx2.Client(base_url=url, timeout=60, headers={"x-api-key": key}) as client:
                # Its weights are not read yet, by a process that has hardly begun: nothing is let in to wait.
                refused = client.post("/generate", json=SHORT)
                assert refused.status_code == 503 and refused.json()["error"]["type"] == "loading"
                assert "weft_ready 0.0" in client.get("/metrics").text
                began = time.monotonic()
                while client.get("/ready").status_code != 200 and time.monotonic() - began < 60:
                    time.sleep(0.1)
                asked = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": "What is 2 + 3?"}],
                    "temperature": 0,
                }
                assert (
                    client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
                    == "5"
                )
                names = {own["name"] for own in client.get("/v1/programs").json()["data"]}
                assert names == {"fork_and_judge", "extraction"}
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(30) == 0 and "ready" in rest and "draining" in rest, rest
        finally:
            process.kill()


def test_a_server_that_is_stopped_while_it_loads() -> None:
    """Its engine, which comes later, is closed."""
    may_load, made = threading.Event(), []

    def slow() -> Engine:
        assert may_load.wait(30)
        made.append(small_engine())
        return made[0]

    with serving(slow, wait=False) as gateway:
        gateway.call(gateway.server.stop())
        may_load.set()
    wait_for(lambda: bool(made) and made[0]._closed)


def test_a_second_signal_ends_what_is_under_way() -> None:
    with serving(small_engine, drain=1000.0) as gateway:
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(gateway.post("/generate", LONG))
            except httpx2.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: bool(core_of(gateway.engine).calls))
        stop = asyncio.run_coroutine_threadsafe(gateway.server.stop(), gateway.loop)
        wait_for(lambda: gateway.state.gate.closed)
        gateway.server._hurried = True
        stop.result(30)
        thread.join(30)
        assert isinstance(answers[0], httpx2.HTTPError)


def test_figures_do_not_wait_for_an_engine_that_is_silent(small: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while its core is replaced; that it is dead is /health's to say."""

    async def silent() -> None:
        await asyncio.sleep(60)

    async def dead() -> None:
        raise EngineDead("gone")

    monkeypatch.setattr(state, "_PATIENCE", 0.05)
    with small.http() as client:
        for stats in (silent, dead):
            monkeypatch.setattr(small.engine, "stats", stats)
            assert client.get("/metrics").status_code == 200
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(small.engine, "_death", EngineDead("gone for good"))
        assert client.get("/health").json() == {"status": "failed", "stage": "ready", "progress": "EngineDead"}
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        monkeypatch.undo()


def test_health_generate_says_when_the_engine_is_too_busy(small: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PATIENCE", 1e-6)
    with small.http() as client:
        answer = client.get("/health_generate")
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
