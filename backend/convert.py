"""Between sglang's loosely typed parameters and results and Weft's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.lang.ir import REGEX_BOOL, REGEX_FLOAT, REGEX_INT, REGEX_STR

from weft.runtime.decoding.params import Grammar, SamplingParams
from weft.runtime.engine import messages as m
from weft.runtime.errors import RequestError

# What a dtype stands for, as sglang's own endpoint takes it; numbers also end at a space or a new line.
_DTYPES = {"int": REGEX_INT, "float": REGEX_FLOAT, "bool": REGEX_BOOL, "str": REGEX_STR}

# A program's generations have few different parameters, and it is run thousands of times.
_KNOWN: dict[Any, SamplingParams] = {}
_MOST = 1024


def sampling_params(p: Any, *, thinking: bool = False) -> SamplingParams:
    """From an `SglSamplingParams` of any sglang version (fields that a version lacks keep their default).
    thinking: the text ends inside a thought."""
    values = [tuple(v) if isinstance(v, list) else v for v in vars(p).values()]
    key = (thinking, *vars(p), *values, *map(type, values))  # 1 is not True here
    try:
        known = _KNOWN.get(key)
    except TypeError:  # of no type that is allowed
        return _sampling_params(p, thinking)
    if known is None:
        known = _sampling_params(p, thinking)
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = known
    return known


def _sampling_params(p: Any, thinking: bool) -> SamplingParams:
    grammar, stop = _grammar(p, thinking)
    wants_logprobs = getattr(p, "return_logprob", None) is True
    return SamplingParams(
        max_tokens=p.max_new_tokens,
        min_tokens=p.min_new_tokens,
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        min_p=p.min_p,
        frequency_penalty=p.frequency_penalty,
        presence_penalty=p.presence_penalty,
        stop=(*strings("stop", p.stop), *stop),
        grammar=grammar,
        stop_token_ids=tuple(p.stop_token_ids or ()),
        stop_regex=strings("stop_regex", getattr(p, "stop_regex", None)),
        ignore_eos=p.ignore_eos,
        logprobs=(plain_int(getattr(p, "top_logprobs_num", None)) or 0) if wants_logprobs else None,
    ).validate()


def _grammar(p: Any, thinking: bool) -> tuple[Grammar | None, tuple[str, ...]]:
    """What the output is held to, and the stops that go with it. A dtype comes before a regex, as in sglang."""
    dtype, regex, schema = (getattr(p, name, None) for name in ("dtype", "regex", "json_schema"))
    for name, value in (("regex", regex), ("json_schema", schema)):
        if value is not None and not isinstance(value, str):
            raise RequestError(name, value, "must be a string")
    if dtype is not None:
        name = dtype.__name__ if isinstance(dtype, type) else dtype
        if name not in _DTYPES:
            raise RequestError("dtype", dtype, f"must be one of {', '.join(_DTYPES)}")
        return Grammar("regex", _DTYPES[name], thinking), (" ", "\n") if name in ("int", "float") else ()
    if regex is not None and schema is not None:
        raise RequestError("regex", regex, "cannot be combined with json_schema")
    if regex is not None:
        return Grammar("regex", regex, thinking), ()
    return Grammar("json_schema", schema, thinking) if schema is not None else None, ()


def strings(field: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise RequestError(field, value, "must be a string or a list of strings")
    return items


def plain_int(value: Any) -> int | None:
    """sglang 0.5.2 defaults some numbers to the tuple (None,) by mistake."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def count_of(p: Any) -> int:
    n = getattr(p, "n", 1)
    if not isinstance(n, int) or n < 1:
        raise RequestError("n", n, "must be at least 1")
    return n


def token_entry(result: m.Logprob, text_of: Callable[[int], str] | None) -> list[Any]:
    """sglang's [logprob, id, text]."""
    return [result.logprob, result.token, text_of(result.token) if text_of else None]


def top_entries(result: m.Logprob, text_of: Callable[[int], str] | None) -> list[list[Any]]:
    return [[logprob, token, text_of(token) if text_of else None] for token, logprob in result.top]


def finish_reason(done: m.Done) -> dict[str, Any]:
    """sglang's structured finish reason."""
    if done.finish_reason == "length":
        return {"type": "length", "length": done.usage.generated}
    return {"type": "stop", "matched": done.stop}
