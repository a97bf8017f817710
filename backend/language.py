"""The sglang language backend: runs `@sgl.function` programs, unmodified, on a Weft engine in this process.

sglang's interpreter calls from many worker threads; every call becomes a coroutine on one event loop, which
alone touches the histories.
"""

from __future__ import annotations

import asyncio
import queue
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod

from weft.backend.borders import encoded, shared
from weft.backend.bridge import Bridge, shut_down
from weft.backend.convert import token_entry
from weft.backend.report import Report, Request, refuse_images
from weft.backend.room import Room
from weft.backend.template import DeepSeekV4Template
from weft.backend.texts import Texts
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import Overloaded, RequestError, UnsupportedError

_GREEDY = 1e-5


class DeepSeekV4Backend(BaseBackend):
    """Give it to `sgl.set_default_backend` or `program.run(backend=...)`.

    The engine is the caller's to close. thinking: assistant turns begin inside `<think>`.
    """

    def __init__(
        self, engine: Engine, *, thinking: bool = False, held: int | None = None, heal: bool = False
    ) -> None:
        """held: histories whose KV is kept for reuse; by default half the engine's slots. heal: where a text ends
        in a token that a longer one begins with, generations begin with either (without, as with SGLang, they go
        on behind the token)."""
        super().__init__()
        self.engine = engine
        self.chat_template = DeepSeekV4Template(thinking)
        self._texts = Texts(engine, held if held is not None else engine.slots // 2, heal)
        self._room = Room(engine.slots, lambda promised: self._texts.histories.trim(engine.slots - promised))
        self._bridge = Bridge()

    # -- what sglang calls ------------------------------------------------------------------------------

    def generate(self, s: Any, sampling_params: Any) -> tuple[str | list[str], Any]:
        """One completion (a list for n > 1) and its meta information."""
        request = Request(s, sampling_params)
        results = self._bridge.wait(self._generate(request))
        if request.count == 1:
            return results[0]
        return [text for text, _ in results], [meta for _, meta in results]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Pieces of one completion as they are made. Leaving the iteration cancels the rest."""
        request = Request(s, sampling_params)
        if request.count != 1:
            raise UnsupportedError("n", request.count, "only one completion can be streamed")
        pieces: queue.SimpleQueue[tuple[str, dict[str, Any]] | BaseException | None] = queue.SimpleQueue()
        task = self._bridge.submit(self._stream(request, pieces.put))
        task.add_done_callback(lambda done: pieces.put(shut_down() if done.cancelled() else done.exception()))
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            task.cancel()

    def select(
        self,
        s: Any,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod | None = None,
    ) -> ChoicesDecision:
        """Score every choice after the text so far, and let `choices_method` decide."""
        refuse_images(s)
        if temperature > _GREEDY:
            raise RequestError("temperature", temperature, "select scores its choices, it does not sample")
        if not choices or not all(isinstance(c, str) and c for c in choices):
            raise RequestError("choices", choices, "must be non-empty strings")
        assert choices_method is not None, "sglang always passes one"
        return self._bridge.wait(self._select(s.text_, choices, choices_method))

    def cache_prefix(self, prefix_str: str) -> None:
        self._bridge.wait(self._remember(prefix_str))

    def commit_lazy_operations(self, s: Any) -> None:
        """sglang is about to fork this state: compute its text once, for all children."""
        refuse_images(s)
        self._bridge.wait(self._remember(s.text_))

    def concatenate_and_append(self, src_rids: list[str], dst_rid: str) -> None:
        """sglang has joined the children's texts already. KV computed at other positions and in other contexts
        would only approximate the joined text's, so it is computed when next needed: exact, and nothing to do."""

    def flush_cache(self) -> None:
        """Forget all KV held for reuse. Texts keep their tokens, so results stay the same."""
        self._bridge.wait(self._flush())

    def get_server_info(self) -> dict[str, Any]:
        config = self.engine.model_config
        return {
            "model_type": config.model_type,
            "num_hidden_layers": config.num_hidden_layers,
            "context_length": self.engine.context,
            "kv_bytes": self.engine.capacity.total,
        }

    def get_model_name(self) -> str:
        return self.engine.model_config.model_type

    @property
    def is_chat_model(self) -> bool:
        """Only read by sglang for programs with num_api_spec_tokens."""
        raise UnsupportedError("num_api_spec_tokens", True, "speculative API execution is for remote chat APIs")

    def shutdown(self) -> None:
        """Free the held KV and stop the loop; calls under way end as `Cancelled`. The engine stays open."""
        self._bridge.close()
        self._texts.histories.release()

    # -- on the loop ------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        self._texts.histories.release()
        self.engine.flush()

    async def _remember(self, text: str) -> None:
        if text:
            async with self._room.take(2, "text", text):
                sequence, _ = await self._texts.continued(text)
                sequence.close()

    async def _generate(self, request: Request) -> list[tuple[str, dict[str, Any]]]:
        n = request.count
        async with self._room.take(n + request.extra_slots, "n", n) as give_back:
            sequence, tokens = await self._texts.begin(request)
            others = []
            if n > 1:
                try:
                    others = await self._texts.with_room(lambda: sequence.fork(n - 1))
                except BaseException:
                    sequence.close()
                    raise
            give_back(1)
            runs = [self._complete(request, own, tokens, i == 0) for i, own in enumerate((sequence, *others))]
            return list(await asyncio.gather(*runs))

    async def _complete(
        self, request: Request, sequence: Sequence, prompt: list[int], keep: bool
    ) -> tuple[str, dict[str, Any]]:
        pieces: list[str] = []
        last: dict[str, Any] = {}
        async for piece, meta in self._run(request, sequence, prompt, keep):
            pieces.append(piece)
            last = meta
        return "".join(pieces), last

    async def _stream(self, request: Request, put: Callable[[tuple[str, dict[str, Any]]], None]) -> None:
        async with self._room.take(1 + request.extra_slots, "n", 1) as give_back:
            sequence, tokens = await self._texts.begin(request)
            give_back(1)
            async for piece, meta in self._run(request, sequence, tokens, keep=True):
                put((piece, meta))

    async def _run(self, request: Request, sequence: Sequence, prompt: list[int], keep: bool) -> Any:
        """Yield (text, meta so far) per delta; the last has the complete meta. Takes over `sequence`."""
        report = Report(request, self.engine, len(prompt), sequence.origin)
        # Drawn here: the generation may be made twice, and has to be the same.
        params = msgspec.structs.replace(request.params, seed=random.getrandbits(63))
        tokens: list[int] = []
        text: list[str] = []
        try:
            start = request.prompt_logprobs_from
            if start is not None:
                report.prompt = await self._texts.with_room(lambda: self._prompt_logprobs(prompt, start, request))
                report.first = prompt[0] if start == 0 else None
            while True:
                again = len(text)  # deltas that were yielded before KV memory ran out
                try:
                    async for event in sequence.generate(params):
                        if isinstance(event, m.Done):
                            yield "", report.meta(event)
                            if keep:
                                await self._texts.keep(request, "".join(text), prompt, tokens, event, sequence)
                        elif again:
                            again -= 1
                        else:
                            tokens += event.tokens
                            text.append(event.text)
                            report.add(event)
                            yield event.text, report.meta()
                    break
                except Overloaded:
                    sequence.close()
                    if not self._texts.histories.release(0.5):
                        raise
                    sequence = self.engine.open(prompt)
        except BaseException:
            sequence.close()
            raise
        if not keep:
            sequence.close()

    async def _prompt_logprobs(self, prompt: list[int], start: int, request: Request) -> list[m.Logprob]:
        with self.engine.open(prompt[:start]) as sequence:
            return await sequence.append_scored(prompt[start:], request.params.logprobs or 0)

    async def _select(self, text: str, choices: list[str], method: ChoicesSamplingMethod) -> ChoicesDecision:
        at_once = max(1, min(len(choices), self.engine.slots // 2 - 2))
        async with self._room.take(2 + at_once, "choices", choices):
            tokens, border = self._texts.encoded(text)
            whole = [encoded(self.engine.tokenizer, text + c, tokens, border) for c in choices]
            # Where a choice's first letters join the text's last ones in a token, all are scored from there.
            start = min(shared(tokens, own) for own, _ in whole)
            scored: list[list[m.Logprob]] = []
            with await self._choosing(text, tokens, start) as sequence:
                for first in range(0, len(choices), at_once):
                    part = [own[start:] for own, _ in whole[first : first + at_once]]
                    scored += await self._texts.with_room(partial(sequence.score, part))
            entries = [self._entries(results) for results in scored]
            unconditional = None
            if method.requires_unconditional_logprobs:
                unconditional = [
                    await self._texts.with_room(partial(self._unconditional, c[start:])) for c, _ in whole
                ]
        decision: ChoicesDecision = method(
            choices=choices,
            normalized_prompt_logprobs=[sum(e[0] for e in own) / len(own) for own in entries],
            input_token_logprobs=entries,
            output_token_logprobs=[[] for _ in choices],
            unconditional_token_logprobs=unconditional,
        )
        text += decision.decision
        chosen, border = whole[choices.index(decision.decision)]
        self._texts.histories.put(text, chosen, None, border)
        return decision

    async def _choosing(self, text: str, tokens: list[int], start: int) -> Sequence:
        """A sequence of the text's first `start` tokens."""
        if start == len(tokens):
            return (await self._texts.continued(text))[0]
        return self._texts.open(tokens[:start])

    async def _unconditional(self, tokens: list[int]) -> list[list[Any]]:
        """The choice on its own; its first token has nothing to be conditioned on."""
        with self.engine.open([]) as sequence:
            results = await sequence.append_scored(tokens)
        return [[None, tokens[0], self.engine.tokenizer.decode(tokens[:1])], *self._entries(results)]

    def _entries(self, results: list[m.Logprob]) -> list[list[Any]]:
        return [token_entry(result, lambda id: self.engine.tokenizer.decode([id])) for result in results]
