"""Runs that are ended by others, read again, refused, and what they may take of the server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from support.engine import core_of, wait_for
from support.gateway import Gateway, events_of, gen, inline
from support.gateway import run_program as run
from weft.backend.executor import ProgramExecutor
from weft.gateway.runs import runs
from weft.gateway.runs.types import RunEvent, RunInfo
from weft.runtime.errors import Overloaded


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx2.Client]:
    with gateway.http() as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_whose_client_waits_can_be_cancelled(gateway: Gateway, client: httpx2.Client, stream: bool) -> None:
    """By another request: its own ends in order, and says so."""
    found: list[Any] = []

    def wait() -> None:
        with gateway.http() as own:
            if stream:
                with own.stream("POST", "/v1/programs/endless/runs", json={"stream": True}) as answer:
                    found.append(events_of(answer)[-1]["run"])
            else:
                found.append(run(own, "endless"))

    before = {own["id"] for own in client.get("/v1/runs?limit=1000").json()["data"]}
    thread = threading.Thread(target=wait)
    thread.start()
    core = core_of(gateway.engine)
    wait_for(lambda: any(getattr(call, "drawn_count", 0) > 2 for call in list(core.calls.values())))
    (id,) = {own["id"] for own in client.get("/v1/runs?limit=1000").json()["data"]} - before
    assert client.post(f"/v1/runs/{id}/cancel").json()["status"] == "cancelled"
    thread.join(30)
    assert found and found[0]["id"] == id and found[0]["status"] == "cancelled"
    wait_for(lambda: not core.calls)


def test_a_stream_tells_the_same_when_it_is_read_again(client: httpx2.Client) -> None:
    body = {"arguments": {"question": "What is 2 + 3?"}, "stream": True}
    with client.stream("POST", "/v1/programs/ask/runs", json=body) as answer:
        found = events_of(answer)
    with client.stream("GET", f"/v1/runs/{found[0]['run']['id']}/events") as answer:
        assert events_of(answer) == found
    assert found[0]["run"]["usage"]["receipts"] == [] and found[-1]["run"]["usage"]["receipts"]


def test_what_is_not_known_is_refused(client: httpx2.Client) -> None:
    """A bound that is misspelt would be none."""
    for options in ({"limit": {"tokens": 5}}, {"limits": {"token": 5}}, {"sampling": {"temprature": 0}}):
        refused = run(client, "ask", {"question": "x"}, status=400, **options)
        assert "unknown field" in refused["error"]["message"]


def piece(text: str, variable: str = "x") -> RunEvent:
    return RunEvent(type="piece", path="", variable=variable, text=text)


def test_very_many_pieces_are_told_in_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is lost, also to those who have followed from the beginning."""
    monkeypatch.setattr(runs, "_EVENTS", 10)
    monkeypatch.setattr(runs, "_PIECE", 8)
    info = RunInfo(id="r", program="p", tag="", hash="", status="running", created_at=0.0)

    async def work() -> tuple[list[RunEvent], list[RunEvent]]:
        kept = runs.Kept(info, "", True)
        live: list[RunEvent] = []

        async def follow() -> None:
            live.extend([event async for event in kept.follow(0)])

        following = asyncio.create_task(follow())
        for i in range(100):
            kept.tell(piece(f"{i} ", "x" if i < 80 else "y"))
            if i % 7 == 0:
                await asyncio.sleep(0)
            if i == 50:
                kept.tell(RunEvent(type="receipt"))
        kept.end()
        kept.end()
        await following
        return live, kept.events

    live, kept = asyncio.run(work())
    assert live == kept and [event.id for event in kept] == list(range(len(kept))) and len(kept) < 60
    assert kept[-1].type == "ended" and [event.type for event in kept].count("ended") == 1
    for variable, numbers in (("x", range(80)), ("y", range(80, 100))):
        said = "".join(event.text or "" for event in kept if event.variable == variable)
        assert said == "".join(f"{i} " for i in numbers)
    place = next(i for i, event in enumerate(kept) if event.type == "receipt")
    assert "".join(event.text or "" for event in kept[:place]).split()[-1] == "50"


def test_a_run_that_is_cancelled_before_it_begins_has_ended() -> None:
    info = RunInfo(id="r", program="p", tag="", hash="", status="queued", created_at=0.0)

    async def work() -> runs.Kept:
        kept = runs.Kept(info, "", True)
        kept.task = asyncio.create_task(asyncio.sleep(60))
        await asyncio.gather(kept.cancel(), kept.cancel())
        return kept

    kept = asyncio.run(work())
    assert not kept.under_way and info.status == "cancelled" and len(kept.events) == 1


@pytest.mark.parametrize(
    "step",
    [
        {"do": "text", "text": "{a.k}"},
        {"do": "set", "name": "x", "value": "{a.k}"},
        {"do": "while", "variable": "a", "contains": "never", "most": 5, "steps": []},
        {"do": "while", "variable": "b", "equals": [1], "most": 5, "steps": []},
        {"do": "set", "name": "x", "value": [0] * 200_000},
        {"do": "text", "text": "x" * 200_000},
    ],
)
def test_what_a_program_reads_is_bounded_too(client: httpx2.Client, step: Any) -> None:
    """It runs where all others are served: in 10,000 steps it may not read 10,000 times its arguments."""
    arguments = {"a": json.dumps({"k": 1, "rest": "x" * 200_000}), "b": [0] * 200_000}
    steps = [{"do": "loop", "over": [0] * 100, "steps": [step]}]
    made = inline(client, steps, arguments)
    assert made["status"] == "failed" and made["error"]["type"] == "BudgetExceeded", made["error"]
    assert inline(client, [step], arguments)["status"] == "completed"


def test_what_explain_looks_at_is_bounded(client: httpx2.Client) -> None:
    steps = [{"do": "text", "text": "x" * 50_000}, *(gen(f"v{i}") for i in range(100))]
    answer = client.post("/v1/runs:explain", json={"program": {"steps": steps}})
    assert answer.status_code == 200
    told = answer.json()
    assert not told["complete"] and "characters" in told["stopped"] and 80 < len(told["steps"]) < 90


def test_a_refusal_in_the_background_stands_in_the_run(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object, **__: object) -> None:
        raise Overloaded("no room")

    monkeypatch.setattr(ProgramExecutor, "follow", full)
    made = run(client, "ask", {"question": "x"}, background=True)
    with client.stream("GET", f"/v1/runs/{made['id']}/events") as answer:
        assert events_of(answer)[-1]["run"]["error"]["type"] == "Overloaded"
    assert client.get(f"/v1/runs/{made['id']}").json()["status"] == "failed"
    # One whose client waits is told by the status.
    assert client.post("/v1/programs/ask/runs", json={"arguments": {"question": "x"}}).status_code == 503
