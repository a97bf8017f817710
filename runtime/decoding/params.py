"""What a caller may ask of one generation. No torch here: the front and the gateway read it too."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from weft.runtime.errors import RequestError

MAX_TOP_LOGPROBS = 64
MAX_GRAMMAR = 1 << 20


class Grammar(msgspec.Struct, frozen=True):
    """What an output has to match as a whole. text: a regular expression, a JSON schema, a Lark grammar, or a JSON
    list of strings; of tool calls, see `decoding.tool_calls`. JSON is written as `json.dumps` does with
    `ensure_ascii=False`.
    thinking: it begins behind `</think>`. optional: content comes first, and perhaps nothing else.
    """

    kind: Literal["regex", "json_schema", "lark", "choices", "tool_calls", "no_tool_calls"]
    text: str
    thinking: bool = False
    optional: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one generation; `validate` raises `RequestError` naming field and value.

    temperature: 0 is greedy. top_k: -1 is off. Filters apply in the order top_k, top_p, min_p, each on the
    renormalised distribution. frequency and presence penalty count output tokens only, as OpenAI's;
    repetition_penalty divides positive logits, and multiplies negative ones, of every token of the history and
    the output (Keskar et al., 2019). logit_bias is added last; -100 forbids a token.
    seed: same seed, tokens and parameters give the same output in any batch. None draws one.
    logprobs: None for none, else how many alternatives to return per token (0: the chosen token only).
    stop: strings that end the output; neither they nor anything behind them is returned.
    begins: what the tokens have to spell first; the last of them may go on behind it. The text that is returned
    lacks it: it was taken off the prompt's end (token healing). Not with a grammar.
    grammar: comes before all other settings, `min_tokens` and bans included, where they leave nothing; the output
    ends where the grammar does.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    begins: str = ""
    grammar: Grammar | None = None

    def validate(self) -> SamplingParams:
        try:
            msgspec.convert(msgspec.to_builtins(self), SamplingParams)
        except (msgspec.ValidationError, TypeError, ValueError):
            self._name_the_wrong_one()
        for name in ("max_tokens", "min_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            # Tensors and messages hold integers of 64 bits; stop_token_ids are compared with the vocabulary.
            _require(value is None or abs(value) < 1 << 63, name, value, "too large")
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "must not be negative")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "not in 0..max_tokens")
        _require(
            _finite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "must be >= 0",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        _require(self.top_k == -1 or self.top_k >= 1, "top_k", self.top_k, "must be -1 or at least 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, value, "must be in [-2, 2]")
        repetition = self.repetition_penalty
        _require(0 < repetition <= 10, "repetition_penalty", repetition, "must be in (0, 10]")
        for token, bias in self.logit_bias.items():
            _require(
                token >= 0 and -100 <= bias <= 100, "logit_bias", {token: bias}, "ids from 0, biases in +-100"
            )
        if self.logprobs is not None:
            _require(
                0 <= self.logprobs <= MAX_TOP_LOGPROBS,
                "logprobs",
                self.logprobs,
                f"not in 0..{MAX_TOP_LOGPROBS}",
            )
        for name in ("stop_token_ids", "logit_bias"):
            ids = getattr(self, name)
            _require(all(abs(token) < 1 << 63 for token in ids), name, ids, "too large")
        for name in ("stop", "stop_regex"):
            texts = getattr(self, name)
            _require(all(_is_unicode(text) for text in texts), name, texts, "not Unicode text")
        _require(_is_unicode(self.begins), "begins", self.begins, "not Unicode text")
        if self.grammar is not None:
            _require(not self.begins, "begins", self.begins, "cannot be combined with a grammar")
            kind, text = self.grammar.kind, self.grammar.text
            _require(_is_unicode(text), kind, text, "not Unicode text")
            _require(len(text) <= MAX_GRAMMAR, kind, text[:80], f"longer than {MAX_GRAMMAR} characters")
        _require(all(self.stop), "stop", self.stop, "must not hold an empty string")
        _require(all(self.stop_regex), "stop_regex", self.stop_regex, "must not hold an empty pattern")
        return self

    def _name_the_wrong_one(self) -> None:
        for name, type_ in _FIELDS:
            value = getattr(self, name)
            try:
                msgspec.convert(value, type_)
            except msgspec.ValidationError as error:
                raise RequestError(name, value, str(error)) from None


_FIELDS = [(field.name, field.type) for field in msgspec.structs.fields(SamplingParams)]


def _is_unicode(text: str) -> bool:
    """Without lone surrogates, which no message could carry."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _finite(x: float) -> bool:
    return math.isfinite(x)


def _require(ok: bool, field: str, value: object, reason: str) -> None:
    if not ok:
        raise RequestError(field, value, reason)
