"""The sglang language backend: runs `@sgl.function` programs, unmodified, on a Weft engine in this process.

sglang's interpreter calls from many worker threads; every call becomes a coroutine on one event loop, which
alone touches the histories.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod

from weft.backend.convert import token_entry
from weft.backend.histories import Histories
from weft.backend.request import Report, Request, refuse_images
from weft.backend.template import DeepSeekV4Template
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import Cancelled, EngineDead, Overloaded, RequestError, UnsupportedError

T = TypeVar("T")
_GREEDY = 1e-5
_ATTEMPTS = 16


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
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weft-backend", daemon=True)
        self._thread.start()

    # -- what sglang calls ------------------------------------------------------------------------------

    def generate(self, s: Any, sampling_params: Any) -> tuple[str | list[str], Any]:
        """One completion (a list for n > 1) and its meta information."""
        request = Request(s, sampling_params)
        results = self._wait(self._generate(request))
        if request.count == 1:
            return results[0]
        return [text for text, _ in results], [meta for _, meta in results]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Pieces of one completion as they are made. Leaving the iteration cancels the rest."""
        request = Request(s, sampling_params)
        if request.count != 1:
            raise UnsupportedError("n", request.count, "only one completion can be streamed")
        pieces: queue.SimpleQueue[tuple[str, dict[str, Any]] | BaseException | None] = queue.SimpleQueue()
        task = asyncio.run_coroutine_threadsafe(self._stream(request, pieces.put), self._loop)
        task.add_done_callback(lambda done: pieces.put(None if done.cancelled() else done.exception()))
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
        return self._wait(self._select(s.text_, choices, choices_method))

    def cache_prefix(self, prefix_str: str) -> None:
        self._wait(self._remember(prefix_str))

    def commit_lazy_operations(self, s: Any) -> None:
        """sglang is about to fork this state: compute its text once, for all children."""
        refuse_images(s)
        self._wait(self._remember(s.text_))

    def concatenate_and_append(self, src_rids: list[str], dst_rid: str) -> None:
        """sglang has joined the children's texts already. KV computed at other positions and in other contexts
        would only approximate the joined text's, so it is computed when next needed: exact, and nothing to do."""

    def flush_cache(self) -> None:
        """Forget all KV held for reuse. Texts keep their tokens, so results stay the same."""
        self._wait(self._flush())

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
        """Free the held KV and stop the loop; the engine stays open."""
        if self._thread.is_alive():
            self._wait(self._flush())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # -- on the loop ------------------------------------------------------------------------------------

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _flush(self) -> None:
        self._histories.release()

    async def _remember(self, text: str) -> None:
        if text:
            sequence, _ = await self._continue(text)
            sequence.close()

    async def _continue(self, text: str) -> tuple[Sequence, list[int]]:
        """A sequence of the caller's own whose history is this text, computed; and its tokens."""
        return await self._with_room(lambda: self._continue_once(text))

    async def _continue_once(self, text: str) -> tuple[Sequence, list[int]]:
        found = self._histories.longest_prefix(text)
        if found is None:
            # A text that spells out its BOS brings its own.
            encoded = self.engine.tokenizer.encode(text)
            bos = self.engine.tokenizer.bos
            tokens = encoded if encoded[:1] == [bos] else [bos, *encoded]
        else:
            prefix, known = found
            tokens = known.tokens + self.engine.tokenizer.encode(text[len(prefix) :])
        held = self._histories.nearest_held(text, tokens)
        if held is None or held.sequence is None:
            base = self.engine.open(tokens)
        else:
            base = (await held.sequence.fork())[0]
            if len(held.tokens) == len(tokens):
                return base, tokens
            base.extend(tokens[len(held.tokens) :])
        # Remembered before it is computed: siblings that come now wait for it instead of computing it again.
        self._histories.put(text, tokens, base)
        return (await base.fork())[0], tokens

    async def _with_room(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Held histories are the first to go when KV memory runs out, and all go with a core that died: their
        tokens are known, so a later attempt computes them again."""
        for _ in range(_ATTEMPTS):
            try:
                return await attempt()
            except Cancelled:
                continue  # another call, short of memory, let go of the history this one was waiting for
            except (Overloaded, EngineDead) as error:
                if not self._histories.release(0.5 if isinstance(error, Overloaded) else 1.0):
                    raise
        return await attempt()

    async def _generate(self, request: Request) -> list[tuple[str, dict[str, Any]]]:
        sequence, tokens = await self._continue(request.text)
        others = await sequence.fork(request.count - 1) if request.count > 1 else []
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
        sequence, tokens = await self._continue(request.text)
        async for piece, meta in self._run(request, sequence, tokens, keep=True):
            put((piece, meta))

    async def _run(self, request: Request, sequence: Sequence, prompt: list[int], keep: bool) -> Any:
        """Yield (text, meta so far) per delta; the last has the complete meta. Takes over `sequence`."""
        report = Report(request, self.engine, len(prompt), sequence.origin)
        if request.prompt_logprobs_from is not None:
            report.prompt = await self._prompt_logprobs(prompt, request)
        tokens: list[int] = []
        text: list[str] = []
        try:
            async for event in sequence.generate(request.params):
                if isinstance(event, m.Delta):
                    tokens += event.tokens
                    text.append(event.text)
                    report.add(event)
                    yield event.text, report.meta()
                else:
                    yield "", report.meta(event)
                    if keep:
                        await self._keep(request.text, "".join(text), prompt, tokens, event, sequence)
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
        try:
            await sequence.truncate(length)
        except RequestError:  # the stop was several tokens, the first of them computed: this KV has gone too far
            sequence.close()
            self._histories.put(before + text, prompt + kept + rest, None)
            return
        if rest:
            sequence.extend(rest)
        self._histories.put(before + text, prompt + kept + rest, sequence)

    async def _prompt_logprobs(self, prompt: list[int], request: Request) -> list[m.Logprob]:
        start = request.prompt_logprobs_from or 0
        with self.engine.open(prompt[:start]) as sequence:
            return await sequence.append_scored(prompt[start:], request.params.logprobs or 0)

    async def _select(self, text: str, choices: list[str], method: ChoicesSamplingMethod) -> ChoicesDecision:
        sequence, tokens = await self._continue(text)
        encoded = [self.engine.tokenizer.encode(choice) for choice in choices]
        with sequence:
            scored = await self._with_room(lambda: sequence.score(encoded))
        entries = [self._entries(results) for results in scored]
        unconditional = None
        if method.requires_unconditional_logprobs:
            unconditional = [await self._unconditional(choice) for choice in encoded]
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
