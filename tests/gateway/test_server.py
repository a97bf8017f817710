"""Who may call, how much, and how a server starts and ends."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.engine import byte_tokenizer, core_of, small_model, wait_for
from support.gateway import MODEL, Gateway, serving
from weft.gateway.http.config import Bounds, ServeConfig
from weft.gateway.http.keys import Keys, make_key
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine.config import EngineConfig
from weft.runtime.engine.front import Engine
from weft.runtime.errors import ConfigError

POOLS = PoolSizes(tokens=32768, slots=4, context=8192, burst=512)
LONG: dict[str, Any] = {"text": "x", "sampling_params": {"max_new_tokens": 6000, "ignore_eos": True}}
SHORT: dict[str, Any] = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


def engine() -> Engine:
    return Engine(small_model(), byte_tokenizer(), EngineConfig(pools=POOLS))


@pytest.fixture
def small() -> Iterator[Gateway]:
    with serving(engine) as made:
        yield made


def idle(gateway: Gateway) -> bool:
    core = core_of(gateway.engine)
    return not core.calls and not core.sequences and not gateway.state.gate.under_way


# -- keys -----------------------------------------------------------------------------------------------------


def test_a_public_address_needs_keys() -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(ConfigError, match="host"):
            ServeConfig(host=host)
        assert ServeConfig(host=host, keys=Keys(make_key("a", "user")[1])).host == host
    for host in ("127.0.0.1", "::1", "localhost"):
        assert ServeConfig(host=host).host == host


def test_a_key_is_kept_as_a_hash() -> None:
    key, line = make_key("alice", "user")
    assert key not in line
    keys = Keys(f"# the keys\n\n{line}\n")
    found = keys.find(key)
    assert found is not None and (found.key, found.role) == ("alice", "user")
    assert keys.find(key + "x") is None and keys.find("") is None
    for wrong in ("alice user", "alice root " + line.split()[2], f"{line}\n{line}", "a b c d"):
        with pytest.raises(ConfigError, match="api-keys"):
            Keys(wrong)
    with pytest.raises(ConfigError, match="name"):
        make_key("not a name", "user")


def test_keys_open_doors_of_their_own() -> None:
    (alice, one), (bob, two), (root, three) = (
        make_key("alice", "user"),
        make_key("bob", "user"),
        make_key("r", "admin"),
    )
    with serving(engine, keys=f"{one}\n{two}\n{three}") as gateway, gateway.http() as client:
        assert client.get("/health").status_code == 200
        refused = client.post("/generate", json=SHORT)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert client.post("/generate", json=SHORT, headers={"x-api-key": "weft-x"}).status_code == 401
        prompt = {"text": "a" * 300, "sampling_params": {"max_new_tokens": 1}}

        def cached(key: str, header: str = "bearer") -> int:
            headers = {"authorization": f"Bearer {key}"} if header == "bearer" else {"x-api-key": key}
            answer = client.post("/generate", json=prompt, headers=headers)
            assert answer.status_code == 200
            found: int = answer.json()["meta_info"]["cached_tokens"]
            return found

        # What one key has computed is not found, nor timed, by another.
        assert cached(alice) == 0 and cached(alice, "key") > 290
        assert cached(bob) == 0
        for key, status in ((alice, 403), (root, 200)):
            assert client.post("/flush_cache", headers={"x-api-key": key}).status_code == status
        made = client.post(
            "/v1/responses",
            json={"model": MODEL, "input": "x", "max_output_tokens": 2},
            headers={"x-api-key": alice},
        ).json()
        assert client.get(f"/v1/responses/{made['id']}", headers={"x-api-key": alice}).status_code == 200
        assert client.get(f"/v1/responses/{made['id']}", headers={"x-api-key": bob}).status_code == 404


# -- bodies ---------------------------------------------------------------------------------------------------


def test_bodies_are_bounded() -> None:
    with serving(engine, body=10_000, small=500) as gateway, gateway.http() as client:
        headers = {"content-type": "application/json"}
        assert client.post("/generate", content=b"[" * 10_001, headers=headers).status_code == 413
        parts = iter([b"["] * 3 + [b"x" * 10_000])
        assert client.post("/generate", content=parts, headers=headers).status_code == 413
        assert client.post("/abort_request", json={"rid": "x" * 600}).status_code == 413
        bomb = gzip.compress(b" " * 1_000_000)
        packed = {**headers, "content-encoding": "gzip"}
        assert client.post("/generate", content=bomb, headers=packed).status_code == 413
        fine = client.post("/generate", content=gzip.compress(json.dumps(SHORT).encode()), headers=packed)
        assert fine.status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"", {}, 415),
        (b"{", {}, 400),
        (b"\xff", {}, 400),
        (b'{"text": 5}', {}, 400),
        (b"[" * 5000, {}, 400),
        (b'{"text": "\\ud800"}', {}, 400),
        (b"null", {}, 400),
    ],
)
def test_wrong_bodies(small: Gateway, content: bytes, headers: dict[str, str], status: int) -> None:
    kind = {"content-type": "application/json"} if content else {}
    with small.http() as client:
        answer = client.post("/generate", content=content, headers={**kind, **headers})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


# -- room -----------------------------------------------------------------------------------------------------


def many(gateway: Gateway, count: int, body: dict[str, Any], **options: Any) -> list[httpx2.Response]:
    """So many at one time; options: of each request."""

    async def all_of_them() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(
            base_url=gateway.url, timeout=60, limits=httpx2.Limits(max_connections=None)
        ) as c:
            return list(await asyncio.gather(*(c.post("/generate", json=body, **options) for _ in range(count))))

    return asyncio.run(all_of_them())


def test_the_queue_is_bounded() -> None:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}
    with serving(engine, queue=6) as gateway:
        answers = many(gateway, 20, body)
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503} and statuses.count(200) >= 6
        for answer in answers:
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "overloaded"
        assert many(gateway, 1, body)[0].status_code == 200
        with gateway.http() as client:
            too_many = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [], "n": 100})
            assert too_many.status_code == 400


def test_no_key_takes_all_places() -> None:
    (alice, one), (bob, two) = make_key("alice", "user"), make_key("bob", "user")
    body = {"text": "x", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    with serving(engine, keys=f"{one}\n{two}", queue=8, share=0.5) as gateway:
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.extend(
                a.status_code for a in many(gateway, 8, body, headers={"x-api-key": alice})
            )
        )
        thread.start()
        wait_for(lambda: gateway.state.gate.under_way == 4)
        other = many(gateway, 1, SHORT, headers={"x-api-key": bob})[0]
        thread.join()
        assert sorted(statuses) == [200] * 4 + [429] * 4 and other.status_code == 200


# -- leaving --------------------------------------------------------------------------------------------------


def leave(gateway: Gateway, body: dict[str, Any], when: Callable[[], bool], path: str = "/generate") -> None:
    """Ask, wait, and hang up."""
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.server.port)) as connection:
        connection.sendall(head.encode() + raw)
        wait_for(when)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_ends_what_was_asked(small: Gateway, stream: bool) -> None:
    core = core_of(small.engine)
    drawing = lambda: any(getattr(call, "drawn_count", 0) > 2 for call in list(core.calls.values()))  # noqa: E731
    leave(small, {**LONG, "stream": stream}, drawing)
    wait_for(lambda: idle(small), seconds=5)
    core.pools.check()


def test_leaving_in_the_prefill_and_in_the_queue(small: Gateway) -> None:
    core = core_of(small.engine)
    prompt = {"input_ids": [5 + i % 200 for i in range(8000)], "sampling_params": {"max_new_tokens": 4}}
    leave(small, prompt, lambda: bool(core.calls))
    wait_for(lambda: idle(small), seconds=5)
    several = {**LONG, "sampling_params": {**LONG["sampling_params"], "n": 12}}
    leave(small, several, lambda: len(core.calls) == 12)  # of which four have slots
    wait_for(lambda: idle(small), seconds=5)
    core.pools.check()


def test_every_api_lets_go(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    endless = {"ignore_eos": True, "min_tokens": 3000}
    core = core_of(gateway.engine)
    busy = lambda: bool(core.calls)  # noqa: E731
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": messages, "stream": True, "max_tokens": 4000, **endless}),
        ("/v1/chat/completions", {"messages": messages, "n": 3, "max_tokens": 4000, **endless}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4000, **endless}),
        ("/v1/programs/endless/runs", {"stream": True}),
        ("/v1/programs/endless/runs", {}),
    ]
    for path, body in asked:
        leave(gateway, {"model": MODEL, **body}, busy, path)
        wait_for(lambda: not core.calls, seconds=5)


def test_abort(small: Gateway) -> None:
    answers: list[httpx2.Response] = []
    with small.http() as client:
        thread = threading.Thread(target=lambda: answers.append(small.post("/generate", {**LONG, "rid": "r"})))
        thread.start()
        wait_for(lambda: bool(core_of(small.engine).calls))
        assert client.post("/abort_request", json={"rid": "r"}).status_code == 200
        thread.join()
        assert answers[0].status_code == 409
        wait_for(lambda: idle(small), seconds=5)
        assert client.post("/abort_request", json={}).status_code == 400


# -- streams --------------------------------------------------------------------------------------------------


def test_a_silent_stream_shows_life() -> None:
    with serving(engine, keepalive=0.05) as gateway, gateway.http() as client:
        slow = {"input_ids": [5 + i % 200 for i in range(8000)], "stream": True}
        slow["sampling_params"] = {"max_new_tokens": 2}
        with client.stream("POST", "/generate", json=slow) as answer:
            raw = b"".join(answer.iter_bytes())
        assert raw.startswith(b": keepalive\n\n") and raw.endswith(b"data: [DONE]\n\n")


def test_an_error_before_the_first_event_has_a_status(small: Gateway) -> None:
    wrong = {"text": "x", "stream": True, "sampling_params": {"regex": "a(?=b)", "max_new_tokens": 4}}
    with small.http() as client:
        answer = client.post("/generate", json=wrong)
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "regex"


def test_a_death_of_the_core_is_not_seen(small: Gateway) -> None:
    """What was under way is drawn again, to the same tokens."""
    body = {"text": "x", "sampling_params": {"max_new_tokens": 300, "ignore_eos": True, "sampling_seed": 3}}
    with small.http() as client:
        expected = client.post("/generate", json=body).json()["text"]
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(small.post("/generate", body).json()["text"]))
        thread.start()
        core = core_of(small.engine)
        wait_for(lambda: any(getattr(call, "drawn_count", 0) > 20 for call in list(core.calls.values())))
        core.step = None  # type: ignore[assignment,method-assign]
        thread.join()
        assert found == [expected]


# -- start and end --------------------------------------------------------------------------------------------


def test_it_answers_while_it_loads() -> None:
    may_load = threading.Event()

    def slow() -> Engine:
        assert may_load.wait(30)
        return engine()

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
    with serving(engine) as gateway:
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
    command += ["--programs", "weft.programs.fork_and_judge", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            url = line.split()[3].rstrip(",")
            assert url.startswith("http://127.0.0.1:")
            with httpx2.Client(base_url=url, timeout=60, headers={"x-api-key": key}) as client:
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
                assert client.get("/v1/programs").json()["data"][0]["name"] == "fork_and_judge"
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(30) == 0 and "ready" in rest and "draining" in rest, rest
        finally:
            process.kill()


def test_wrong_bounds() -> None:
    for field, value in (("queue", 0), ("share", 2.0), ("body", -1), ("drain", -1.0)):
        with pytest.raises(ConfigError, match=field):
            Bounds(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="port"):
        ServeConfig(port=70000)
