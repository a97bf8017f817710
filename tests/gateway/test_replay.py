"""Drawn turns are found again whatever a client does to how they are written, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from weft.gateway.chat.replay import Replay, canonical
from weft.runtime.text.chat_output import Reply, ToolCall

TEXT = st.text("ab \n", max_size=6)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text("xy", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("kl", max_size=2), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text("mn", min_size=1, max_size=2), VALUE, max_size=4)


@st.composite
def replies(draw: Any) -> Reply:
    calls = [
        ToolCall(f"call_{i}_{draw(st.integers(0, 10**9))}", "f", json.dumps(arguments), True)
        for i, arguments in enumerate(draw(st.lists(ARGUMENTS, max_size=2)))
    ]
    return Reply(draw(st.none() | TEXT), draw(TEXT), calls, "tool_calls" if calls else "stop")


def sent_back(reply: Reply, draw: Any) -> dict[str, Any]:
    """As a client may write it: reasoning or not, keys in any order, any white space, 1 for 1.0."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": f"{draw(st.sampled_from(['', ' ']))}{reply.content}\n",
    }
    if reply.reasoning and draw(st.booleans()):
        message["reasoning_content"] = reply.reasoning
    calls = []
    for call in reply.tool_calls:
        pairs = draw(st.permutations(list(json.loads(call.arguments).items())))
        plain = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in pairs}
        arguments = json.dumps(plain, indent=draw(st.sampled_from([None, 2])))
        calls.append({"id": call.id, "type": "function", "function": {"name": "f", "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else message


@given(st.data(), replies(), st.lists(TEXT, max_size=3), st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_what_is_sent_back_is_found(data: Any, reply: Reply, before: list[str], tokens: list[int]) -> None:
    replay = Replay(1 << 20)
    messages = [{"role": "user", "content": text} for text in ("start", *before)]
    replay.put("space", "1", messages, reply, tokens)
    message = sent_back(reply, data.draw)
    again, drawn = replay.apply("space", [*messages, message, {"role": "user", "content": "more"}])
    assert [list(own) if own is not None else None for own in drawn] == [tokens]
    assert again[len(messages)].get("reasoning_content") == (reply.reasoning or None)
    for call, own in zip(reply.tool_calls, again[len(messages)].get("tool_calls", []), strict=True):
        assert own["function"]["arguments"] == call.arguments
    # Another's are not found, nor what says something else.
    assert replay.apply("other", [*messages, message])[1] == [None]
    changed = {**message, "content": reply.content + "!"}
    assert replay.apply("space", [*messages, changed])[1] == [None]
    if reply.reasoning and reply.reasoning.strip():
        changed = {**message, "reasoning_content": reply.reasoning + "!"}
        assert replay.apply("space", [*messages, changed])[1] == [None]
    for i in range(len(reply.tool_calls)):
        calls = json.loads(json.dumps(message["tool_calls"]))
        calls[i]["function"]["arguments"] = '{"another": 1}'
        assert replay.apply("space", [*messages, {**message, "tool_calls": calls}])[1] == [None]


def plain(text: str) -> Reply:
    return Reply(None, text, [], "stop")


def test_the_same_words_in_two_places_are_two_turns() -> None:
    replay = Replay(1 << 20)
    for place, tokens in (("a", [1]), ("b", [2])):
        replay.put("", place, [{"role": "user", "content": place}], plain("Yes."), tokens)
    for place, tokens in (("a", [1]), ("b", [2])):
        said = [{"role": "user", "content": place}, {"role": "assistant", "content": "Yes."}]
        assert list(replay.apply("", said)[1][0] or ()) == tokens
    elsewhere = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "Yes."}]
    assert replay.apply("", elsewhere)[1] == [None]
    assert list(replay.apply("", [elsewhere[0], {**elsewhere[1], "signature": "b"}])[1][0] or ()) == [2]
    assert "signature" not in replay.apply("", [elsewhere[0], {**elsewhere[1], "signature": "b"}])[0][1]


def test_it_holds_so_much_and_forgets_the_longest_unused() -> None:
    replay = Replay(4000)
    asked = [{"role": "user", "content": "q"}]
    for i in range(20):
        replay.put("", str(i), asked, plain(f"answer {i}"), [i] * 100)
        replay.apply("", [*asked, {"role": "assistant", "content": "answer 0"}])  # in use
    assert 2 <= len(replay) <= 4
    known = [
        i
        for i in range(20)
        if replay.apply("", [*asked, {"role": "assistant", "content": f"answer {i}"}])[1] != [None]
    ]
    assert 0 in known and 19 in known and len(known) == len(replay)
    assert len(replay._ids) == 2 * len(replay)


@given(ARGUMENTS)
def test_canonical(arguments: dict[str, Any]) -> None:
    backwards = dict(reversed(list(arguments.items())))
    assert canonical(json.dumps(arguments)) == canonical(json.dumps(backwards, indent=3))
    assert canonical("{no") == "{no"
