"""Clients that leave, streams that are silent, cores that die."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from support.engine import core_of, wait_for
from support.gateway import LONG, MODEL, Gateway, serving, small_engine
from weft.runtime.engine import messages as m


def idle(gateway: Gateway) -> bool:
    core = core_of(gateway.engine)
    return not core.calls and not core.sequences and not gateway.state.gate.under_way


def leave(gateway: Gateway, body: dict[str, Any], when: Callable[[], bool], path: str = "/generate") -> None:
    """Ask, wait, and hang up."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(raw)}\r\n\r\n"
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


@pytest.mark.parametrize("where", ["queue", "prefill", "drawing"])
def test_what_is_left_ends_within_a_step(small: Gateway, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """From the moment that the gateway knows: no step but the one under way is made with it."""
    core, engine = core_of(small.engine), small.engine
    log: list[str] = []
    post, step = engine.post, core.step

    def posted(message: m.Request) -> None:
        if isinstance(message, m.Cancel):
            log.append("left")
        post(message)

    def stepped() -> None:
        log.append("step")
        step()
        log.append("busy" if core.calls else "idle")

    monkeypatch.setattr(engine, "post", posted)
    monkeypatch.setattr(core, "step", stepped)
    bodies: dict[str, tuple[dict[str, Any], Callable[[], bool]]] = {
        "queue": ({**LONG, "text": ["x"] * 9}, lambda: len(core.calls) == 9),
        "prefill": ({"input_ids": [5 + i % 200 for i in range(8000)]}, lambda: "step" in log),
        "drawing": (LONG, lambda: any(getattr(c, "drawn_count", 0) > 2 for c in list(core.calls.values()))),
    }
    leave(small, *bodies[where])
    wait_for(lambda: idle(small))
    # All calls of the request are told in one go; a step may be under way, and one more tells that they ended.
    after = log[len(log) - log[::-1].index("left") :]
    assert after.count("busy") <= 1 and after.count("step") <= 2, after
    assert log.count("left") == (9 if where == "queue" else 1)


def test_every_api_lets_go(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    endless = {"model": MODEL, "ignore_eos": True, "min_tokens": 3000}
    form = {"type": "json_schema", "schema": {"type": "string", "minLength": 20000}}
    core = core_of(gateway.engine)
    busy = lambda: bool(core.calls)  # noqa: E731
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": messages, "stream": True, "max_tokens": 4000, **endless}),
        ("/v1/chat/completions", {"messages": messages, "n": 3, "max_tokens": 4000, **endless}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4000, **endless}),
        (
            "/v1/responses",
            {"input": "x", "model": MODEL, "text": {"format": {"name": "x", **form}}, "stream": True},
        ),
        ("/v1/messages", {"messages": messages, "model": MODEL, "max_tokens": 8000, "output_format": form}),
        ("/v1/programs/endless/runs", {"stream": True}),
        ("/v1/programs/endless/runs", {}),
    ]
    for path, body in asked:
        leave(gateway, body, busy, path)
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
    with serving(small_engine, keepalive=0.05) as gateway, gateway.http() as client:
        slow = {"input_ids": [5 + i % 200 for i in range(8000)], "stream": True}
        slow["sampling_params"] = {"max_new_tokens": 2}
        with client.stream("POST", "/generate", json=slow) as answer:
            raw = b"".join(answer.iter_bytes())
        assert raw.startswith(b": keepalive\n\n") and raw.endswith(b"data: [DONE]\n\n")


def test_clients_bear_signs_of_life_in_the_prefill() -> None:
    """Those of OpenAI and of Anthropic, before their streams have begun."""
    asked: Any = [{"role": "user", "content": "x" * 7000}]
    with serving(small_engine, keepalive=0.02) as gateway:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=asked, max_tokens=3, stream=True)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
            events = client.responses.create(
                model=MODEL, input=asked[0]["content"], max_output_tokens=3, stream=True
            )
            assert [event.type for event in events][-1] == "response.incomplete"
        with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as other:
            options: Any = {"model": MODEL, "messages": asked, "max_tokens": 3}
            with other.messages.stream(**options) as told:
                assert told.get_final_message().stop_reason == "max_tokens"
        with gateway.http() as plain:
            for path, beat in (("/v1/chat/completions", ": keepalive"), ("/v1/messages", "event: ping")):
                gateway.state.engine.flush()
                with plain.stream("POST", path, json={**options, "stream": True}) as answer:
                    assert next(answer.iter_lines()) == beat


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
