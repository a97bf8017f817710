"""Who may call, and how much."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.engine import wait_for
from support.gateway import MODEL, SHORT, Gateway, serving, small_engine
from weft.gateway.http.config import Bounds, ServeConfig
from weft.gateway.http.keys import Keys, make_key
from weft.runtime.errors import ConfigError

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


def test_a_file_of_keys(tmp_path: Path) -> None:
    key, line = make_key("alice", "admin")
    (tmp_path / "keys").write_text(f"{line}\n")
    assert Keys.load(tmp_path / "keys").find(key) is not None
    (tmp_path / "none").write_text("# alice left\n\n")
    (tmp_path / "odd").write_bytes(b"\xff")
    for name in ("none", "odd", "missing"):
        with pytest.raises(ConfigError, match=name):
            Keys.load(tmp_path / name)


def test_keys_open_doors_of_their_own() -> None:
    (alice, one), (bob, two), (root, three) = (
        make_key("alice", "user"),
        make_key("bob", "user"),
        make_key("r", "admin"),
    )
    with serving(small_engine, keys=f"{one}\n{two}\n{three}") as gateway, gateway.http() as client:
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


def test_without_keys_only_this_machine_is_served(small: Gateway) -> None:
    """Whatever a page elsewhere makes its own name mean."""
    with small.http() as client:
        assert client.post("/generate", json=SHORT, headers={"host": "evil.example"}).status_code == 403
        assert client.post("/generate", json=SHORT, headers={"host": "localhost:30000"}).status_code == 200


# -- bodies ---------------------------------------------------------------------------------------------------


def test_bodies_are_bounded() -> None:
    with serving(small_engine, body=10_000, small=500) as gateway, gateway.http() as client:
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
    with serving(small_engine, queue=6) as gateway:
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
    with serving(small_engine, keys=f"{one}\n{two}", queue=8, share=0.5) as gateway:
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


def test_wrong_bounds() -> None:
    for field, value in (("queue", 0), ("share", 2.0), ("body", -1), ("drain", -1.0)):
        with pytest.raises(ConfigError, match=field):
            Bounds(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="port"):
        ServeConfig(port=70000)
