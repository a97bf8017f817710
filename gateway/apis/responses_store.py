"""Responses that are kept, each key's its own: to be retrieved, streamed again, and gone on from."""

from __future__ import annotations

import asyncio
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
from weft.gateway.http.shelf import Shelf
from weft.gateway.http.state import State

_FIXED = 512  # bytes of an event beside its own


class Kept:
    """One response with what it was asked. conversation: the first response of those it goes on from."""

    def __init__(self, response: Response, items: Sequence[InputItem], owner: str, conversation: str) -> None:
        self.response, self.items, self.owner, self.conversation = response, list(items), owner, conversation
        self.events: list[ResponseEvent] = []
        self.listener: Callable[[ResponseEvent], Awaitable[None]] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.size = 1024 + len(msgspec.json.encode(self.items))
        self._closed = False
        self._more = asyncio.Condition()
        self.told = 0  # events

    @property
    def under_way(self) -> bool:
        return self.response.status in ("queued", "in_progress")

    async def tell(self, event: ResponseEvent) -> None:
        event.sequence_number = self.told
        self.told += 1
        if self.response.background:
            # Responses and items go on to change; what was told does not.
            raw = msgspec.json.encode(event)
            self.events.append(msgspec.json.decode(raw, type=ResponseEvent))
            self.size += _FIXED + len(raw)
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
        self.size += len(msgspec.json.encode(self.response))
        async with self._more:
            self._more.notify_all()

    async def cancel(self) -> None:
        """End it, if it is under way in the background."""
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})
        if self.under_way and self.task is not None:
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


class Responses(Shelf[Kept]):
    """Those of one server."""

    def __init__(self, state: State) -> None:
        super().__init__("response", state.config.bounds.kept, state.config.bounds.kept_bytes)
