"""Text to token ids and back, over a checkpoint's tokenizer.json."""

from __future__ import annotations

import bisect
import codecs
import itertools
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers

from weft.runtime.errors import CheckpointError
from weft.runtime.text.tokens import BOS, EOS, LEADING, TRAILING

# Texts of so many characters are remembered with their tokens, the last so many.
_SHORT, _KEPT = 512, 2048


class Tokenizer:
    """A byte-level BPE tokenizer with V4's special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._bytes = {id: token.content.encode() for id, token in backend.get_added_tokens_decoder().items()}
        self._known = lru_cache(_KEPT)(self._encoded)
        self._specials = {id: token.content.encode() for id, token in backend.get_added_tokens_decoder().items()}
        self.size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read `path`/tokenizer.json (or the file itself)."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise CheckpointError(f"{file}: no tokenizer.json")
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
        tokenizer.check()
        return tokenizer

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def check(self) -> None:
        """Raise `CheckpointError` unless it has BOS and EOS and all its tokens are bytes."""
        _ = self.bos, self.eos
        for token, id in self._backend.get_vocab(with_added_tokens=True).items():
            if id not in self._specials and not all(char in _BYTE_OF_CHAR for char in token):
                raise CheckpointError(f"tokenizer.json: {token!r} is no token of a byte-level tokenizer")

    def encode(self, text: str) -> list[int]:
        """Token ids; the spelling of a special token becomes that token. Adds no BOS."""
        # What is between generations is short, and the same for thousands of programs.
        return list(self._known(text)) if len(text) <= _SHORT else self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        if len(text) <= _SHORT:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        # As a batch of one: only those let other threads of the process go on meanwhile.
        batch: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return batch

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text from outside: the spelling of a special token is characters like any others."""
        ids = self.encode(text)
        if self._specials.keys().isdisjoint(ids):
            return ids
        # The library's own switch for this leaves out added tokens that are not flagged special, so its stages
        # are run here, without the one that looks for added tokens.
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        split = self._backend.pre_tokenizer
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)] if split is not None else [text]
        ids = [token.id for piece in pieces for token in self._backend.model.tokenize(piece)]
        if not self._specials.keys().isdisjoint(ids):
            raise CheckpointError("tokenizer.json: its merges build special tokens out of plain text")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the tokens, specials spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def is_special(self, id: int) -> bool:
        """Whether text on both sides of it is encoded apart."""
        return id in self._specials

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for; empty for an id the tokenizer does not define."""
        known = self._bytes.get(id)
        if known is None:
            token = self._backend.id_to_token(id)
            known = bytes(map(_BYTE_OF_CHAR.__getitem__, token)) if token is not None else b""
            self._bytes[id] = known
        return known

    def beginning(self, text: bytes) -> list[int]:
        """Tokens that such text can begin with: its first bytes, or all of it and more. No special ones."""
        table, ids = self._sorted, []
        for end in range(1, len(text)):
            first = bisect.bisect_left(table, (text[:end], -1))
            ids += [id for token, id in table[first : first + 1] if token == text[:end]]
        first = bisect.bisect_left(table, (text, -1))
        for token, id in itertools.islice(table, first, None):
            if not token.startswith(text):
                break
            ids.append(id)
        return ids

    @cached_property
    def _sorted(self) -> list[tuple[bytes, int]]:
        """Tokens by their bytes."""
        return sorted((self.token_bytes(id), id) for id in range(self.size) if id not in self._specials)

    @cached_property
    def bos(self) -> int:
        return self._special(BOS)

    @cached_property
    def eos(self) -> int:
        return self._special(EOS)

    def _special(self, content: str) -> int:
        id: int | None = self._backend.token_to_id(content)
        if id is None:
            raise CheckpointError(f"tokenizer.json lacks the token {content}")
        return id


class TextStream:
    """Decodes tokens one by one and never shows half a character.

    The pieces join to exactly what `Tokenizer.decode` gives for all tokens, `finish` included.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    @property
    def unfinished(self) -> str:
        """What `finish` would give now: the bytes that may still become a character, shown as U+FFFD."""
        return self._decoder.getstate()[0].decode(errors="replace")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of `byte_tokenizer_json`."""
    return Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer_json()))


def byte_tokenizer_json() -> str:
    """tokenizer.json of a tokenizer without merges: V4's special tokens and the 256 bytes.

    For checkpoints with random weights. Ids: BOS, EOS, PAD are 0..2, byte b is 3 + b, then the other specials.
    """
    vocabulary = {token: id for id, token in enumerate(LEADING)}
    for char in sorted(_BYTE_OF_CHAR, key=_BYTE_OF_CHAR.__getitem__):
        vocabulary[char] = len(vocabulary)
    for token in TRAILING:
        vocabulary[token] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in (*LEADING, *TRAILING)])
    json: str = backend.to_str()
    return json


def _byte_chars() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 bytes stand for themselves, the rest follow from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_chars()
