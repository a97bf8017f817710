"""A response while it is made: its items, and the events that tell of them."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from weft.gateway.apis.common import logprob_entries
from weft.gateway.apis.responses_types import (
    Incomplete,
    InputDetails,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Response,
    ResponseEvent,
    ResponseUsage,
)
from weft.gateway.chat.base import Ended, Part
from weft.runtime.text.chat_output import CallDelta
from weft.runtime.text.tokenizer import Tokenizer

Tell = Callable[[ResponseEvent], Awaitable[None]]


class Builder:
    """Items follow one another; each is begun, added to and ended. Changes the response in place."""

    def __init__(self, response: Response, tell: Tell, sign: str | None, logprobs: int | None) -> None:
        """sign: put into `encrypted_content` of reasoning. logprobs: alternatives to list with the text."""
        self.response = response
        self._tell, self._sign, self._top = tell, sign, logprobs
        self._text: list[str] = []  # of the open item
        self._calls: dict[int, int] = {}  # which output a call is

    async def begin(self) -> None:
        await self._say("response.created", response=self._shown())
        self.response.status = "in_progress"
        await self._say("response.in_progress", response=self._shown())

    async def add(self, event: Part | Ended) -> None:
        delta = event.delta
        if delta.reasoning:
            if not isinstance(self._last, OutputReasoning):
                await self._open(OutputReasoning(id=_id("rs"), status="in_progress", content=[ReasoningText("")]))
            await self._more("response.reasoning_text.delta", delta.reasoning)
        if delta.content:
            await self._content(delta.content)
        for call in delta.tool_calls:
            await self._call(call)

    async def end(self, event: Ended, tokenizer: Tokenizer, now: int) -> None:
        reply, response, took = event.reply, self.response, event.receipt
        if reply.unparsed and reply.finish_reason == "stop":
            await self._content(reply.unparsed)
        whole = reply.finish_reason != "length"
        last = self._last
        # A call may be whole where the reply is not.
        calls = {id(response.output[place]): reply.tool_calls[call] for call, place in self._calls.items()}
        await self._close(calls[id(last)].complete if isinstance(last, OutputCall) else whole)
        if self._top is not None:
            entries = [msgspec.to_builtins(e) for e in logprob_entries(tokenizer, event.logprobs, self._top)]
            for item in response.output:
                if isinstance(item, OutputMessage):
                    item.content[0].logprobs = entries
        response.usage = ResponseUsage(
            input_tokens=took.prompt,
            input_tokens_details=InputDetails(took.cached),
            output_tokens=took.generated,
            output_tokens_details=OutputDetails(event.reasoning),
            total_tokens=took.prompt + took.generated,
            receipt=took,
        )
        response.completed_at = now
        response.status = "completed" if whole else "incomplete"
        response.incomplete_details = None if whole else Incomplete()
        await self._say(f"response.{response.status}", response=self._shown())

    @property
    def _last(self) -> OutputItem | None:
        return self.response.output[-1] if self.response.output and self._text else None

    async def _content(self, text: str) -> None:
        if not isinstance(self._last, OutputMessage):
            await self._open(OutputMessage(id=_id("msg"), status="in_progress", content=[OutputText("")]))
        await self._more("response.output_text.delta", text)

    async def _call(self, call: CallDelta) -> None:
        if call.id is not None:
            item = OutputCall(
                id=_id("fc"), call_id=call.id, name=call.name or "", arguments="", status="in_progress"
            )
            await self._open(item)
            self._calls[call.index] = len(self.response.output) - 1
        if call.arguments:
            await self._more("response.function_call_arguments.delta", call.arguments)

    async def _open(self, item: OutputItem) -> None:
        await self._close(True)
        self.response.output.append(item)
        self._text = [""]
        await self._say("response.output_item.added", item=item)
        if not isinstance(item, OutputCall):
            await self._of_item("response.content_part.added", part=item.content[0])

    async def _more(self, kind: str, text: str) -> None:
        self._text.append(text)
        extra: dict[str, Any] = {"logprobs": []} if kind == "response.output_text.delta" else {}
        await self._of_item(kind, delta=text, **extra)

    async def _close(self, whole: bool) -> None:
        """End the open item. whole: what it says is all there."""
        item = self._last
        if item is None:
            return
        text, self._text = "".join(self._text), []
        item.status = "completed" if whole else "incomplete"
        match item:
            case OutputCall():
                item.arguments = text
                if whole:  # else nobody may run it
                    kind = "response.function_call_arguments.done"
                    await self._of_item(kind, arguments=text, name=item.name)
            case OutputReasoning():
                item.content[0].text = text
                item.encrypted_content = self._sign
                await self._of_item("response.reasoning_text.done", text=text)
            case OutputMessage():
                item.content[0].text = text
                await self._of_item("response.output_text.done", text=text, logprobs=[])
        if not isinstance(item, OutputCall):
            await self._of_item("response.content_part.done", part=item.content[0])
        await self._say("response.output_item.done", item=item)

    async def _of_item(self, kind: str, **fields: Any) -> None:
        item = self.response.output[-1]
        place: dict[str, Any] = {} if isinstance(item, OutputCall) else {"content_index": 0}
        await self._say(kind, item_id=item.id, **place, **fields)

    async def _say(self, kind: str, **fields: Any) -> None:
        if "response" not in fields:
            fields["output_index"] = len(self.response.output) - 1
        await self._tell(ResponseEvent(type=kind, **fields))

    def _shown(self) -> Response:
        """As it is now: it goes on to change."""
        return msgspec.structs.replace(self.response, output=list(self.response.output))


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
