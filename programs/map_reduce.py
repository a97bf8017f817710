"""Map-reduce: the same question to every document side by side, then one turn over what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl


@sgl.function
def map_reduce(
    s: Any,
    documents: Sequence[str],
    question: str,
    combine: str = "Sort these numbers: {}",
    between: str = ", ",
) -> None:
    """Ask `question` of each document alone, then put the answers, with `between` between them, into `combine`.

    Sets `found`, the answers in the order of the documents, and `answer`. One generation a document, all at the
    same time, and one more; the last one reads the answers only, so documents may be as long as the context.
    """
    readers = s.fork(len(documents))
    for reader, document in zip(readers, documents, strict=True):
        reader += sgl.user(f"{document}\n{question}")
        reader += sgl.assistant(sgl.gen("part", max_tokens=32, temperature=0))
    found = [reader["part"].strip() for reader in readers]
    readers.join()

    s += sgl.user(combine.format(between.join(found)))
    s += sgl.assistant(sgl.gen("whole", max_tokens=64, temperature=0))
    s.set_var("found", found)
    s.set_var("answer", s["whole"].strip())
