"""Text to tokens and back without losing a byte, and token by token without half a character."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from support.engine import VOCABULARY, byte_tokenizer
from weft.runtime.errors import CheckpointError
from weft.runtime.text.tokenizer import TextStream, Tokenizer, byte_tokenizer_json
from weft.runtime.text.tokens import BOS, EOS, LEADING, PAD, TRAILING, USER

SPECIALS = (*LEADING, *TRAILING)
# Some ids are the same 12 bytes, so that characters of several bytes come out whole now and then.
IDS = st.lists(
    st.integers(0, VOCABULARY - 1) | st.sampled_from([3 + byte for byte in "aé中🙂\ufeff".encode()]), max_size=24
)
TEXT = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not any(s in text for s in SPECIALS))


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """A byte-level BPE that merges within words, so that tokens hold several bytes or parts of characters."""
    raw = json.loads(byte_tokenizer_json())
    vocabulary, merges = raw["model"]["vocab"], []
    for left, right in (("h", "e"), ("l", "l"), ("he", "ll"), ("Ã", "©"), ("ä", "¸"), ("Ġ", "he")):
        merges.append([left, right])
        vocabulary[left + right] = len(vocabulary)
    raw["model"]["merges"] = merges
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(raw)))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.feed(id) for id in ids), stream.finish()]


# -- text to tokens to text --------------------------------------------------------------------------


@given(text=TEXT)
def test_text_survives(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == [3 + byte for byte in text.encode()]


@given(parts=st.lists(TEXT | st.sampled_from(SPECIALS), max_size=6))
def test_text_with_specials_survives(parts: list[str]) -> None:
    text = "".join(parts)
    assert byte_tokenizer().decode(byte_tokenizer().encode(text)) == text


@given(text=st.text("hel é中", max_size=30))
def test_merged_tokens_survive(merging: Tokenizer, text: str) -> None:
    ids = merging.encode(text)
    assert merging.decode(ids) == text == "".join(pieces(merging, ids))


def test_merges_are_used(merging: Tokenizer) -> None:
    assert len(merging.encode("hell hell")) == 3
    assert merging.token_bytes(merging.encode("é")[0]) == "é".encode()
    assert [merging.token_bytes(id) for id in merging.encode("中")] == [b"\xe4\xb8", b"\xad"]


@given(parts=st.lists(TEXT | st.sampled_from(SPECIALS), max_size=6))
def test_plain_text_never_becomes_a_special(parts: list[str]) -> None:
    text = "".join(parts)
    ids = byte_tokenizer().encode_plain(text)
    assert ids == [3 + byte for byte in text.encode()]


def test_no_space_is_added_or_dropped() -> None:
    for text in (" a", "a ", "  a  b  ", "\n\ta", " "):
        assert byte_tokenizer().decode(byte_tokenizer().encode(text)) == text


# -- specials ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", SPECIALS)
def test_a_specials_spelling_is_one_token(special: str) -> None:
    tokenizer = byte_tokenizer()
    (id,) = tokenizer.encode(special)
    assert tokenizer.decode([id]) == special
    assert tokenizer.encode(f"a{special}b") == [3 + ord("a"), id, 3 + ord("b")]


def test_leading_specials_have_the_ids_of_v4() -> None:
    assert [byte_tokenizer().encode(special) for special in (BOS, EOS, PAD)] == [[0], [1], [2]]
    assert (byte_tokenizer().bos, byte_tokenizer().eos) == (0, 1)
    assert byte_tokenizer().size == 3 + 256 + len(TRAILING)


def test_no_bos_is_added() -> None:
    assert byte_tokenizer().encode("") == []


def test_ids_that_are_not_defined_are_nothing() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.token_bytes(tokenizer.size) == b""
    assert tokenizer.decode([3 + ord("a"), tokenizer.size, 3 + ord("b")]) == "ab"


# -- one token at a time -----------------------------------------------------------------------------


@given(ids=IDS)
def test_pieces_join_to_the_whole(ids: list[int]) -> None:
    assert "".join(pieces(byte_tokenizer(), ids)) == byte_tokenizer().decode(ids)


@given(text=TEXT)
def test_characters_come_whole_with_their_last_byte(text: str) -> None:
    seen = pieces(byte_tokenizer(), [3 + byte for byte in text.encode()])
    assert [piece for piece in seen if piece] == list(text)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff", ["\ufffd", ""]),
        (b"\xc3", ["", "\ufffd"]),
        (b"\xc3a", ["", "\ufffda", ""]),
        (b"\xe4\xb8\xad", ["", "", "中", ""]),
        (b"\xe4\xb8\xe4\xb8\xad", ["", "", "\ufffd", "", "中", ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),  # a surrogate is no character
        (b"\xc0\xaf", ["\ufffd", "\ufffd", ""]),
    ],
)
def test_bytes_that_are_no_text(data: bytes, expected: list[str]) -> None:
    ids = [3 + byte for byte in data]
    assert pieces(byte_tokenizer(), ids) == expected
    assert "".join(expected) == data.decode(errors="replace")


def test_a_special_ends_half_a_character() -> None:
    user = byte_tokenizer().encode(USER)[0]
    assert pieces(byte_tokenizer(), [3 + 0xE4, user]) == ["", "\ufffd" + USER, ""]


# -- files -------------------------------------------------------------------------------------------


def test_load_takes_the_folder_or_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(byte_tokenizer_json(), encoding="utf-8")
    for path in (tmp_path, file):
        assert Tokenizer.load(path).encode("aé" + EOS) == byte_tokenizer().encode("aé" + EOS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="elsewhere"):
        Tokenizer.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe"])
def test_a_malformed_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


def without(special: str) -> str:
    raw = json.loads(byte_tokenizer_json())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != special]
    del raw["model"]["vocab"][special]
    return json.dumps(raw)


@pytest.mark.parametrize("special", [BOS, EOS])
def test_a_tokenizer_without_bos_or_eos_is_refused_when_loaded(tmp_path: Path, special: str) -> None:
    (tmp_path / "tokenizer.json").write_text(without(special), encoding="utf-8")
    with pytest.raises(CheckpointError, match="lacks the token .*" + special[2:5]):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused_when_loaded(tmp_path: Path) -> None:
    """Tokens that are no byte-level BPE's cannot be turned back to bytes."""
    raw = json.loads(byte_tokenizer_json())
    raw["model"]["vocab"]["▁the"] = len(raw["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match="▁the"):
        Tokenizer.load(tmp_path)


@given(st.lists(TEXT | st.sampled_from(SPECIALS), max_size=8), st.integers(0, 60))
def test_long_texts_have_the_tokens_of_short_ones(parts: list[str], times: int) -> None:
    """They take another way through the library."""
    tokenizer, text = byte_tokenizer(), "".join(parts)
    assert tokenizer.encode((text + EOS) * times) == tokenizer.encode(text + EOS) * times


def test_other_threads_go_on_while_a_long_text_is_encoded() -> None:
    started, ticks = threading.Event(), 0

    def encode() -> None:
        started.set()
        byte_tokenizer().encode("The room of Tolkar is 423. " * 40_000)

    thread = threading.Thread(target=encode)
    thread.start()
    started.wait()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20, "a library that held the interpreter would leave time for one or two"
