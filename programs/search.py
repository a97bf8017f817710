"""A search: a reader for every document, the first who finds the answer ends the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import sglang as sgl

from weft.backend.executor import Limits


@sgl.function
def search(s: Any, documents: Sequence[str], attribute: str, name: str, seconds: float = 60.0) -> None:
    """Look for an attribute of `name` in all documents at the same time, for so many seconds at most.

    A reader has found it if it judges its own answer right. Sets `answer` and `document`, the place of the one it
    is from. A generation and a choice for each document; those still under way when one has found it are
    cancelled. Raises `ProgramError` if none does. Needs the executor: `s.race`.
    """
    s += sgl.system("Give short answers.")
    readers = [partial(_read, document, attribute, name) for document in documents]
    found = s.race(*readers, within=Limits(seconds=seconds))
    s.set_var("answer", found.value)
    s.set_var("document", found.place)


def _read(document: str, attribute: str, name: str, s: Any) -> str:
    s += sgl.user(document)
    with s.copy() as reader:
        reader += sgl.user(f"What is the {attribute} of {name}?")
        reader += sgl.assistant(sgl.gen("answer", max_tokens=16, temperature=0))
        answer: str = reader["answer"].strip()
    s += sgl.user(f"Is it right that the {attribute} of {name} is {answer}? Answer yes or no.")
    s += sgl.assistant(sgl.select("verdict", ["yes", "no"]))
    if s["verdict"] == "no":
        raise LookupError(f"the {attribute} of {name} is not in the document")
    return answer
