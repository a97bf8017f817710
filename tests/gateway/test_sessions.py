"""Conversations are known by what clients send anyway; their KV is leased between turns, and given back."""

from __future__ import annotations

from typing import Any

import pytest

from support.engine import core_of, wait_for
from support.gateway import MODEL, Gateway, serving, small_engine
from weft.gateway.http.errors import HttpError
from weft.gateway.http.hints import lease_of
from weft.gateway.http.keys import Caller
from weft.gateway.http.sessions import HEADERS
from weft.gateway.http.shelf import Shelf
from weft.runtime.errors import RequestError

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


def held(gateway: Gateway) -> int:
    return len(gateway.state.sessions)


def open_sequences(gateway: Gateway) -> int:
    return len(core_of(gateway.engine).sequences)


@pytest.mark.parametrize("header", HEADERS)
def test_headers(small: Gateway, header: str) -> None:
    with small.http() as client:
        for _ in range(2):
            assert client.post("/v1/chat/completions", json=CHAT, headers={header: "s"}).status_code == 200
        wait_for(lambda: held(small) == open_sequences(small) == 1)
        wait_for(lambda: all(own.pinned > 0 for own in core_of(small.engine).sequences.values()))


def test_bodies(small: Gateway) -> None:
    with small.http() as client:
        for field in ("session_id", "prompt_cache_key"):
            client.post("/v1/chat/completions", json={**CHAT, field: field})
            client.post(
                "/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2, field: field + "2"}
            )
        client.post("/generate", json={"text": "x", "sampling_params": {"max_new_tokens": 2}, "session_id": "g"})
        first = client.post("/v1/responses", json={"model": MODEL, "input": "x", "max_output_tokens": 2}).json()
        assert held(small) == 6
        more = {"model": MODEL, "input": "y", "max_output_tokens": 2, "previous_response_id": first["id"]}
        assert client.post("/v1/responses", json=more).status_code == 200
        assert held(small) == 6, "the conversation is the same"
        client.post("/flush_cache")
        wait_for(lambda: held(small) == open_sequences(small) == 0)


def test_the_end_of_a_lease() -> None:
    with serving(small_engine, lease=0.2, sessions=2) as gateway, gateway.http() as client:
        for name in ("a", "b", "c"):
            client.post("/v1/chat/completions", json={**CHAT, "session_id": name})
        assert held(gateway) == 2
        wait_for(lambda: held(gateway) == open_sequences(gateway) == 0, seconds=5)
        for options in (
            {"headers": {"x-session-id": "s", "x-dynamo-session-final": "true"}, "json": CHAT},
            {"json": {**CHAT, "session_id": "s", "kv_hints": {"actions": [{"type": "release"}]}}},
        ):
            client.post("/v1/chat/completions", **options)
            wait_for(lambda: held(gateway) == open_sequences(gateway) == 0)
        wrong = client.post("/v1/chat/completions", json={**CHAT, "session_id": "s", "kv_hints": {"actions": [1]}})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "kv_hints.actions[0]"


def test_hints() -> None:
    assert lease_of(None) is lease_of({"actions": []}) is lease_of({"actions": [{"type": "prefetch"}]}) is None
    assert lease_of({"actions": [{"type": "retain", "ttl": 5}]}) == 5.0
    assert lease_of({"actions": [{"action": "PIN", "ttl_seconds": 1e9}]}) == 3600.0
    assert lease_of({"actions": [{"type": "pin", "ttl": 5}, {"type": "evict"}]}) == 0.0
    for wrong in (
        {"actions": {"type": "pin"}},
        {"actions": [{"type": "pin", "ttl": -1}]},
        {"actions": [{"type": "pin", "ttl": "x"}]},
    ):
        with pytest.raises(RequestError, match="kv_hints"):
            lease_of(wrong)


class Thing:
    def __init__(self, owner: str, size: int, under_way: bool = False) -> None:
        self.owner, self.size, self.under_way = owner, size, under_way


def test_a_shelf() -> None:
    shelf: Shelf[Thing] = Shelf("thing", 3, 100)
    shelf.put("busy", Thing("a", 50, under_way=True))
    for i in range(5):
        shelf.put(str(i), Thing("a", 20))
    assert [thing.size for thing in shelf] == [20, 20, 50]
    assert shelf.find(Caller("a"), "busy").under_way and shelf.find(Caller("a"), "4")
    for caller, id in ((Caller("b"), "4"), (Caller("a"), "0"), (Caller("a"), "none")):
        with pytest.raises(HttpError, match="no thing"):
            shelf.find(caller, id)
    shelf.forget("4")
    shelf.forget("4")
    assert len(list(shelf)) == 2
