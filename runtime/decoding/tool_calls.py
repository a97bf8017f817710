"""Tool calls in DeepSeek-V4's layout (DSML) as a grammar.

A call names one of the tools; its parameters come in the order of the tool's schema, the required ones all, none
twice. A string is raw text, anything else JSON held to its schema. What of a schema cannot be held to is refused
by name if the tool is `strict`; otherwise that parameter may be any value of its types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance

from weft.runtime.decoding.params import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# One way to write a document, that of `json.dumps` with `ensure_ascii=False`: what is between values is certain,
# and no name can be spelled so that llguidance takes it for another one.
JSON_FORM: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": '"\\bfnrt',
}
_OTHERS = ["null", "boolean", "number", "array", "object"]
_NOTES = {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
_RAW_KEYS = _NOTES | {"type", "minLength", "maxLength", "pattern"}


def _text(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text)


# The lexer does not go back: what begins alike differs before it ends. A new line belongs to what it begins.
_FIRST, _NEXT, _END = _text("<"), _text("\n<"), "\n</"


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] = "auto",
    *,
    thinking: bool = False,
    opened: bool = False,
    parallel: bool = True,
    answer: str | None = None,
) -> Grammar | None:
    """What holds a reply to `tools` and `choice`, as `text.chat.render` takes them; None if nothing does.

    thinking: reasoning comes first. opened: the prompt has opened the block of calls. parallel: several calls may
    be made. answer: with choice auto, a JSON schema that a reply is held to which calls nothing.
    """
    if choice == "none":
        return Grammar("no_tool_calls", "", thinking, optional=True)
    functions = [dict(tool["function"]) for tool in tools]
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        return None
    kept = [{key: f[key] for key in ("name", "parameters", "strict") if key in f} for f in functions]
    text = json.dumps({"functions": kept, "opened": opened, "parallel": parallel, "answer": answer})
    return Grammar("tool_calls", text, thinking, optional=choice == "auto" and answer is None)


def lark_of(grammar: Grammar, dsml: int) -> str:
    """The Lark grammar of one made by `tool_grammar`; `ValueError` names what a strict tool asks for in vain.
    dsml: the token's id."""
    asked = json.loads(grammar.text)
    rules = _Rules(f"<[{dsml}]>")
    return rules.all(asked["functions"], grammar.optional, asked["opened"], asked["parallel"], asked.get("answer"))


class _Rules:
    """Rules of Lark, as they are needed."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._lines: list[str] = []

    def all(
        self,
        functions: Sequence[Mapping[str, Any]],
        marked: bool,
        opened: bool,
        parallel: bool,
        answer: str | None,
    ) -> str:
        """marked: the first DSML token was drawn."""
        begin = "" if opened else _text("tool_calls>\n") if marked else self._tag("\n\n<", "tool_calls>\n")
        more = f"({_NEXT} call)*" if parallel else ""
        block = f"{begin} {_FIRST} call {more} {self._tag(_END, 'tool_calls>')}"
        if answer is not None:
            schema: dict[str, Any] = {"false": {"enum": []}, "true": {}}.get(answer) or json.loads(answer)
            block += f" | %json {json.dumps({**schema, 'x-guidance': JSON_FORM})}"
        self._lines.append(f"start: {block}")
        calls = [self._call(function) for function in functions]
        self._lines.append(f"call: {' | '.join(calls)}")
        return "\n".join(self._lines)

    def _tag(self, before: str, after: str) -> str:
        """Text around a DSML token."""
        return f"{_text(before)} {self._mark} {_text(after)}"

    def _new(self, body: str, *, terminal: bool = False) -> str:
        name = f"{'T' if terminal else 'r'}{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _call(self, function: Mapping[str, Any]) -> str:
        name = function["name"]
        root = function.get("parameters") or {}
        required, strict = set(root.get("required", ())), bool(function.get("strict"))
        given = [
            (self._parameter(key, schema, root, strict, f"{name}.{key}"), key in required)
            for key, schema in (root.get("properties") or {}).items()
        ]
        opening = _text(f'invoke name="{name}">\n')
        return self._new(f"{self._mark} {opening} {self._list(given)}")

    def _list(self, parameters: Sequence[tuple[str, bool]]) -> str:
        """Those that are required and any of the others, in order, and the call's end. A call without any may have
        an empty line, as in the first release, or none, as in deepseek-recipe."""
        later = self._tag(_END, "invoke>")
        first = self._new(f"{later} | {self._tag('</', 'invoke>')}")
        for rule, required in reversed(parameters):
            behind = f"{_NEXT} {rule} {later}"
            before = f"{_FIRST} {rule} {later}"
            later, first = (
                self._new(behind if required else f"{behind} | {later}"),
                self._new(before if required else f"{before} | {first}"),
            )
        return first

    def _parameter(self, name: str, schema: Any, root: Mapping[str, Any], strict: bool, path: str) -> str:
        if re.search('["\n]', name):
            raise ValueError(f"{path}: the layout has no such name")
        texts, others = _by_form(schema, root)
        forms = []
        for text in texts:
            opening = _text(f'parameter name="{name}" string="true">')
            value = self._new(self._raw(text, strict, path), terminal=True)
            forms.append(f"{self._mark} {opening} {value} {self._mark} {_text('parameter>')}")
        if others is not None:
            opening = _text(f'parameter name="{name}" string="false">')
            value = self._new(f"%json {json.dumps(self._json(others, root, strict, path))}")
            forms.append(f"{self._mark} {opening} {value} {self._tag('</', 'parameter>')}")
        if not forms:
            raise ValueError(f"{path}: no value satisfies its schema")
        return self._new(" | ".join(forms))

    def _raw(self, schema: Mapping[str, Any], strict: bool, path: str) -> str:
        """A terminal for the text and `</`."""
        if "const" in schema:
            return _text(schema["const"] + "</")
        unknown = sorted(schema.keys() - _RAW_KEYS)
        try:
            pattern = _whole(schema["pattern"]) if "pattern" in schema else None
        except ValueError:
            unknown, pattern = [*unknown, "pattern"], None
        if unknown and strict:
            raise ValueError(f"{path}: cannot hold a string to {', '.join(map(_quoted, unknown))}")
        least, most = int(schema.get("minLength", 0)), schema.get("maxLength", "")
        sized = f"/(?s:.{{{least},{most}}})<\\//"
        if pattern is None:
            return sized if least or most != "" else "/(?s:.*)<\\//"
        matched = f"/(?:{pattern})<\\//"
        return f"{sized} & {matched}" if least or most != "" else matched

    def _json(self, schema: Any, root: Mapping[str, Any], strict: bool, path: str) -> Any:
        """The schema with what it refers to; if it cannot be held to, only its types."""
        defined = {key: root[key] for key in ("$defs", "definitions") if key in root}
        whole = {**schema, **defined, "x-guidance": JSON_FORM}
        source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(whole))
        reason = llguidance.LLMatcher.validate_grammar(source)
        if reason and strict:
            raise ValueError(f"{path}: {reason}")
        return {"type": schema.get("type", _OTHERS), "x-guidance": JSON_FORM} if reason else whole


def _by_form(schema: Any, root: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The strings a schema allows, each a schema of strings, and a schema of everything else."""
    schema = {} if schema is True else {"enum": []} if schema is False else _resolved(schema, root)
    for key in ("anyOf", "oneOf"):
        if key in schema and not schema.keys() - _NOTES - {key}:
            branches = [_by_form(branch, root) for branch in schema[key]]
            others = [own for _, own in branches if own is not None]
            texts = [text for own, _ in branches for text in own]
            return texts, others[0] if len(others) == 1 else {key: others} if others else None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        others = [value for value in values if not isinstance(value, str)]
        return [{"const": v} for v in values if isinstance(v, str)], {"enum": others} if others else None
    kinds = schema.get("type", ["string", *_OTHERS])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    others = [kind for kind in kinds if kind != "string"]
    texts = [schema | {"type": "string"}] if "string" in kinds else []
    if "type" not in schema and schema.keys() - _NOTES:
        texts = [{}]  # what is said is about other types, or about all and would need to be sorted out
    return texts, schema | {"type": others[0] if len(others) == 1 else others} if others else None


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference within the parameters stands for, or itself."""
    seen = set()
    while isinstance(schema, Mapping) and "$ref" in schema and not schema.keys() - _NOTES - {"$ref"}:
        ref = schema["$ref"]
        if ref in seen or not ref.startswith("#/"):
            raise ValueError(f'cannot follow "$ref" {_quoted(ref)}')
        seen.add(ref)
        found: Any = root
        for step in ref[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or step not in found:
                raise ValueError(f'cannot follow "$ref" {_quoted(ref)}')
            found = found[step]
        schema = found
    return schema


def _whole(pattern: str) -> str:
    """A regular expression for whole strings that contain the pattern; `ValueError` if its anchors are odd."""
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    body = pattern[start : len(pattern) - end]
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", body)
    if "^" in plain or "$" in plain or "(?" in plain.replace("(?:", ""):
        raise ValueError("anchors inside")
    if (start or end) and "|" in re.sub(r"\([^()]*\)", "", plain):
        raise ValueError("an anchor of one alternative")
    escaped = body.replace("/", "\\/") if "\\/" not in body else body
    return f"{'' if start else '(?s:.*)'}(?:{escaped}){'' if end else '(?s:.*)'}"


def _quoted(text: str) -> str:
    return f'"{text}"'
