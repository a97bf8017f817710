"""How much may be under way, and what those are told who come too late."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from support.gateway import SHORT, serving, small_engine
from weft.gateway.apis import completions, native
from weft.gateway.apis.native_types import GenerateRequest, NativeSampling
from weft.gateway.apis.openai_types import CompletionRequest
from weft.gateway.http import gate as module
from weft.gateway.http.config import Bounds
from weft.gateway.http.errors import HttpError
from weft.gateway.http.gate import Gate
from weft.gateway.http.keys import Caller
from weft.runtime.errors import Overloaded, RequestError

ALICE, BOB = Caller("alice", "user"), Caller("bob", "user")


class Clock:
    """Seconds as the gate sees them."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def settled(clock: Clock, gate: Gate, seconds: float) -> None:
    """So many requests of such a length that it reckons with nothing else."""
    for _ in range(300):
        with gate.enter(ALICE):
            clock.now += seconds


def test_how_long_to_wait(clock: Clock) -> None:
    """With four served at a time, each a second long, a queue of sixteen is through in three; requests take four
    then, their waits included."""
    gate = Gate(Bounds(queue=100), served=4)
    settled(clock, gate, 4.0)
    with ExitStack() as held:
        for _ in range(16):
            held.enter_context(gate.enter(ALICE))
        assert (gate.running, gate.waiting) == (4, 12)
        assert gate.patience() == pytest.approx(4.0 * 13 / 16)
    assert gate.under_way == 0 and gate.patience() < 4.0


def test_refusals_say_nothing_of_how_long_requests_take(clock: Clock) -> None:
    gate = Gate(Bounds(), served=4)
    settled(clock, gate, 8.0)
    for _ in range(100):
        with pytest.raises(RequestError), gate.enter(ALICE):
            raise RequestError("x", 1, "wrong")
    assert gate.patience() == pytest.approx(8.0, rel=0.01) and gate.under_way == 0
    for _ in range(300):  # but one whose client left has held its place as long
        with pytest.raises(asyncio.CancelledError), gate.enter(ALICE):
            clock.now += 2.0
            raise asyncio.CancelledError
    assert gate.patience() == pytest.approx(2.0, rel=0.01)


def test_a_key_waits_for_its_own_places(clock: Clock) -> None:
    gate = Gate(Bounds(queue=16, share=0.25), served=4)
    settled(clock, gate, 8.0)
    with gate.enter(ALICE, 3), gate.enter(BOB), pytest.raises(HttpError) as error, gate.enter(ALICE, 2):
        pass
    assert error.value.status == 429 and error.value.retry_after == pytest.approx(8.0 / 3, rel=0.01)
    with pytest.raises(HttpError) as error, gate.enter(ALICE, 5):
        pass
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("asked", "weight"),
    [
        (GenerateRequest(text="x"), 1),
        (GenerateRequest(text=["x", "y", "z"]), 3),
        (GenerateRequest(input_ids=[1, 2, 3]), 1),
        (GenerateRequest(input_ids=[[1], [2]], sampling_params=NativeSampling(n=4)), 8),
        (GenerateRequest(text=["x", "y"], sampling_params=[NativeSampling(n=3), NativeSampling()]), 4),
    ],
)
def test_batches_weigh_what_they_ask_for(asked: GenerateRequest, weight: int) -> None:
    assert native._weight(asked) == weight


@pytest.mark.parametrize(
    ("prompt", "n", "weight"), [("x", None, 1), ([1, 2], 3, 3), (["x", "y"], 2, 4), ([[1], [2]], None, 2)]
)
def test_prompts_weigh_too(prompt: Any, n: int | None, weight: int) -> None:
    assert completions._weight(CompletionRequest(model="m", prompt=prompt, n=n)) == weight


def test_a_batch_is_no_way_around_the_queue() -> None:
    with serving(small_engine, queue=6) as gateway, gateway.http() as client:
        batch = {"text": ["x"] * 7, "sampling_params": {"max_new_tokens": 1}}
        assert client.post("/generate", json=batch).status_code == 400
        assert client.post("/generate", json={**batch, "text": ["x"] * 6}).status_code == 200


def test_an_engine_that_has_too_much_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own hint knows nothing of the queue."""
    with serving(small_engine) as gateway, gateway.http() as client:

        def full(*_: object, **__: object) -> None:
            raise Overloaded("full")

        gateway.state.gate._seconds = 70.0
        monkeypatch.setattr(gateway.engine, "open", full)
        answer = client.post("/generate", json=SHORT)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "70"
