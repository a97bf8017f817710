"""The probes of sglang's interpreter through its own `RuntimeEndpoint`: the same results over HTTP."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import register_chat_template

from support.gateway import serving
from support.programs import Rig, babbling_model, guarded, probes, shared_engine
from weft.backend.template import DeepSeekV4Template
from weft.runtime.errors import ContextLengthError, RequestError, UnsupportedError

for thinking in (False, True):
    register_chat_template(DeepSeekV4Template(thinking))

# What cannot be the same through sglang's own client, and how it ends there instead: each is held to that, so that
# one which comes to pass is not left out any longer.
OTHERS: dict[str, tuple[str, str]] = {
    "logprobs_of_several": ("the client cannot read n > 1 completions, of any server", "'NoneType' object is not"),
    "several_completions": ("as above", "'answer'"),
    "several_at_once": ("as above", ""),
    "several_streams_are_refused": ("the client streams the first of them", "got 'Give me .*expected 'Give me '"),
    "join_kv_hook_of_the_backend": (
        "requests have no ids to find KV by",
        "concate_and_append.*cannot be done over HTTP",
    ),
    "api_speculation_is_refused": ("the client breaks before it sends anything", "no attribute 'is_chat_model'"),
    "wrong_selects": ("the client refuses them by an assert", r"AssertionError\(\)"),
    "without_threads": ("the client raises a RuntimeError with the body, not a RequestError", "regex parse error"),
    "batch_with_a_failing_item": ("as above", "text = .*must not be empty"),
    "grammars_that_are_none": ("the client refuses dtypes that it does not know", "Invalid dtype"),
}
# Where the results are the same, but not how many tokens were cached.
COUNTS = {
    "batch_in_one_thread": "the prefix that sglang computes ahead is known whole, its last token too",
    "batch_in_threads": "as above",
    "batch_in_three_threads": "as above",
    "meta_info_by_name": "a sequence of its own for each call: the token drawn last was not computed yet",
    "select_keeps_what_was_computed": "as above",
    "unconditional_likelihood_normalized": "the client does not ask for the texts of those tokens",
}
# `test_cache` is in its place: it looks into the engine for a sequence that a server does not keep open.
REPLACED = {"cache"}
# Requests come one after another, not at the same moment: how many find what the first has computed differs.
RACES = {
    "same_text_in_every_child": "children compute side by side",
    "batch_of_the_same": "items do",
}
_COUNTED = r"got (\[?\d[\d, ]*\]?|None)\nexpected (\[?\d[\d, ]*\]?|'y')$"
KINDS: dict[str, Any] = {
    "unsupported": UnsupportedError,
    "context_length_exceeded": ContextLengthError,
    "invalid_value": RequestError,
    "invalid_type": RequestError,
}
FIELDS = {"image_data": "image", "max_new_tokens": "max_tokens"}
NAMES = sorted(probes().keys() - OTHERS.keys() - REPLACED)


class Lent:
    """An engine that a gateway does not close."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


class Remote(Rig):
    """A rig whose backend is sglang's, over HTTP."""

    def error(self, state: Any) -> Exception:
        """The client raises a RuntimeError with the body: what the body says, as the exception it was."""
        error = super().error(state)
        if not isinstance(error, RuntimeError) or not isinstance(error.args[0], dict):
            return error
        told = error.args[0]["error"]
        field = told["field"].removeprefix("sampling_params.").partition("[")[0]
        field = FIELDS.get(field, field)
        reason = told["message"].partition(": ")[2]
        return KINDS[told["type"]](field, told["value"], reason)

    def __init__(self, engine: Any, model: Any, **options: Any) -> None:
        super().__init__(engine, model, **options)
        name = self.backend.chat_template.name
        guarded(self.backend.shutdown)
        self._stack = contextlib.ExitStack()
        gateway = self._stack.enter_context(serving(lambda: Lent(engine), names=["deepseek_v4"]))  # type: ignore[arg-type,return-value]
        self.backend = RuntimeEndpoint(gateway.url, chat_template_name=name)
        self.backend.shutdown = self._stack.close


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote(shared_engine(), babbling_model())
    made.backend.flush_cache()
    try:
        yield made
    finally:
        guarded(made.backend.shutdown)


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize("name", NAMES)
def test_probe(name: str, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(name)
    monkeypatch.setattr("support.programs.Rig", Remote)
    differs = contextlib.nullcontext() if name not in COUNTS else pytest.raises(AssertionError, match=_COUNTED)
    try:
        with differs:
            guarded(lambda: probes()[name](remote), 30)
    except AssertionError as error:
        if name not in RACES or not re.search(_COUNTED, str(error)):
            raise


@pytest.mark.filterwarnings("ignore")  # of threads that the client leaves behind when it breaks
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_left_out_cannot_be_the_same(name: str, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.programs.Rig", Remote)
    with pytest.raises((AssertionError, LookupError, RuntimeError, TypeError)) as error:
        guarded(lambda: probes()[name](remote), 30)
    _, how = OTHERS[name]
    assert re.search(how, str(error.value), re.DOTALL), error.value


def test_every_probe_is_run_or_left_out_by_name() -> None:
    assert OTHERS.keys() | COUNTS.keys() | RACES.keys() <= probes().keys()
    assert sorted([*NAMES, *OTHERS, *REPLACED]) == sorted(probes())


def test_cache(remote: Remote) -> None:
    """`cache()` computes the text before the first argument or gen."""
    long = "A text before the first argument. " * 4

    @sgl.function
    def program(s: Any, topic: str) -> None:
        s += long
        s += topic + sgl.gen("x", max_tokens=3, temperature=0)

    program.cache(backend=remote.backend)
    state = remote.run(program, "weft")
    assert state.get_meta_info("x")["cached_tokens"] == len(remote.prompt(long))
    assert state["x"] == remote.complete(f"{long}weft", max_tokens=3).text
