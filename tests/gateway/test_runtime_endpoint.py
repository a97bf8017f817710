"""The probes of sglang's interpreter through its own `RuntimeEndpoint`: the same results over HTTP."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import register_chat_template

from support.gateway import serving
from support.programs import Rig, babbling_model, guarded, probes, shared_engine
from weft.backend.template import DeepSeekV4Template
from weft.runtime.errors import ContextLengthError, RequestError, UnsupportedError

for thinking in (False, True):
    register_chat_template(DeepSeekV4Template(thinking))

OTHERS: dict[str, str] = {
    "logprobs_of_several": "sglang's client cannot read n > 1 completions, of any server",
    "several_completions": "as above",
    "several_at_once": "as above",
    "several_streams_are_refused": "as above",
    "join_kv_hook_of_the_backend": "refused: requests have no ids to find KV by",
    "api_speculation_is_refused": "the client itself breaks",
    "wrong_selects": "the client refuses them by an assert",
    "without_threads": "the client's error is a RuntimeError with the body",
    "batch_with_a_failing_item": "as above",
    "grammars_that_are_none": "the client knows the dtypes itself",
    "cache": "a server keeps nothing open between requests; what is cached is counted elsewhere",
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
RACES = {"same_text_in_every_child": "children compute side by side"}  # and may differ in the counts
_COUNTED = r"got (\[?\d[\d, ]*\]?|None)\nexpected (\[?\d[\d, ]*\]?|'y')$"
KINDS: dict[str, Any] = {
    "unsupported": UnsupportedError,
    "context_length_exceeded": ContextLengthError,
    "invalid_value": RequestError,
    "invalid_type": RequestError,
}
FIELDS = {"image_data": "image", "max_new_tokens": "max_tokens"}
NAMES = sorted(probes().keys() - OTHERS)


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
