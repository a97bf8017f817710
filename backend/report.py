"""One generate call of sglang: what was asked, and the meta information that is reported back."""

from __future__ import annotations

import time
import uuid
from typing import Any

from weft.backend.convert import count_of, finish_reason, plain_int, sampling_params, token_entry, top_entries
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.engine.front import Engine
from weft.runtime.errors import UnsupportedError
from weft.runtime.text.tokens import ASSISTANT, THINK_END, THINK_START


class Request:
    """One generate call, read once from sglang's objects."""

    def __init__(self, s: Any, p: Any) -> None:
        self.started = time.monotonic()
        refuse_images(s)
        if s.num_api_spec_tokens is not None:
            raise UnsupportedError("num_api_spec_tokens", s.num_api_spec_tokens, "for remote chat APIs only")
        self.text: str = s.text_
        self.count = count_of(p)
        thinking = self.text.rfind(THINK_START) > max(map(self.text.rfind, (THINK_END, ASSISTANT)))
        self.params: SamplingParams = sampling_params(p, thinking=thinking)
        start = plain_int(getattr(p, "logprob_start_len", None))
        self.prompt_logprobs_from = (
            start if self.params.logprobs is not None and start is not None and start >= 0 else None
        )
        # Beside one per completion: the history's own, and one to score the prompt with.
        self.extra_slots = 2 if self.prompt_logprobs_from is not None else 1
        self.texts_in_logprobs = getattr(p, "return_text_in_logprobs", None) is True


class Report:
    """Builds sglang's meta_info while a generation runs."""

    def __init__(
        self, request: Request, engine: Engine, prompt_tokens: int, prefill: m.Usage | None = None
    ) -> None:
        """prefill: what computing the prompt took, if the generation itself did not."""
        self._request = request
        self._prefill = prefill
        self._first_token: float | None = None
        self._text_of = (lambda id: engine.tokenizer.decode([id])) if request.texts_in_logprobs else None
        self._id = uuid.uuid4().hex
        self.prompt_tokens = prompt_tokens
        self._output: list[m.Logprob] = []
        self._generated = 0
        # Entries of the prompt's tokens; the very first token has nothing to be conditioned on.
        self.prompt: list[m.Logprob] = []
        self.first: int | None = None

    def add(self, delta: m.Delta) -> None:
        if self._first_token is None:
            self._first_token = time.monotonic() - self._request.started
        self._output += delta.logprobs
        self._generated += len(delta.tokens)

    def meta(self, done: m.Done | None = None) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self._id,
            "finish_reason": None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self._generated,
            "cached_tokens": self._prefill.cached if self._prefill is not None else 0,
        }
        if done is not None:
            before, source = self._prefill or m.Usage(), self._prefill or done.usage
            meta["cached_tokens"] = source.cached
            meta["finish_reason"] = finish_reason(done)
            meta["computed_tokens"] = before.computed + done.usage.computed
            meta["replayed_tokens"] = before.replayed + done.usage.replayed
            meta["matched_tokens"] = max(source.matched, source.cached)
            meta["cache_reason"] = source.reason
            meta["first_token_latency"] = self._first_token
            meta["e2e_latency"] = time.monotonic() - self._request.started
        if self._request.params.logprobs is not None:
            meta["output_token_logprobs"] = [token_entry(r, self._text_of) for r in self._output]
            meta["input_token_logprobs"] = self._first() + [token_entry(r, self._text_of) for r in self.prompt]
            if self._request.params.logprobs:
                meta["output_top_logprobs"] = [top_entries(r, self._text_of) for r in self._output]
                tops = [top_entries(r, self._text_of) for r in self.prompt]
                meta["input_top_logprobs"] = [None] * len(self._first()) + tops
        return meta

    def _first(self) -> list[list[Any]]:
        if self.first is None:
            return []
        return [[None, self.first, self._text_of(self.first) if self._text_of else None]]


def refuse_images(s: Any) -> None:
    if s.images_:
        raise UnsupportedError("image", s.images_[0][0], "DeepSeek-V4 reads text only")
