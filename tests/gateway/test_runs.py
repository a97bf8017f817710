"""Programs over HTTP: registered and inline ones, waited for, streamed, in the background, explained."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from support.gateway import Gateway, events_of, gen, inline
from support.gateway import run_program as run
from weft.gateway.runs.registry import Registry
from weft.runtime.errors import ConfigError

FACTS = "The room of Tolkar is 423. The room of Malles is 118. The room of Vommas is 77."


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx2.Client]:
    with gateway.http() as made:
        yield made


def ask(text: str, name: str, **options: Any) -> list[dict[str, Any]]:
    return [
        {"do": "role", "role": "user", "steps": [{"do": "text", "text": text}]},
        {"do": "role", "role": "assistant", "steps": [gen(name, **options)]},
    ]


# -- registered ones ------------------------------------------------------------------------------------------


def test_what_is_registered(client: httpx2.Client) -> None:
    listed = client.get("/v1/programs").json()
    known = {own["name"]: own for own in listed["data"]}
    assert {"ask", "shared", "fork_and_judge", "extraction"} <= known.keys()
    assert {tool["name"] for tool in listed["tools"]} == {"get_room", "add", "fails"}
    own = known["ask"]
    assert own["tag"] == "latest" and len(own["hash"]) == 64 and own["description"] == "Answer a question."
    assert own["arguments"] == {
        "type": "object",
        "properties": {
            "question": {"type": "string"},
            "mood": {"enum": ["long", "short"], "default": "short"},
            "tokens": {"type": "integer", "default": 16},
        },
        "required": ["question"],
        "additionalProperties": False,
    }
    for reference in ("ask", "ask@latest", f"ask@{own['hash'][:12]}"):
        assert client.get(f"/v1/programs/{reference}").json()["hash"] == own["hash"]
    for reference in ("nothing", "ask@other", "ask@" + "0" * 12, "ask@" + own["hash"][:4]):
        assert client.get(f"/v1/programs/{reference}").status_code == 404


def test_a_run(client: httpx2.Client) -> None:
    made = run(client, "ask", {"question": "What is 2 + 3?", "mood": "long"}, metadata={"a": "b"})
    assert made["status"] == "completed" and made["value"] == "long: 5" and made["variables"]["answer"] == "5"
    assert made["text"].endswith("5<｜end▁of▁sentence｜>") and made["metadata"] == {"a": "b"}
    usage = made["usage"]
    assert usage["generations"] == 1 and usage["generated_tokens"] == usage["receipts"][0]["took"]["generated"]
    assert client.get(f"/v1/runs/{made['id']}").json() == made
    assert client.get("/v1/runs?limit=1").json()["data"][0]["id"] == made["id"]
    assert client.delete(f"/v1/runs/{made['id']}").status_code == 200
    assert client.get(f"/v1/runs/{made['id']}").status_code == 404


def test_receipts_of_every_primitive(client: httpx2.Client) -> None:
    made = run(client, "shared", {"facts": FACTS, "names": ["Tolkar", "Malles"]})
    assert made["variables"]["room"] == ["423", "118"]
    kinds = [(own["kind"], own["path"], own["name"]) for own in made["usage"]["receipts"]]
    assert sorted(kinds) == [
        ("fork", "", None), ("gen", "/0", "room"), ("gen", "/1", "room"), ("select", "", "verdict"),
    ]  # fmt: skip
    computed = sum(own["took"]["computed"] for own in made["usage"]["receipts"])
    assert computed == made["usage"]["computed_tokens"]
    called = run(client, "with_tools", {"question": "What is the room of Tolkar?"})
    tools = [own for own in called["usage"]["receipts"] if own["kind"] == "tool"]
    assert called["value"] == "423" and [own["name"] for own in tools] == ["get_room"]
    assert called["usage"]["tools"] == 1 and tools[0]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "arguments"),
        ({"question": 5}, "arguments.question"),
        ({"question": "x", "mood": "odd"}, "arguments.mood"),
        ({"question": "x", "other": 1}, "arguments"),
    ],
)
def test_wrong_arguments(client: httpx2.Client, arguments: Any, field: str) -> None:
    refused = run(client, "ask", arguments, status=400)
    assert refused["error"]["field"] == field, refused


def test_sampling_and_limits(client: httpx2.Client) -> None:
    made = run(client, "endless", {"tokens": 200}, limits={"tokens": 20})
    assert made["status"] == "failed" and made["error"]["type"] == "BudgetExceeded"
    assert made["error"]["variable"] == "text" and made["usage"]["generated_tokens"] == 0
    late = run(client, "patient", {"seconds": 5.0}, limits={"seconds": 0.3})
    assert late["status"] == "failed" and late["error"]["type"] == "DeadlineExceeded"
    for options in ({"limits": {"tokens": 0}}, {"sampling": {"temperature": -1}}):
        run(client, "ask", {"question": "x"}, status=400, **options)


def test_a_failure_is_told(client: httpx2.Client) -> None:
    made = run(client, "failing")
    assert made["status"] == "failed" and made["error"] == {
        "type": "LookupError", "message": "nothing here", "path": None, "variable": None,
    }  # fmt: skip
    answer = client.post("/v1/programs/failing/runs", json={"arguments": {"after": True}})
    # A tool ran: who tries again runs it again.
    assert answer.headers["x-should-retry"] == "false" and answer.json()["status"] == "failed"


def test_a_stream(client: httpx2.Client) -> None:
    body = {"arguments": {"facts": FACTS, "names": ["Tolkar", "Vommas"]}, "stream": True}
    with client.stream("POST", "/v1/programs/shared/runs", json=body) as answer:
        found = events_of(answer)
    assert [event["id"] for event in found] == list(range(len(found)))
    assert found[0]["type"] == "started" and found[-1]["type"] == "ended"
    texts: dict[str, str] = {}
    for event in found:
        if event["type"] == "piece" and event["variable"] == "room":
            texts[event["path"]] = texts.get(event["path"], "") + event["text"]
    assert [texts["/0"], texts["/1"]] == found[-1]["run"]["variables"]["room"]
    with client.stream("POST", "/v1/programs/ask/runs", json={"arguments": {}, "stream": True}) as refused:
        assert refused.status_code == 400


def test_in_the_background(client: httpx2.Client) -> None:
    made = run(client, "ask", {"question": "What is 2 + 3?"}, background=True)
    assert made["status"] in ("queued", "running")
    with client.stream("GET", f"/v1/runs/{made['id']}/events") as answer:
        found = events_of(answer)
    assert found[-1]["run"]["value"] == "short: 5"
    with client.stream("GET", f"/v1/runs/{made['id']}/events", headers={"last-event-id": "1"}) as answer:
        assert events_of(answer) == found[2:]
    with client.stream("GET", f"/v1/runs/{made['id']}/events?after=0") as answer:
        assert events_of(answer) == found[1:]
    assert client.get(f"/v1/runs/{made['id']}/events", headers={"last-event-id": "x"}).status_code == 400


def test_cancel(client: httpx2.Client, gateway: Gateway) -> None:
    made = run(client, "endless", background=True)
    cancelled = client.post(f"/v1/runs/{made['id']}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["ended_at"] is not None
    with client.stream("GET", f"/v1/runs/{made['id']}/events") as answer:
        assert events_of(answer)[-1]["run"]["status"] == "cancelled"
    done = run(client, "ask", {"question": "x"})
    assert client.post(f"/v1/runs/{done['id']}/cancel").json()["status"] == "completed"


# -- explained ------------------------------------------------------------------------------------------------


def explain(client: httpx2.Client, name: str, arguments: Any, **options: Any) -> Any:
    answer = client.post(f"/v1/programs/{name}:explain", json={"arguments": arguments, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_a_run_would_take(client: httpx2.Client) -> None:
    """And then takes: cold, and once more when it is known."""
    arguments = {"facts": FACTS * 3, "names": ["Tolkar", "Malles"]}
    salt = {"cache_salt": str(time.monotonic())}
    for again in (False, True):
        told = explain(client, "shared", arguments, **salt)
        assert told["complete"] or "parts" in told["stopped"]
        made = run(client, "shared", arguments, **salt)
        receipts = made["usage"]["receipts"]
        first, fork = told["steps"][0], next(own["took"] for own in receipts if own["kind"] == "fork")
        assert first["kind"] == "fork" and first["history"] == fork["prompt"]
        assert (first["shared"], first["computed"]) == (fork["cached"], fork["computed"])
        assert first["copied_bytes"] == fork["copied_bytes"]
        assert (first["shared"] > 0) == again
        for path in ("/0", "/1"):
            step = next(own for own in told["steps"] if own["kind"] == "gen" and own["path"] == path)
            took = next(own["took"] for own in receipts if own["kind"] == "gen" and own["path"] == path)
            assert step["history"] == took["prompt"]
            if not again:
                assert step["shared"] == took["cached"]
                assert step["computed"] == took["computed"] - took["generated"] + 1


def test_where_it_cannot_be_foreseen(client: httpx2.Client) -> None:
    told = explain(client, "ask", {"question": "What is 2 + 3?"})
    assert not told["complete"] and "answer" in told["stopped"]
    assert [step["name"] for step in told["steps"]] == ["answer"] and told["draws"] == 16
    assert explain(client, "with_tools", {"question": "x"})["stopped"]
    explained = client.post(
        "/v1/runs:explain", json={"program": {"steps": ask("Hello {who}", "a")}, "arguments": {"who": "you"}}
    ).json()
    assert explained["complete"] and explained["computed"] + explained["shared"] > 4


# -- inline ---------------------------------------------------------------------------------------------------


def test_steps(client: httpx2.Client) -> None:
    made = inline(client, ask("What is {a} + {b}?", "sum"), {"a": 2, "b": 3})
    assert made["variables"] == {"sum": "5"} and made["program"] == "inline" and len(made["hash"]) == 64
    braces = inline(client, [{"do": "text", "text": "{{x}} {d.k.0}"}, gen("x")], {"d": {"k": ["v"]}})
    assert braces["text"].startswith("{x} v")
    chosen = inline(
        client, [{"do": "text", "text": "Yes or no? "}, {"do": "select", "name": "c", "choices": ["yes", "no"]}]
    )
    assert chosen["variables"]["c"] in ("yes", "no")
    held = inline(client, [{"do": "text", "text": "n: "}, gen("n", regex="[0-9]{3}"), gen("m", dtype="int")])
    assert len(held["variables"]["n"]) == 3 and int(held["variables"]["m"]) is not None
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    drawn = [gen("j", json_schema=schema), {"do": "set", "name": "inner", "value": "{j.a}"}]
    found = inline(client, [{"do": "text", "text": "j: "}, *drawn])["variables"]
    assert found["inner"] is json.loads(found["j"])["a"]


def test_forks_loops_and_tools(client: httpx2.Client) -> None:
    branches = [ask(f"What is the room of {name}?", "room") for name in ("Tolkar", "Malles")]
    facts = [{"do": "role", "role": "system", "steps": [{"do": "text", "text": FACTS}]}]
    made = inline(client, [*facts, {"do": "fork", "branches": branches}])
    assert made["variables"]["room"] == ["423", "118"]
    joined = inline(client, [{"do": "text", "text": "A"}, {"do": "fork", "join": "text", "branches": [
        [{"do": "text", "text": "B"}], [{"do": "text", "text": "C"}]]}])  # fmt: skip
    assert joined["text"] == "ABC"
    raced = inline(client, [*facts, {"do": "race", "branches": branches}])
    assert raced["variables"]["room"] in ("423", "118")
    looped = inline(client, [{"do": "loop", "over": "names", "item": "name", "steps": [
        {"do": "text", "text": "{index}:{name} "}]}], {"names": ["x", "y"]})  # fmt: skip
    assert looped["text"] == "0:x 1:y "
    counted = inline(client, [
        {"do": "set", "name": "n", "value": 0},
        {"do": "while", "variable": "n", "differs": 3, "most": 10, "steps": [
            {"do": "tool", "name": "n", "tool": "add", "arguments": {"a": "{n}", "b": 1}}]},
        {"do": "text", "text": "{n}"},
    ])  # fmt: skip
    assert counted["text"] == "3" and counted["usage"]["tools"] == 3
    failed = inline(client, [{"do": "tool", "name": "x", "tool": "fails", "arguments": {"why": "so"}}])
    assert (
        failed["status"] == "failed"
        and failed["error"]["type"] == "ToolError"
        and "so" in failed["error"]["message"]
    )


@pytest.mark.parametrize(
    ("steps", "field"),
    [
        ([{"do": "text"}], "program.steps[0]"),
        ([{"do": "exec", "code": "1"}], "program.steps[0].do"),
        ([{"do": "text", "text": "x", "more": 1}], "program.steps[0]"),
        ([{"do": "gen", "name": "__class__.x"}], "program.steps[0].name"),
        ([{"do": "while", "variable": "x", "most": 5, "steps": []}], "program.steps[0]"),
        ([{"do": "while", "variable": "x", "equals": 1, "most": 100000, "steps": []}], "program.steps[0].most"),
        ([{"do": "fork", "branches": [[]] * 65}], "program.steps[0].branches"),
        ([{"do": "text", "text": "x"}] * 1001, "program.steps"),
        (
            [{"do": "role", "role": "user", "steps": [{"do": "role", "role": "user", "steps": []}]}],
            "program.steps[0].steps[0]",
        ),
    ],
)
def test_wrong_programs(client: httpx2.Client, steps: Any, field: str) -> None:
    refused = inline(client, steps, status=400)
    assert refused["error"]["field"] == field, refused


def test_too_deep(client: httpx2.Client) -> None:
    steps: list[Any] = [{"do": "text", "text": "x"}]
    for _ in range(20):
        steps = [{"do": "loop", "over": [1], "steps": steps}]
    assert "deep" in inline(client, steps, status=400)["error"]["message"]


def test_bounds_while_it_runs(client: httpx2.Client) -> None:
    inner = {"do": "loop", "over": [0] * 100, "steps": [{"do": "set", "name": "x", "value": 1}]}
    made = inline(client, [{"do": "loop", "over": [0] * 100, "steps": [inner]}], {})
    made = inline(client, [{"do": "loop", "over": [0] * 100, "steps": [inner, inner]}], {})
    assert made["status"] == "failed" and made["error"]["type"] == "BudgetExceeded"
    for text, reason in (("{nothing}", "nothing"), ("{a.b}", "b"), ("{a.__class__}", "__class__")):
        made = inline(client, [{"do": "text", "text": text}], {"a": {"c": 1}})
        assert made["status"] == "failed" and reason in made["error"]["message"]
    long = inline(client, [{"do": "loop", "over": "many", "most": 3, "steps": []}], {"many": [1, 2, 3, 4]})
    assert long["status"] == "failed" and "at most 3" in long["error"]["message"]


# -- the registry ---------------------------------------------------------------------------------------------


def test_tags() -> None:
    registry = Registry(["support.served:ask@v1", "support.served@v2"], installed=False)
    assert {own.tag for own in registry if own.name == "ask"} == {"v1", "v2"}
    first, second = registry.find("ask@v1"), registry.find("ask@v2")
    assert first is not None and second is not None and first.hash == second.hash
    latest = registry.find("ask")
    assert latest is not None and latest.tag == "v1"


@pytest.mark.parametrize(
    "specs",
    [
        ["no.such.module"],
        ["support.served:nothing"],
        ["support.engine"],
        ["support.served:ask", "support.served:ask"],
        ["weft.programs.tool_agent:tool_agent"],
    ],
)
def test_what_cannot_be_served(specs: list[str]) -> None:
    with pytest.raises(ConfigError, match="programs"):
        Registry(specs, installed=False)
