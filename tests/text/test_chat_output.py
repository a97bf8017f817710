"""What the model wrote, read back: calls cut off or malformed, and text split at every position."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.chat import EOS, D
from weft.runtime.text.chat_output import Reply, ReplyFormat, ReplyParser, parse

THINKING = ReplyFormat(thinking=True, tool_calls=True)
CHAT = ReplyFormat(tool_calls=True)
Made = list[tuple[str, dict[str, Any]]]


def parameter(name: str, value: Any) -> str:
    kind, text = ("true", value) if isinstance(value, str) else ("false", json.dumps(value, ensure_ascii=False))
    return f'<{D}parameter name="{name}" string="{kind}">{text}</{D}parameter>\n'


def invoke(name: str, arguments: dict[str, Any]) -> str:
    return f'<{D}invoke name="{name}">\n{"".join(parameter(*item) for item in arguments.items())}</{D}invoke>\n'


def block(*calls: tuple[str, dict[str, Any]]) -> str:
    return f"\n\n<{D}tool_calls>\n{''.join(invoke(*one) for one in calls)}</{D}tool_calls>"


def made(reply: Reply) -> Made:
    return [(call.name, json.loads(call.arguments)) for call in reply.tool_calls if call.complete]


def test_reasoning_content_and_calls() -> None:
    calls = [("f", {"a": 'x "y"\n\\', "b": [1, {"c": None}], "ü": "中"}), ("g", {})]
    reply = parse(f"\nwhy\n</think>\n\nwell{block(*calls)}", THINKING)
    assert (reply.reasoning, reply.content) == ("why", "well")
    assert made(reply) == calls and reply.finish_reason == "tool_calls" and reply.unparsed == ""
    assert [call.name for call in reply.tool_calls] == ["f", "g"]
    assert len({call.id for call in reply.tool_calls}) == 2 and all(call.id for call in reply.tool_calls)


def test_plain_replies() -> None:
    assert parse("well\n\n", CHAT) == Reply(None, "well\n\n", [], "stop")
    assert parse("well", THINKING) == Reply("well", "", [], "stop")
    assert parse("why</think>wel", THINKING, "length") == Reply("why", "wel", [], "length")
    assert parse("", THINKING) == Reply("", "", [], "stop")
    assert parse("\nwhy</think>\nwell", ReplyFormat(thinking=True, resumes="reasoning")).reasoning == "\nwhy"
    assert parse("\nwell", ReplyFormat(thinking=True, resumes="content")) == Reply("", "\nwell", [], "stop")


def test_calls_that_nobody_asked_for_are_text() -> None:
    text = f"well{block(('f', {}))}"
    assert parse(text, ReplyFormat()) == Reply(None, text, [], "stop")


def test_a_block_opened_by_the_prompt() -> None:
    text = block(("f", {"a": "x"})).removeprefix(f"\n\n<{D}tool_calls>\n")
    assert made(parse(text, ReplyFormat(tool_calls=True, in_tool_calls=True))) == [("f", {"a": "x"})]


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_call_cut_off_anywhere_is_never_complete(reason: Any) -> None:
    calls = [("f", {"a": "x", "b": {"c": 1}}), ("g", {})]
    ends, end = [], len("\n\n<｜DSML｜tool_calls>\n")
    for one in calls:
        end += len(invoke(*one))
        ends.append(end - 1)  # the newline behind it need not have come
    text = block(*calls)
    for length in range(len(text) + 1):
        reply = parse(text[:length], CHAT, reason)
        done = sum(length >= end for end in ends)
        assert made(reply) == calls[:done], text[:length]
        assert [call.complete for call in reply.tool_calls] == [i < done for i in range(len(reply.tool_calls))]
        for cut in reply.tool_calls[done:]:
            with pytest.raises(json.JSONDecodeError):  # nor would anyone take its arguments for finished
                json.loads(cut.arguments)
        clean = reply.finish_reason == ("tool_calls" if done and len(reply.tool_calls) == done else "stop")
        assert reply.finish_reason == "length" if reason == "length" else clean


MALFORMED = {
    "value that is not JSON": block(("f", {})).replace("</", parameter("a", 0).replace("0", "[1") + "</", 1),
    "value that ends the object": block(("f", {"a": 0})).replace(">0<", ">0}<"),
    "NaN": block(("f", {"a": 0})).replace(">0<", ">NaN<"),
    "name twice": block(("f", {"a": 0, "b": 1})).replace('"b"', '"a"'),
    "no such kind of value": block(("f", {"a": 0})).replace('"false"', '"maybe"'),
    "attribute misspelled": block(("f", {"a": 0})).replace("string=", "strng="),
    "tag without its bracket": block(("f", {})).replace('"f">', '"f"'),
    "other block": block(("f", {})).replace("tool_calls", "function_calls"),
    "no block": invoke("f", {}),
    "parameter closed by the call's end": block(("f", {"a": "x"})).replace(f"</{D}parameter>\n", ""),
    "call in a call": block(("f", {})).replace(f"</{D}invoke>", invoke("g", {}), 1),
    "name with a line's end": block(("f", {})).replace('"f"', '"f\n"'),
    "endless name": block(("f" * 5000, {})),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_call_is_never_complete(text: str) -> None:
    reply = parse(f"well{text}", CHAT)
    assert made(reply) == []
    assert reply.finish_reason == "stop"
    assert reply.content == "well"


def test_what_stands_in_no_call_is_kept() -> None:
    good = block(("f", {}))
    assert parse(f"well{good}tail", CHAT).unparsed == "tail"
    broken = f"<{D}invoke nam=\n</{D}tool_calls>"
    reply = parse(good.replace(f"</{D}tool_calls>", broken), CHAT)
    assert (made(reply), reply.unparsed) == ([("f", {})], f"\n{broken}")
    assert parse(f"well <{D}table> of", CHAT).unparsed == f"<{D}table> of"


PIECES = st.sampled_from(
    [*'<>/\n }"1é🙂', "\n\n", "</think>", "<think>", "</", "<｜", f"<{D}", f"</{D}", f"<{D}tool_calls>\n"]
    + [f'<{D}invoke name="f">\n', f"</{D}invoke>\n", f"</{D}tool_calls>", f"</{D}parameter>\n", EOS]
    + [f'<{D}parameter name="{name}" string="{kind}">' for name, kind in (("a", "true"), ("b", "false"))]
)
VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), max_size=4) | st.integers()
CALLS = st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(st.sampled_from("ab<>"), VALUES)), max_size=3)
REPLIES = st.builds(
    lambda pieces, calls, end: ("".join(pieces) + (block(*calls) if calls else ""))[: end or None],
    st.lists(PIECES | st.text("ab \n", max_size=3), max_size=8),
    CALLS,
    st.integers(-40, 0),
)
FORMS = [
    ReplyFormat(thinking=thinking, resumes=resumes, tool_calls=calls, in_tool_calls=inside)
    for thinking, resumes in ((False, None), (True, None), (True, "reasoning"), (True, "content"))
    for calls, inside in ((False, False), (True, False), (True, True))
]


def piecewise(pieces: Sequence[str], form: ReplyFormat, reason: Any) -> Reply:
    """The reply that the deltas add up to, once that is found to be the one that `finish` returns."""
    parser = ReplyParser(form)
    deltas = [parser.feed(piece) for piece in pieces]
    last, reply = parser.finish(reason)
    reasoning, content, calls = "", "", [["", ""] for _ in reply.tool_calls]
    for delta in (*deltas, last):
        if delta is not None:
            reasoning += delta.reasoning
            content += delta.content
            for part in delta.tool_calls:
                calls[part.index][0] += part.name or ""
                calls[part.index][1] += part.arguments
    assert (reasoning, content) == (reply.reasoning or "", reply.content)
    assert calls == [[call.name, call.arguments] for call in reply.tool_calls]
    for call in reply.tool_calls:
        call.id = ""  # drawn at random
    return reply


@given(text=REPLIES, form=st.sampled_from(FORMS), reason=st.sampled_from(["stop", "length"]), data=st.data())
def test_the_reply_does_not_depend_on_where_the_text_is_split(
    text: str, form: ReplyFormat, reason: Any, data: st.DataObject
) -> None:
    whole = piecewise([text], form, reason)
    assert piecewise(list(text), form, reason) == whole
    for cut in range(1, len(text)):
        assert piecewise([text[:cut], text[cut:]], form, reason) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    ends = zip([0, *cuts], [*cuts, len(text)], strict=True)
    assert piecewise([text[a:b] for a, b in ends], form, reason) == whole


@given(calls=CALLS.filter(bool), reasoning=st.text("ab <", max_size=5), content=st.text("ab ", max_size=5))
def test_what_is_written_by_the_layout_is_read_back(calls: Made, reasoning: str, content: str) -> None:
    reply = parse(f"{reasoning}</think>{content}{block(*calls)}", THINKING)
    assert (reply.reasoning, reply.content, made(reply)) == (reasoning, content, calls)
    assert (reply.finish_reason, reply.unparsed) == ("tool_calls", "")


def test_a_long_argument_takes_linear_time() -> None:
    """A file written by a tool call, a token at a time; quadratic, this would take minutes."""
    parser = ReplyParser(CHAT)
    text = block(("write", {"text": "line of code < 1\n" * 6000}))
    for at in range(0, len(text), 4):
        parser.feed(text[at : at + 4])
    assert made(parser.finish("stop")[1]) == [("write", {"text": "line of code < 1\n" * 6000})]
