"""Programs and tools that the operator serves, under their names, with the JSON schemas of their arguments.

`module:attribute@tag` names one, `module@tag` all of a module's, an entry point of the group `weft.programs`
either. No code comes from a client.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import msgspec
from sglang.lang.ir import SglFunction

from weft.backend.executor import Tool
from weft.runtime.errors import ConfigError, RequestError

GROUP = "weft.programs"
_LATEST = "latest"
_log = logging.getLogger("weft.gateway")


@dataclass(frozen=True)
class Program:
    """hash: of its module's source and its name. arguments: the struct its JSON arguments are read as."""

    name: str
    tag: str
    hash: str
    about: str
    program: SglFunction
    arguments: type[msgspec.Struct]
    schema: dict[str, Any]

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments as the function takes them; `RequestError` names the one that is wrong."""
        try:
            read = msgspec.convert(dict(given), self.arguments)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at `$")
            field = f"arguments{path.removesuffix('`')}"
            raise RequestError(field, _shown(given, field), reason) from None
        fields = msgspec.structs.fields(self.arguments)
        return {own.name: getattr(read, own.name) for own in fields if own.encode_name in given}


class Registry:
    """What is served, all of it known before the first request."""

    def __init__(self, specs: Iterable[str] = (), *, installed: bool = True) -> None:
        """installed: those of entry points too. Raises `ConfigError` for what is not there or cannot be served."""
        self.tools: dict[str, Tool] = {}
        self._programs: dict[str, list[Program]] = {}
        for spec in specs:
            self._add_spec(spec)
        for point in entry_points(group=GROUP) if installed else ():
            self._add_spec(point.value)

    def __iter__(self) -> Any:
        return (program for versions in self._programs.values() for program in versions)

    def find(self, reference: str) -> Program | None:
        """`name`, `name@tag` or `name@` and the beginning of its hash. Without, the one named latest, or first."""
        name, _, version = reference.partition("@")
        versions = self._programs.get(name, [])
        if not version:
            return next((own for own in versions if own.tag == _LATEST), versions[0] if versions else None)
        for own in versions:
            if own.tag == version or (len(version) >= 8 and own.hash.startswith(version)):
                return own
        return None

    def _add_spec(self, spec: str) -> None:
        place, _, tag = spec.partition("@")
        module_name, _, attribute = place.partition(":")
        module = _module(spec, module_name)
        if attribute:
            self._add(spec, module, attribute, _of(spec, module, attribute), tag or _LATEST)
            return
        found = [(name, own) for name, own in vars(module).items() if _is_own(module, own)]
        if not found:
            raise ConfigError("programs", spec, "has no @sgl.function and no tool of its own")
        for name, own in found:
            try:
                self._add(spec, module, name, own, tag or _LATEST)
            except ConfigError as error:
                _log.warning("not served: %s", error)

    def _add(self, spec: str, module: ModuleType, attribute: str, own: Any, tag: str) -> None:
        if isinstance(own, Tool):
            if self.tools.setdefault(own.name, own) is not own:
                raise ConfigError("programs", spec, f"there is another tool {own.name!r}")
            return
        made = _program(spec, module, attribute, own, tag)
        versions = self._programs.setdefault(made.name, [])
        if any(made.tag == other.tag for other in versions):
            raise ConfigError("programs", spec, f"there is another {made.name}@{made.tag}")
        versions.append(made)


def _module(spec: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise ConfigError("programs", spec, f"cannot be imported: {error}") from error


def _of(spec: str, module: ModuleType, attribute: str) -> Any:
    own = getattr(module, attribute, None)
    if not isinstance(own, SglFunction | Tool):
        raise ConfigError("programs", spec, f"{attribute} is no @sgl.function and no tool of {module.__name__}")
    return own


def _is_own(module: ModuleType, own: Any) -> bool:
    if isinstance(own, SglFunction):
        return bool(own.func.__module__ == module.__name__)
    return isinstance(own, Tool) and getattr(own.function, "__module__", None) == module.__name__


def _program(spec: str, module: ModuleType, attribute: str, own: SglFunction, tag: str) -> Program:
    signature = inspect.signature(own.func)
    hints = _hints(own)
    fields: list[Any] = []
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.name in own.bind_arguments:
            continue
        kind = hints.get(parameter.name, Any)
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or not _is_json(kind):
            if parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                reason = f"{attribute}: argument {parameter.name!r} cannot come as JSON"
                raise ConfigError("programs", spec, reason)
            continue
        # What is not given stays the function's own default.
        fields.append((parameter.name, kind, *(() if parameter.default is parameter.empty else (None,))))
    arguments = msgspec.defstruct(attribute, fields, forbid_unknown_fields=True, kw_only=True)
    source = inspect.getsource(module) + f"\n{attribute}"
    return Program(
        name=attribute,
        tag=tag,
        hash=hashlib.sha256(source.encode()).hexdigest(),
        about=inspect.getdoc(own.func) or "",
        program=own,
        arguments=arguments,
        schema=_schema(arguments, signature),
    )


def _hints(own: SglFunction) -> dict[str, Any]:
    try:
        return inspect.get_annotations(own.func, eval_str=True)
    except NameError:  # of types that are imported for checking only
        return {}


def _is_json(kind: Any) -> bool:
    try:
        msgspec.json.schema(kind)
    except (TypeError, NameError):
        return False
    return True


def _schema(arguments: type[msgspec.Struct], signature: inspect.Signature) -> dict[str, Any]:
    (_,), parts = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    own = parts.pop(arguments.__name__)
    properties = own.get("properties", {})
    for name, schema in properties.items():
        schema.pop("default", None)
        default = signature.parameters[name].default
        if default is not inspect.Parameter.empty and _encodes(default):
            schema["default"] = msgspec.to_builtins(default)
    schema = {"type": "object", "properties": properties, "required": own.get("required", [])}
    return schema | {"additionalProperties": False} | ({"$defs": parts} if parts else {})


def _encodes(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError):
        return False
    return True


def _shown(given: Mapping[str, Any], field: str) -> Any:
    name = field.removeprefix("arguments").lstrip(".").partition(".")[0].partition("[")[0]
    return given.get(name) if name else sorted(given)
