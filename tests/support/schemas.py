"""Random JSON schemas, values that fit them or nearly do, and the ways to write a value as `json.dumps` would."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
NAMES = st.text('abcxyz_ é\u2192"\\', min_size=1, max_size=5)
PATTERNS = {r"^[a-f]{1,4}$": ("abc", "f"), r"^\d+-\d+$": ("1-2", "30-04"), "^(x|yy)*$": ("", "xyyx")}
FORMATS = {
    "date": ("2024-02-29", "1999-12-31"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000",),
    "ipv4": ("127.0.0.1", "255.0.9.10"),
}


def numbers(kind: str) -> st.SearchStrategy[Schema]:
    bounds = st.integers(-50, 50)
    return st.builds(
        lambda low, size, exclusive: {
            "type": kind,
            ("exclusiveMinimum" if exclusive else "minimum"): low,
            "maximum": low + size,
        },
        bounds,
        st.integers(1, 60),
        st.booleans(),
    )


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    def made(properties: dict[str, Any], required: int, more: bool) -> Schema:
        names = list(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": names[: required % (len(names) + 1)],
            "additionalProperties": {"type": "null"} if more else False,
        }

    return st.builds(made, st.dictionaries(NAMES, inner, max_size=4), st.integers(0, 4), st.booleans())


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    numbers("integer"),
    numbers("number"),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, *[st.integers(0, 5)] * 2),
    st.sampled_from(sorted(PATTERNS)).map(lambda p: {"type": "string", "pattern": p}),
    st.lists(NAMES | st.integers(-9, 9) | st.booleans(), min_size=1, max_size=4).map(lambda v: {"enum": v}),
    NAMES.map(lambda v: {"const": v}),
    st.sampled_from(sorted(FORMATS)).map(lambda f: {"type": "string", "format": f}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda item, low, size: {"type": "array", "items": item, "minItems": low, "maxItems": low + size},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda of: {"anyOf": of}),
    ),
    max_leaves=6,
)


def fitting(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of a schema of `SCHEMAS`."""
    match schema:
        case {"anyOf": of}:
            return st.one_of([fitting(own) for own in of])
        case {"enum": values}:
            return st.sampled_from(values)
        case {"const": value}:
            return st.just(value)
        case {"pattern": pattern}:
            return st.sampled_from(PATTERNS[pattern])
        case {"format": name}:
            return st.sampled_from(FORMATS[name])
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "null"}:
            return st.none()
        case {"type": "string", "minLength": low, "maxLength": high}:
            return st.text('ab\u00e9\u2192"\\\n /', min_size=low, max_size=high)
        case {"type": "integer" | "number", "maximum": high}:
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
            whole = st.integers(low, high)
            halves = st.integers(4 * low, 4 * high).map(lambda n: n / 4)
            return whole if schema["type"] == "integer" else whole | halves
        case {"items": item, "minItems": low, "maxItems": high}:
            return st.lists(fitting(item), min_size=low, max_size=high)
    needed = {name: fitting(own) for name, own in schema["properties"].items() if name in schema["required"]}
    others = {name: fitting(own) for name, own in schema["properties"].items() if name not in needed}
    both = st.fixed_dictionaries(needed, optional=others)
    return both.map(lambda value: {name: value[name] for name in schema["properties"] if name in value})


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with something in it replaced, left out or added; it may fit all the same."""
    value = copy.deepcopy(value)
    place: Any = value
    path: list[Any] = []
    while isinstance(place, dict | list) and place and draw(st.booleans()):
        path.append(draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        place = place[path[-1]]
    if isinstance(place, dict) and draw(st.booleans()):
        if place and draw(st.booleans()):
            del place[draw(st.sampled_from(sorted(place)))]
        else:
            place[draw(NAMES)] = draw(st.none() | st.integers(0, 3))
        return value
    if isinstance(place, list) and draw(st.booleans()):
        place.append(copy.deepcopy(place[0]) if place else None)
        return value
    odd = st.sampled_from([None, True, "", "zz", 0, -51, 111, 0.3, [], {}, "2024-13-01", "1-", "yx"])
    if not path:
        return draw(odd)
    owner = value
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = draw(odd)
    return value


def spellings(value: Any, most: int = 24) -> Iterator[str]:
    """Ways to write a value: keys in any order, whole numbers with a fraction or without, characters escaped or
    not; at most so many orders of an object's keys, and fewer within."""
    if isinstance(value, dict):
        for order in itertools.islice(itertools.permutations(value.items()), most):
            parts = [[f"{key}: {own}" for key in keys(name) for own in spellings(v, 4)] for name, v in order]
            for chosen in itertools.islice(itertools.product(*parts), 16):
                yield "{" + ", ".join(chosen) + "}"
    elif isinstance(value, list):
        for items in itertools.islice(itertools.product(*(list(spellings(v, 4)) for v in value)), 16):
            yield "[" + ", ".join(items) + "]"
    elif isinstance(value, str):
        yield from keys(value)
    else:
        yield json.dumps(value)
        if isinstance(value, float) and value.is_integer():
            yield str(int(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{value}.0"


def keys(text: str) -> list[str]:
    return list(dict.fromkeys((json.dumps(text, ensure_ascii=False), json.dumps(text))))
