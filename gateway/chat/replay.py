"""Turns as they were drawn, so that a history which an agent sends back has the tokens that it was made of.

Clients drop reasoning, sort keys and trim text. A turn is found by the ids of its calls, by the signature that its
reasoning was given, or by what was said before it; its tokens are taken if its content and calls still mean the
same. What a client has changed is read as it stands.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.runtime.text.chat_output import Reply

_FIXED = 512  # bytes of an entry beside its tokens and texts
Key = tuple[str, str, str]  # namespace, kind, id


@dataclass(frozen=True)
class Drawn:
    """A turn: its tokens from behind <｜Assistant｜> on, and what they say."""

    tokens: array[int]
    reasoning: str | None
    content: str
    calls: tuple[tuple[str, str, str], ...]  # id, name, arguments as they were drawn
    keys: tuple[Key, ...]

    @property
    def size(self) -> int:
        texts = (self.reasoning or "", self.content, *(part for call in self.calls for part in call))
        return _FIXED + self.tokens.itemsize * len(self.tokens) + sum(map(len, texts))

    def means(self, message: Mapping[str, Any]) -> bool:
        """Whether the message says the same. Reasoning that it lacks was left out."""
        reasoning = message.get("reasoning_content")
        if reasoning and reasoning.strip() != (self.reasoning or "").strip():
            return False
        if text_of(message.get("content")).strip() != self.content.strip():
            return False
        given = [call["function"] for call in message.get("tool_calls") or ()]
        own = [(name, arguments) for _, name, arguments in self.calls]
        return len(given) == len(own) and all(
            function["name"] == name and canonical(function["arguments"]) == canonical(arguments)
            for function, (name, arguments) in zip(given, own, strict=True)
        )

    def restored(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message, as it would have to be for the layout to be the one that was drawn."""
        whole = dict(message)
        if self.reasoning:
            whole["reasoning_content"] = self.reasoning
        if self.calls:
            whole["tool_calls"] = [
                {**call, "function": {"name": name, "arguments": arguments}}
                for call, (_, name, arguments) in zip(message["tool_calls"], self.calls, strict=True)
            ]
        return whole


class Replay:
    """The turns drawn last, up to so many bytes, each namespace's its own. Used from one event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._turns: OrderedDict[str, Drawn] = OrderedDict()  # by an id of ours
        self._ids: dict[Key, str] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def put(
        self, namespace: str, id: str, messages: Sequence[Mapping[str, Any]], reply: Reply, tokens: Sequence[int]
    ) -> None:
        """Remember the reply to these messages. id: a new one, which reasoning can be signed with."""
        keys: list[Key] = [(namespace, "signed", id)]
        keys += [(namespace, "call", call.id) for call in reply.tool_calls]
        said = _said("assistant", reply.content, [(c.name, c.arguments) for c in reply.tool_calls])
        keys.append((namespace, "chain", _chained(_last(chain(messages)), said)))
        calls = tuple((call.id, call.name, call.arguments) for call in reply.tool_calls)
        drawn = Drawn(array("i", tokens), reply.reasoning, reply.content, calls, tuple(keys))
        self._turns[id] = drawn
        self._size += drawn.size
        for key in keys:
            self._ids[key] = id
        while self._size > self._most:
            self._forget()

    def apply(
        self, namespace: str, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[array[int] | None]]:
        """The messages with what was left out of them put back, and the tokens of each assistant message, if
        known. A message's `signature` says which turn it was; it is taken off."""
        whole: list[dict[str, Any]] = []
        tokens: list[array[int] | None] = []
        for message, said in zip(messages, chain(messages), strict=True):
            own = {key: value for key, value in message.items() if key != "signature"}
            if own.get("role") == "assistant":
                drawn = None if own.get("prefix") else self._find(namespace, message, said)
                tokens.append(None if drawn is None else drawn.tokens)
                own = own if drawn is None else drawn.restored(own)
            whole.append(own)
        return whole, tokens

    def _find(self, namespace: str, message: Mapping[str, Any], said: str) -> Drawn | None:
        keys: list[Key] = [(namespace, "call", call["id"]) for call in (message.get("tool_calls") or ())[:1]]
        if message.get("signature"):
            keys.append((namespace, "signed", message["signature"]))
        for key in (*keys, (namespace, "chain", said)):
            id = self._ids.get(key)
            if id is not None and self._turns[id].means(message):
                self._turns.move_to_end(id)
                return self._turns[id]
        return None

    def _forget(self) -> None:
        id, drawn = self._turns.popitem(last=False)
        self._size -= drawn.size
        for key in drawn.keys:
            if self._ids.get(key) == id:  # a later turn may have said the same
                del self._ids[key]


def chain(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For each message a digest of it and of all before, in which reasoning, ids, key order and outer whitespace
    do not count."""
    before = ""
    for message in messages:
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        calls = [(function["name"], function["arguments"]) for function in functions]
        before = _chained(before, _said(str(message.get("role")), text_of(message.get("content")), calls))
        yield before


def _last(digests: Iterator[str]) -> str:
    return list(digests)[-1]


def _said(role: str, content: str, calls: Sequence[tuple[str, str]]) -> str:
    return json.dumps([role, content.strip(), [[name, canonical(arguments)] for name, arguments in calls]])


def _chained(before: str, said: str) -> str:
    return hashlib.blake2b((before + said).encode(), digest_size=16).hexdigest()


def text_of(content: Any) -> str:
    """A message's content as one text."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or "" for part in content or () if isinstance(part, dict))


def canonical(arguments: str) -> str:
    """JSON that is the same for documents that mean the same; the text itself if it is none."""
    try:
        return json.dumps(_plain(json.loads(arguments)), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _plain(value: Any) -> Any:
    """1.0 is 1: not every client keeps them apart."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
