"""Where an output ends, what is shown of it meanwhile, and which of its tokens are wholly in it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.engine import EOS, byte_tokenizer
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.decoding.stopping import StopWatch
from weft.runtime.engine import messages as m
from weft.runtime.engine.calls import GenerateCall
from weft.runtime.engine.core import Sequence
from weft.runtime.errors import RequestError

# -- the watch alone ---------------------------------------------------------------------------------


def watch(pieces: list[str], **params: tuple[str, ...]) -> tuple[str, str | None, list[str]]:
    """(final text, stop, what was shown after each piece and at the end)."""
    watch = StopWatch(SamplingParams(**params))
    shown, stop = [], None
    for piece in pieces:
        stop = watch.feed(piece)
        if stop is not None:
            break
        shown.append(watch.showable())
    shown.append(watch.showable(final=True))
    assert watch.showable(final=True) == ""
    return watch.text, stop, shown


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stop"),
    [
        (["ab", "cd"], ("bc",), "a", "bc"),
        (["a", "b", "c", "d"], ("abcd",), "", "abcd"),
        (["abcd"], ("bc",), "a", "bc"),
        (["ab", "ab", "c"], ("abc",), "ab", "abc"),
        (["a", "ab"], ("aab",), "", "aab"),
        (["xyzab"], ("ab", "yz"), "x", "yz"),  # the earliest wins, in whatever order they are given
        (["xyzab"], ("yz", "ab"), "x", "yz"),
        (["abcd"], ("bcd", "abc"), "", "abc"),
        (["bcd"], ("abcd", "bcd"), "", "bcd"),
        (["ab"], ("abc", "b"), "a", "b"),
        (["né", "é!"], ("éé",), "n", "éé"),
        (["", "a", "", "b"], ("ab",), "", "ab"),
        (["abc"], ("x", "abd"), "abc", None),
    ],
)
def test_stop_strings(pieces: list[str], stops: tuple[str, ...], text: str, stop: str | None) -> None:
    found, which, shown = watch(pieces, stop=stops)
    assert (found, which) == (text, stop)
    assert "".join(shown) == text


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=12), stops=STOPS)
def test_text_shown_is_never_taken_back(pieces: list[str], stops: tuple[str, ...]) -> None:
    text, stop, shown = watch(pieces, stop=stops)
    assert "".join(shown) == text
    whole = "".join(pieces)
    if stop is None:
        assert text == whole
        assert not any(s in whole for s in stops)
    else:
        assert whole.startswith(text + stop)
        ends = [whole.index(s) + len(s) for s in stops if s in whole]
        # Some stop is complete by the end of the piece that held the first complete one.
        held = next(n for n in range(len(pieces) + 1) if len("".join(pieces[:n])) >= min(ends))
        seen = "".join(pieces[:held])
        assert len(text) == min(seen.index(s) for s in stops if s in seen)


@given(pieces=st.lists(st.text("abc", max_size=3), max_size=12), stops=STOPS)
def test_only_what_could_begin_a_stop_is_held_back(pieces: list[str], stops: tuple[str, ...]) -> None:
    watch, shown = StopWatch(SamplingParams(stop=stops)), ""
    for piece in pieces:
        if watch.feed(piece) is not None:
            return
        shown += watch.showable()
        held = watch.text[len(shown) :]
        assert held == "" or any(s.startswith(held) for s in stops)


def test_regular_expressions_show_nothing_before_the_end() -> None:
    text, stop, shown = watch(["ab", "c1", "2d"], stop_regex=("[0-9]+",))
    assert (text, stop) == ("abc", "1")
    assert shown == ["", "abc"]


@pytest.mark.parametrize(
    ("pieces", "pattern", "text", "stop"),
    [
        (["a", "b", "12"], "b1", "a", "b1"),
        (["éé", "1"], "[0-9]", "éé", "1"),  # positions are characters, not UTF-8 bytes
        (["one\n", "\ntwo"], r"\n\n", "one", "\n\n"),
        (["abc"], "x", "abc", None),
        (["Abc"], "(?i)a", "", "A"),
    ],
)
def test_stop_regex(pieces: list[str], pattern: str, text: str, stop: str | None) -> None:
    assert watch(pieces, stop_regex=(pattern,))[:2] == (text, stop)


def test_the_earliest_of_strings_and_expressions_wins() -> None:
    assert watch(["xa1"], stop=("1",), stop_regex=("a",))[:2] == ("x", "a")
    assert watch(["x1a"], stop=("1",), stop_regex=("a",))[:2] == ("x", "1")


def test_a_hostile_expression_takes_linear_time() -> None:
    text, stop, _ = watch(["a" * 30] * 200, stop_regex=("(a*)*b",))  # hopeless by backtracking
    assert (len(text), stop) == (6000, None)


@pytest.mark.parametrize("pattern", ["(", "a{1000}{1000}", "(?=a)b", "\ud800"])
def test_an_expression_re2_refuses_names_the_field(pattern: str) -> None:
    with pytest.raises(RequestError) as caught:
        StopWatch(SamplingParams(stop_regex=("ok", pattern)))
    assert (caught.value.field, caught.value.value) == ("stop_regex", pattern)
    assert "b'" not in caught.value.reason


@pytest.mark.parametrize("params", [{"stop": ("a",)}, {"stop": ("a", "xyz")}, {"stop_regex": ("a",)}])
def test_a_stop_complete_before_stopping_is_allowed_is_no_stop(params: dict[str, tuple[str, ...]]) -> None:
    watch = StopWatch(SamplingParams(**params))
    assert watch.feed("a", may_stop=False) is None
    assert watch.feed("b", may_stop=False) is None
    assert watch.feed("c") is None
    assert watch.feed("da") == "a"
    assert watch.text == "abcd"


# -- a whole output ----------------------------------------------------------------------------------


@dataclass
class Output:
    text: str
    shown: list[str]
    tokens: list[int]
    done: m.Done


def generate(tokens: list[int], params: SamplingParams) -> Output:
    """A call that draws `tokens` up to its end; give it as many as `params` ask for."""
    call = GenerateCall(1, Sequence([EOS]), params, byte_tokenizer())
    taken, shown = [], []
    for token in tokens:
        event = call.drawn(token, None)
        assert event is not None
        taken.append(token)
        shown.append(event.text)
        if call.finish_reason is not None:
            break
    event = call.flush()
    shown.append(event.text if event else "")
    return Output("".join(shown), shown, taken, call.done())


def as_tokens(data: bytes) -> list[int]:
    return [3 + byte for byte in data]


@pytest.mark.parametrize(
    ("data", "stops", "text", "kept"),
    [
        ("abc", ("c",), "ab", 2),
        ("aé", ("é",), "a", 1),  # é is two tokens, and the first is no part of the text
        ("aé", ("x",), "aé", 3),
        ("中文", ("文",), "中", 3),
        ("a中", ("a中",), "", 0),
        ("ab", ("x",), "ab", 2),
    ],
)
def test_kept_counts_tokens_wholly_in_the_text(data: str, stops: tuple[str, ...], text: str, kept: int) -> None:
    tokens = as_tokens(data.encode())
    out = generate(tokens, SamplingParams(max_tokens=len(tokens), stop=stops))
    assert (out.text, out.done.kept) == (text, kept)


@pytest.mark.parametrize("start", [b"ab", b"a\xe4\xb8", b"\xff"])
def test_a_token_that_stops_is_never_kept(start: bytes) -> None:
    """Also when the output before it ends in the middle of a character."""
    out = generate([*as_tokens(start), EOS], SamplingParams())
    assert out.text == start.decode(errors="replace")
    assert (out.done.finish_reason, out.done.stop, out.done.kept) == ("stop", EOS, len(start))


TOKENS = st.lists(
    st.sampled_from([*as_tokens("aé中".encode()), 3 + 0xFF, 260, EOS]) | st.integers(0, 264), max_size=20
)
TEXTS = st.lists(st.sampled_from(("a", "é", "中", "aé", "\ufffd", "中a", "User")), max_size=2).map(tuple)


@given(tokens=TOKENS.filter(len), stops=TEXTS, ids=st.sampled_from(((), (3 + ord("a"),))), ignore=st.booleans())
def test_a_whole_output_in_plain_words(
    tokens: list[int], stops: tuple[str, ...], ids: tuple[int, ...], ignore: bool
) -> None:
    params = SamplingParams(max_tokens=len(tokens), stop=stops, stop_token_ids=ids, ignore_eos=ignore)
    out = generate(tokens, params)
    decode = byte_tokenizer().decode
    ends = {*ids, *(() if ignore else (EOS,))}
    body = [token for token in out.tokens if token not in ends]
    assert body == out.tokens[: len(body)]  # an ending token is the last
    whole = decode(body)
    if isinstance(out.done.stop, str):
        assert whole.startswith(out.text + out.done.stop)
        assert out.done.stop in stops
    else:
        assert out.text == whole
    if out.done.finish_reason == "length":
        assert (out.done.stop, out.tokens) == (None, tokens)
    # A token is in the text if every character that its bytes are part of is.
    assert out.done.kept == sum(len(decode(body[: i + 1])) <= len(out.text) for i in range(len(body)))


def test_special_tokens_are_spelled_out_and_can_hold_a_stop() -> None:
    out = generate([*as_tokens(b"hi"), 259, 70], SamplingParams(max_tokens=4, stop=("User",)))
    assert out.text == "hi<｜"
    assert (out.done.stop, out.done.kept) == ("User", 2)


def test_ignored_eos_is_text() -> None:
    out = generate([EOS, 3 + ord("a")], SamplingParams(max_tokens=2, ignore_eos=True))
    assert out.text == byte_tokenizer().decode([EOS]) + "a"
    assert (out.done.finish_reason, out.done.kept) == ("length", 2)


@pytest.mark.parametrize("params", [{"stop": ("a",)}, {"stop_regex": ("a",)}])
def test_stops_wait_for_min_tokens(params: dict[str, tuple[str, ...]]) -> None:
    out = generate(as_tokens(b"abaca"), SamplingParams(max_tokens=5, min_tokens=4, **params))
    assert (out.text, out.done.stop, len(out.tokens)) == ("abac", "a", 5)


def test_before_min_tokens_the_tokens_that_would_end_it_are_blocked() -> None:
    params = SamplingParams(max_tokens=3, min_tokens=2, stop_token_ids=(7,), seed=1)
    call = GenerateCall(1, Sequence([EOS]), params, byte_tokenizer())
    blocked = []
    for token in as_tokens(b"abc"):
        blocked.append(set(call.draw().blocked))
        call.drawn(token, None)
    assert blocked == [{7, EOS}, {7, EOS}, set()]
