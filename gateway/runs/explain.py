"""What a run would take, before it is run: its program goes its way without drawing anything, as far as that
depends on nothing that is drawn, and the engine says of each history how it would begin now."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from sglang.lang import ir

from weft.backend.borders import encoded
from weft.backend.executor import Limits, State
from weft.backend.executor.leaves import Plain, leaves, names
from weft.backend.template import DeepSeekV4Template
from weft.gateway.chat.encoding import aside, check_text, tokens_of
from weft.gateway.runs.types import Explanation, Step
from weft.runtime.engine.front import Engine
from weft.runtime.errors import RequestError

_MOST = 1000  # steps
_READ = 1 << 22  # characters before all steps, each step's counted anew


class Unforeseen(Exception):
    """The program asks for what only a run can tell."""


class _Asked:
    """One primitive that was met. text: before it, up to the first drawn one. drawn: before it, at most; known:
    tokens before it that this run will have computed; more: characters behind those."""

    def __init__(
        self, kind: str, lane: Plan, name: str | None, draws: int, own: str = "", children: int = 0
    ) -> None:
        self.kind, self.path, self.name, self.draws, self.own = kind, lane.path, name, draws, own
        self.children = children
        self.text, self.behind, self.new = lane.text, lane.behind, lane.new
        self.first = not lane.computed


class _Asks(list[_Asked]):
    """All that were met. read: characters that are to be encoded for them."""

    read = 0

    def add(self, asked: _Asked) -> None:
        self.read += len(asked.text) + len(asked.new) + len(asked.own)
        if len(self) == _MOST:
            raise Unforeseen(f"more than {_MOST} steps")
        if self.read > _READ:
            raise Unforeseen(f"more than {_READ} characters to look at")
        self.append(asked)


class Plan:
    """In the place of a lane: it takes expressions, and draws nothing. path: as a lane's."""

    closed = False
    error = None

    def __init__(self, template: DeepSeekV4Template, asked: _Asks, path: str = "") -> None:
        self.template, self.asked, self.path = template, asked, path
        self.variables: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self._text: list[str] = []  # up to what is drawn first
        self._new: list[str] = []  # since something of it was computed
        self.behind = 0  # tokens drawn, at most
        self.computed = False
        self._role: str | None = None
        self._forks = 0
        self._unknown: set[str] = set()

    def submit(self, expression: Any) -> None:
        for leaf in leaves(expression):
            match leaf:
                case ir.SglConstantText() | Plain():
                    self._say(str(leaf.value))
                case ir.SglRoleBegin():
                    self._say(self.template.get_prefix_and_suffix(leaf.role, self.messages)[0])
                    self._role = leaf.role
                case ir.SglRoleEnd():
                    self._say(self.template.get_prefix_and_suffix(leaf.role, self.messages)[1])
                    self.messages.append({"role": leaf.role, "content": ""})
                case ir.SglGen():
                    self._ask("gen", leaf.name, int(leaf.sampling_params.max_new_tokens or 128))
                    self.behind += self.asked[-1].draws
                case ir.SglSelect():
                    self._ask("select", leaf.name, 0, "".join(leaf.choices))
                    self.behind += 1
                case ir.SglVarScopeBegin() | ir.SglVarScopeEnd():
                    pass
                case _:
                    raise Unforeseen(f"{type(leaf).__name__} at {self.path or 'the beginning'}")
            self._unknown.update(names(leaf))

    @property
    def text(self) -> str:
        self._text = ["".join(self._text)]
        return self._text[0]

    @property
    def new(self) -> str:
        return "".join(self._new)

    def begin(self, text: str) -> None:
        """Say what is said already, and known."""
        self._text, self._new = [text], []

    def _say(self, text: str) -> None:
        if not self.behind:
            self._text.append(text)
        self._new.append(text)

    def _ask(self, kind: str, name: str | None, draws: int, own: str = "", children: int = 0) -> None:
        self.asked.add(_Asked(kind, self, name, draws, own, children))
        self.computed, self._new = True, []

    def get(self, name: str) -> Any:
        self.settle(name)
        return self.variables[name]

    def settle(self, name: str) -> None:
        if name in self._unknown:
            raise Unforeseen(f"variable {name!r} is read")

    def sync(self) -> None:
        """Nothing is under way."""

    rest = sync

    @property
    def transcript(self) -> Any:
        raise Unforeseen("the text is read")

    @property
    def ground(self) -> Any:
        raise Unforeseen("something waits for a tool, or for others")

    def leased(self, *_: Any) -> Any:
        raise Unforeseen("a tool is called")

    def fork(self, count: int, scopes: Any = None) -> list[Plan]:
        self._ask("fork", None, 0, children=count)
        children = []
        for number in range(count):
            child = Plan(self.template, self.asked, f"{self.path}/{self._forks + number}")
            child.variables, child.messages = dict(self.variables), list(self.messages)
            child.begin(self.text)
            child.behind, child.computed = self.behind, True
            child._role, child._unknown = self._role, set(self._unknown)
            children.append(child)
        self._forks += count
        return children

    def close(self) -> None:
        self.closed = True


class _State(State):
    """A state over a plan: what runs parts side by side goes through them one by one."""

    def gather(self, *bodies: Any, fresh: bool = False, keep: bool = False, within: Any = None) -> Any:
        return self._parts(bodies, fresh)

    def race(self, *bodies: Any, fresh: bool = False, keep: bool = False, within: Any = None) -> Any:
        self._parts(bodies, fresh)
        raise Unforeseen("a race decides")

    def first(
        self, count: int, *bodies: Any, fresh: bool = False, keep: bool = False, within: Limits | None = None
    ) -> Any:
        self._parts(bodies, fresh)
        raise Unforeseen("a race decides")

    def turn(self, *_: Any, **__: Any) -> Any:
        raise Unforeseen("a turn with tools decides")

    def _parts(self, bodies: Sequence[Any], fresh: bool) -> Any:
        plan: Any = self.lane
        lanes = plan.fork(len(bodies))
        for lane, body in zip(lanes, bodies, strict=True):
            if fresh:
                lane.begin("")
                lane.behind, lane.computed = 0, False
            state = _State(lane)
            if isinstance(body, ir.SglFunction):
                body.func(state, **body.bind_arguments)
            else:
                body(state)
        raise Unforeseen("parts are waited for")

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator[State]:
        yield self.fork(1, position_ids_offset)[0]


async def explain(
    engine: Engine, program: ir.SglFunction, arguments: Mapping[str, Any], namespace: str, thinking: bool
) -> tuple[list[Step], str | None]:
    """Its steps in order, and where it could not be foreseen. Runs the program's own code, but nothing of a
    model."""
    asked = _Asks()
    stopped: str | None = None
    state = _State(Plan(DeepSeekV4Template(thinking), asked))  # type: ignore[arg-type]
    try:
        made = program.func(state, **arguments, **program.bind_arguments)
        if inspect.iscoroutine(made):
            made.close()
            stopped = "it is an async function"
    except Unforeseen as reason:
        stopped = str(reason)
    except RequestError:
        raise
    except Exception as error:  # the program's own code, on values that it does not expect
        stopped = f"{type(error).__name__}: {error}"
    steps: list[Step] = []
    text, tokens = "", encoded(engine.tokenizer, "")[0]
    for own in asked:
        if own.text != text:  # it stays the same behind what is drawn first
            text = own.text
            check_text("text", text)
            tokens = (await aside(len(text), partial(encoded, engine.tokenizer, text)))[0]
        steps.append(await _step(engine, own, tokens, namespace))
    return steps, stopped


async def _step(engine: Engine, asked: _Asked, tokens: Sequence[int], namespace: str) -> Step:
    """tokens: of its text."""
    new = len(await tokens_of(engine.tokenizer, "text", asked.new))
    own = len(await tokens_of(engine.tokenizer, "choices", asked.own))
    forked = asked.children * engine.capacity.raw
    if not asked.first:
        # The run itself has computed what comes before, but for the token that was drawn last.
        last = min(1, asked.behind)
        history = len(tokens) + (new if asked.behind else 0)
        return Step(
            kind=asked.kind,  # type: ignore[arg-type]
            path=asked.path,
            name=asked.name,
            history=history,
            shared=max(0, history - new - (0 if asked.behind else last)),
            replayed=0,
            computed=new + last + own,
            copied_bytes=forked,
            draws=asked.draws,
            behind=asked.behind,
        )
    known = await engine.explain(tokens, namespace=namespace)
    return Step(
        kind=asked.kind,  # type: ignore[arg-type]
        path=asked.path,
        name=asked.name,
        history=len(tokens),
        shared=known.cached,
        replayed=known.replayed,
        computed=known.computed + own,
        copied_bytes=known.copied + forked,
        draws=asked.draws,
        reason=known.reason,
        differs=engine.tokenizer.decode([known.differs]) if known.differs is not None else None,
    )


def explanation(name: str, hash: str, steps: list[Step], stopped: str | None) -> Explanation:
    return Explanation(
        program=name,
        hash=hash,
        steps=steps,
        complete=stopped is None,
        stopped=stopped,
        shared=sum(step.shared for step in steps),
        replayed=sum(step.replayed for step in steps),
        computed=sum(step.computed for step in steps),
        copied_bytes=sum(step.copied_bytes for step in steps),
        draws=sum(step.draws for step in steps),
    )
