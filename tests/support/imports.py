"""Which modules a source file imports, and whether that is allowed."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from support.tree import FOLDERS


@dataclass(frozen=True)
class Import:
    """One imported name; `from a import b` gives `a.b`, whether b is a module or not."""

    name: str
    line: int
    runs_on_import: bool  # false inside functions and under TYPE_CHECKING
    relative: bool = False


def imports(source: str) -> list[Import]:
    return list(_walk(ast.parse(source), runs=True))


def _walk(node: ast.AST, runs: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, child.lineno, runs)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    parts = [module or "", *([] if alias.name == "*" else [alias.name])]
                    name = ".".join(filter(None, parts))
                    yield Import(name, child.lineno, runs, relative=level > 0)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if _loads(func):
                yield Import(name, child.lineno, runs)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _walk(child, runs=False)
            case ast.If(test=test, body=body, orelse=orelse) if "TYPE_CHECKING" in ast.dump(test):
                yield from _walk(ast.Module(body, []), runs=False)
                yield from _walk(ast.Module(orelse, []), runs)
            case _:
                yield from _walk(child, runs)


def _loads(func: ast.expr) -> bool:
    return ast.unparse(func).rpartition(".")[2] in {"import_module", "__import__"}


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that point upward, sideways out of weft, or are written relatively."""
    allowed = FOLDERS[: FOLDERS.index(module.split(".")[1]) + 1]
    found = []
    for item in imports(source):
        top, _, rest = item.name.partition(".")
        folder = rest.partition(".")[0]
        if item.relative:
            found.append(f"{module}:{item.line}: relative import of {item.name or 'the package'}")
        elif top in FOLDERS:
            found.append(f"{module}:{item.line}: {item.name}, whose name is weft.{item.name}")
        elif top == "weft" and rest and folder not in allowed:
            found.append(f"{module}:{item.line}: {item.name} from weft.{module.split('.')[1]}")
    return found


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Edges between modules of `sources` that are followed while a module is being imported."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        used = (_resolve(item.name, sources) for item in imports(source) if item.runs_on_import)
        direct = {name for name in used if name}
        # Importing a.b.c runs a and a.b first, unless we are inside them and they already run.
        outer = {
            parent
            for name in direct
            for parent in _parents(name)
            if parent in sources and not f"{module}.".startswith(f"{parent}.")
        }
        graph[module] = direct | outer
    return graph


def _resolve(name: str, known: Mapping[str, str]) -> str | None:
    """The module behind an imported name, which may be a class or function inside it."""
    return next((part for part in (name, *_parents(name)) if part in known), None)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def find_cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return None
