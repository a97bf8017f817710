"""Responses that are kept, each key's its own: to be retrieved, streamed again, and gone on from."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec

from weft.gateway.apis.responses_types import (
    InputItem,
    InputPart,
    OutputCall,
    OutputMessage,
    OutputReasoning,
    Response,
    ResponseEvent,
)
from weft.gateway.http.errors import HttpError
from weft.gateway.http.keys import Caller
from weft.gateway.http.state import State


class Kept:
    """One response with what it was asked. conversation: the first response of those it goes on from."""

    def __init__(self, response: Response, items: Sequence[InputItem], owner: str, conversation: str) -> None:
        self.response, self.items, self.owner, self.conversation = response, list(items), owner, conversation
        self.events: list[ResponseEvent] = []
        self.listener: Callable[[ResponseEvent], Awaitable[None]] | None = None
        self.task: asyncio.Task[Any] | None = None
        self._closed = False
        self._more = asyncio.Condition()
        self._count = 0

    @property
    def size(self) -> int:
        """Bytes, about."""
        return 1024 + len(msgspec.json.encode(self.response)) + len(msgspec.json.encode(self.items))

    async def tell(self, event: ResponseEvent) -> None:
        event.sequence_number = self._count
        self._count += 1
        if self.response.background:
            # Responses and items go on to change; what was told does not.
            self.events.append(msgspec.json.decode(msgspec.json.encode(event), type=ResponseEvent))
            async with self._more:
                self._more.notify_all()
        if self.listener is not None:
            await self.listener(event)

    async def follow(self, start: int) -> AsyncIterator[ResponseEvent]:
        """Events from this one on, until its end. Only those of a response in the background are kept."""
        if not self.response.background:
            raise HttpError(400, "only a response in the background can be streamed again", code="not_background")
        while True:
            while start < len(self.events):
                yield self.events[start]
                start += 1
            if self._closed:
                return
            async with self._more:
                if start == len(self.events) and not self._closed:
                    await self._more.wait()

    async def close(self) -> None:
        """It has ended."""
        self._closed = True
        async with self._more:
            self._more.notify_all()

    async def cancel(self) -> None:
        """End it, if it is under way in the background."""
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})
        if self.response.status in ("queued", "in_progress") and self.task is not None:
            self.response.status = "cancelled"
            await self.close()

    def history(self) -> list[InputItem]:
        """Its input and output, for one that goes on from it."""
        if self.response.status not in ("completed", "incomplete"):
            reason = f"the previous response is {self.response.status}"
            raise HttpError(400, reason, code="previous_response_not_ended", field="previous_response_id")
        whole = (i for i in self.response.output if not isinstance(i, OutputCall) or i.status == "completed")
        return [*self.items, *map(_as_input, whole)]

    def input_items(self) -> list[dict[str, Any]]:
        """As they are listed: with ids, and without what is not set."""
        listed = []
        for i, item in enumerate(self.items):
            plain = {k: v for k, v in msgspec.to_builtins(item).items() if v is not None}
            if isinstance(plain.get("content"), str):
                plain["content"] = [{"type": "input_text", "text": plain["content"]}]
            listed.append({"id": f"item_{i}", "type": "message", **plain})
        return listed


def _as_input(item: OutputMessage | OutputReasoning | OutputCall) -> InputItem:
    match item:
        case OutputMessage():
            parts = [InputPart(type="output_text", text=part.text) for part in item.content]
            return InputItem(type="message", id=item.id, role="assistant", content=parts)
        case OutputCall():
            return InputItem(
                type="function_call", id=item.id, call_id=item.call_id, name=item.name, arguments=item.arguments
            )
    text = [InputPart(type="reasoning_text", text=part.text) for part in item.content]
    return InputItem(type="reasoning", id=item.id, content=text, encrypted_content=item.encrypted_content)


class Responses:
    """At most so many and so many bytes; the longest unused are forgotten first, not those under way."""

    def __init__(self, state: State) -> None:
        bounds = state.config.bounds
        self._most, self._bytes = bounds.kept, bounds.kept_bytes
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()
        self._size = 0

    def keep(self, kept: Kept) -> None:
        self._kept[kept.response.id] = kept, kept.size
        self._size += kept.size
        for id, (old, size) in list(self._kept.items()):
            if len(self._kept) <= self._most and self._size <= self._bytes:
                break
            if old.response.status not in ("queued", "in_progress"):
                del self._kept[id]
                self._size -= size

    def find(self, caller: Caller, id: str) -> Kept:
        found = self._kept.get(id)
        if found is None or found[0].owner != caller.key:
            raise HttpError(404, f"there is no response {id[:80]!r}", code="response_not_found")
        self._kept.move_to_end(id)
        return found[0]

    def forget(self, kept: Kept) -> None:
        self._size -= self._kept.pop(kept.response.id)[1]
