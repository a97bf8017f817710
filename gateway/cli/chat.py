"""`weft chat`: turns on one history, each continuing from the KV of those before."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from weft.gateway.cli.generate import load_engine, sampling_params, show, utf8
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import ContextLengthError, RequestError
from weft.runtime.text.chat import Prompt, generation_of, render
from weft.runtime.text.chat_output import Reply, ReplyDelta, ReplyParser


def run(args: argparse.Namespace) -> int:
    if args.effort is not None and not args.thinking:
        raise RequestError("effort", args.effort, "is for turns with --thinking")
    params = sampling_params(args)
    with load_engine(args) as engine, asyncio.Runner() as runner:
        chat = Chat(engine, params, args.thinking, args.effort)
        if args.system is not None:
            chat.messages.append({"role": "system", "content": utf8("system", args.system)})
        with chat:
            for line in _lines():
                _turn(chat, runner, line, args.stats)
    return 0


def _lines() -> Iterator[str]:
    """Turns of the user, one a line, until the input ends or, at the prompt, Ctrl-C is pressed."""
    lines = _typed() if sys.stdin.isatty() else sys.stdin
    return (line.rstrip("\n") for line in lines if line.strip())


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  # makes input() edit and remember lines

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _turn(chat: Chat, runner: asyncio.Runner, line: str, stats: bool) -> None:
    screen = _Screen()
    try:
        figures = runner.run(chat.answer(utf8("line", line), screen.show))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        figures = "interrupted"
    except RequestError as error:
        if not sys.stdin.isatty():
            raise
        figures = str(error)
        stats = True
    screen.end()
    if stats:
        print(f"[{figures}]", file=sys.stderr)


class _Screen:
    """Prints a reply as it comes, its reasoning between <think> and </think>."""

    def __init__(self) -> None:
        self._reasoning = False

    def show(self, delta: ReplyDelta) -> None:
        if delta.reasoning and not self._reasoning:
            self._reasoning = True
            show("<think>")
        show(delta.reasoning)
        if delta.content:
            self._close()
        show(delta.content)

    def end(self) -> None:
        self._close()
        show("\n")

    def _close(self) -> None:
        if self._reasoning:
            self._reasoning = False
            show("</think>\n")


@dataclass
class Chat:
    """A conversation and the sequences that hold its KV.

    Tokens that were drawn stay as they were drawn. A thinking turn is rendered without its reasoning once the next
    one begins, so its KV is of no use from there on: each turn therefore branches off a sequence that ends before
    the turn's first token, and the next turn continues whichever of the two it begins with.
    """

    engine: Engine
    params: SamplingParams
    thinking: bool = False
    effort: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)
    _held: list[tuple[list[int], Sequence]] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for _, sequence in self._held:
            sequence.close()
        self._held.clear()

    async def answer(self, text: str, tell: Callable[[ReplyDelta], None]) -> str:
        """One turn; returns what it took. One that fails or is cancelled before its first token was never made,
        one that does so later ends there."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
            branch = await self._branch(prompt)
        except BaseException:
            self.messages.pop()
            raise
        return await self._draw(prompt, branch, tell)

    def _prompt(self) -> Prompt:
        prompt = render(
            self.engine.tokenizer,
            self.messages,
            thinking=self.thinking,
            effort=self.effort,
            generation=generation_of(self.engine.model_config),
            drawn=self.drawn,
        )
        if len(prompt.tokens) >= self.engine.context:
            raise ContextLengthError("messages", len(prompt.tokens), f"the context holds {self.engine.context}")
        return prompt

    async def _branch(self, prompt: Prompt) -> Sequence:
        """A sequence of the prompt, forked off one that ends where the turn begins and is held for the next."""
        before = prompt.tokens[: -prompt.opening]
        fits = [(tokens, sequence) for tokens, sequence in self._held if before[: len(tokens)] == tokens]
        tokens, sequence = max(fits, key=lambda held: len(held[0]), default=([], None))
        for _, other in self._held:
            if other is not sequence:
                other.close()
        if sequence is None:
            sequence = self.engine.open(before)
        elif len(tokens) < len(before):
            sequence.extend(before[len(tokens) :])
        self._held = [(before, sequence)]
        branch = (await sequence.fork())[0]
        branch.extend(prompt.tokens[-prompt.opening :])
        return branch

    async def _draw(self, prompt: Prompt, branch: Sequence, tell: Callable[[ReplyDelta], None]) -> str:
        room = self.engine.context - len(prompt.tokens)
        params = msgspec.structs.replace(self.params, max_tokens=min(self.params.max_tokens, room))
        parser = ReplyParser(prompt.form)
        turn = prompt.tokens[-prompt.opening :]
        done: m.Done | None = None
        try:
            async for event in branch.generate(params):
                if isinstance(event, m.Done):
                    done = event
                    continue
                turn += event.tokens
                if (delta := parser.feed(event.text)) is not None:
                    tell(delta)
        finally:
            last, reply = parser.finish("stop" if done is not None and done.finish_reason == "stop" else "length")
            if last is not None:
                tell(last)
            self._record(turn, reply, drawn=len(turn) > prompt.opening)
            if done is None:
                branch.close()  # it may hold tokens that were drawn after the last that was seen
        assert done is not None, "a generation ends with Done or an exception"
        self._held.append(([*prompt.tokens, *turn[prompt.opening :]], branch))
        return _figures(prompt, branch.origin, done.usage)

    def _record(self, turn: list[int], reply: Reply, drawn: bool) -> None:
        if drawn:
            message = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning}
            self.messages.append(message)
            self.drawn.append(turn)
        else:
            self.messages.pop()


def _figures(prompt: Prompt, fork: m.Usage, turn: m.Usage) -> str:
    return (
        f"{len(prompt.tokens)} tokens of prompt, {fork.cached} of them from KV; {fork.computed + turn.computed} "
        f"computed, {turn.generated} generated, first after {1000 * (fork.total + turn.first_token):.0f} ms"
    )
