"""The sglang language backend: runs `@sgl.function` programs, unmodified, on a Weft engine in this process.

sglang's interpreter calls from many worker threads; every call becomes a coroutine on one event loop, which
alone touches the histories.
"""

from __future__ import annotations

import asyncio
import queue
import random
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import msgspec
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod

from weft.backend.bridge import Bridge, shut_down
from weft.backend.convert import token_entry
from weft.backend.histories import Histories, History
from weft.backend.report import Report, Request, refuse_images
from weft.backend.room import Room
from weft.backend.template import DeepSeekV4Template
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import EngineDead, Overloaded, RequestError, UnsupportedError
from weft.runtime.text.turns import turn_cuts

T = TypeVar("T")
_GREEDY = 1e-5
_ATTEMPTS = 3  # at computing a text on cores that die


class DeepSeekV4Backend(BaseBackend):
    """Give it to `sgl.set_default_backend` or `program.run(backend=...)`.

    The engine is the caller's to close. thinking: assistant turns begin inside `<think>`.
    """

    def __init__(self, engine: Engine, *, thinking: bool = False, held: int | None = None) -> None:
        """held: histories whose KV is kept for reuse; by default half the engine's slots."""
        super().__init__()
        self.engine = engine
        self.chat_template = DeepSeekV4Template(thinking)
        self._histories = Histories(live=held if held is not None else engine.slots // 2)
        self._room = Room(engine.slots, lambda promised: self._histories.trim(engine.slots - promised))
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
        self._histories.release()

    # -- on the loop ------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        self._histories.release()
        self.engine.flush()

    async def _remember(self, text: str) -> None:
        if text:
            async with self._room.take(2, "text", text):
                sequence, _ = await self._continue(text)
                sequence.close()

    async def _continue(self, text: str) -> tuple[Sequence, list[int]]:
        """A sequence of the caller's own whose history is this text, computed; and its tokens."""
        return await self._with_room(lambda: self._continue_once(text))

    async def _continue_once(self, text: str) -> tuple[Sequence, list[int]]:
        if not text:  # not remembered: it begins every text, also those that spell out their BOS
            return self.engine.open([self.engine.tokenizer.bos]), [self.engine.tokenizer.bos]
        while True:
            found = self._histories.longest_prefix(text)
            if found is not None and found[0] == text and found[1].sequence is not None:
                return await self._histories.fork(found[1]), found[1].tokens
            tokens, base = await self._base(text, found)
            # Remembered before it is computed: siblings that come now wait for it instead of computing it
            # again. One that came during the fork above was first: then `base` is closed and theirs is used.
            self._histories.put(text, tokens, base)

    async def _base(self, text: str, found: tuple[str, History] | None) -> tuple[list[int], Sequence]:
        """A sequence for this text, made from the longest known beginning of it."""
        if found is None:
            # A text that spells out its BOS brings its own.
            encoded = self.engine.tokenizer.encode(text)
            bos = self.engine.tokenizer.bos
            tokens = encoded if encoded[:1] == [bos] else [bos, *encoded]
            return tokens, self._open(tokens)
        prefix, known = found
        tokens = known.tokens + self.engine.tokenizer.encode(text[len(prefix) :])
        held = self._histories.longest_held(text, tokens)
        if held is None:
            return tokens, self._open(tokens)
        base = await self._histories.fork(held)
        more = tokens[len(held.tokens) :]
        base.extend(more, cuts=turn_cuts(self.engine.tokenizer, more))
        return tokens, base

    def _open(self, tokens: list[int]) -> Sequence:
        return self.engine.open(tokens, cuts=turn_cuts(self.engine.tokenizer, tokens))

    async def _with_room(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Held histories are the first to go when KV memory runs out, and all go with a core that died: their
        tokens are known, so the attempt after that computes them again."""
        deaths = 0
        while True:
            try:
                return await attempt()
            except Overloaded:
                if not self._histories.release(0.5):
                    raise
            except EngineDead:
                self._histories.release()
                deaths += 1
                if deaths == _ATTEMPTS:
                    raise

    async def _generate(self, request: Request) -> list[tuple[str, dict[str, Any]]]:
        n = request.count
        async with self._room.take(n + request.extra_slots, "n", n) as give_back:
            sequence, tokens = await self._continue(request.text)
            others = []
            if n > 1:
                try:
                    others = await self._with_room(lambda: sequence.fork(n - 1))
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
            sequence, tokens = await self._continue(request.text)
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
                report.prompt = await self._with_room(lambda: self._prompt_logprobs(prompt, start, request))
                report.first = prompt[0] if start == 0 else None
            while True:
                again = len(text)  # deltas that were yielded before KV memory ran out
                try:
                    async for event in sequence.generate(params):
                        if isinstance(event, m.Done):
                            yield "", report.meta(event)
                            if keep:
                                await self._keep(request.text, "".join(text), prompt, tokens, event, sequence)
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
                    if not self._histories.release(0.5):
                        raise
                    sequence = self.engine.open(prompt)
        except BaseException:
            sequence.close()
            raise
        if not keep:
            sequence.close()

    async def _keep(
        self, before: str, text: str, prompt: list[int], tokens: list[int], done: m.Done, sequence: Sequence
    ) -> None:
        """Remember prompt and output as one history. Tokens behind the returned text are cut off; a token that
        the text ends inside of is replaced by the tokens of its first part."""
        kept = tokens[: done.kept]
        rest = self.engine.tokenizer.encode(text[len(self.engine.tokenizer.decode(kept)) :])
        length = len(prompt) + len(kept)
        held: Sequence | None = sequence
        try:
            await sequence.truncate(length)
            if rest:
                sequence.extend(rest)
        except RequestError:  # the stop was several tokens, the first of them computed: this KV has gone too far
            sequence.close()
            held = None
        self._histories.put(before + text, prompt + kept + rest, held)

    async def _prompt_logprobs(self, prompt: list[int], start: int, request: Request) -> list[m.Logprob]:
        with self.engine.open(prompt[:start]) as sequence:
            return await sequence.append_scored(prompt[start:], request.params.logprobs or 0)

    async def _select(self, text: str, choices: list[str], method: ChoicesSamplingMethod) -> ChoicesDecision:
        encoded = [self.engine.tokenizer.encode(choice) for choice in choices]
        at_once = max(1, min(len(choices), self.engine.slots // 2 - 2))
        async with self._room.take(2 + at_once, "choices", choices):
            sequence, tokens = await self._continue(text)
            scored: list[list[m.Logprob]] = []
            with sequence:
                for first in range(0, len(choices), at_once):
                    part = encoded[first : first + at_once]
                    scored += await self._with_room(partial(sequence.score, part))
            entries = [self._entries(results) for results in scored]
            unconditional = None
            if method.requires_unconditional_logprobs:
                unconditional = [await self._with_room(partial(self._unconditional, c)) for c in encoded]
        decision: ChoicesDecision = method(
            choices=choices,
            normalized_prompt_logprobs=[sum(e[0] for e in own) / len(own) for own in entries],
            input_token_logprobs=entries,
            output_token_logprobs=[[] for _ in choices],
            unconditional_token_logprobs=unconditional,
        )
        chosen = encoded[choices.index(decision.decision)]
        self._histories.put(text + decision.decision, tokens + chosen, None)
        return decision

    async def _unconditional(self, tokens: list[int]) -> list[list[Any]]:
        """The choice on its own; its first token has nothing to be conditioned on."""
        with self.engine.open([]) as sequence:
            results = await sequence.append_scored(tokens)
        return [[None, tokens[0], self.engine.tokenizer.decode(tokens[:1])], *self._entries(results)]

    def _entries(self, results: list[m.Logprob]) -> list[list[Any]]:
        return [token_entry(result, lambda id: self.engine.tokenizer.decode([id])) for result in results]
