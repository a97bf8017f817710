"""A chat that remembers: what was said turns ago, and what was said in earlier chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl


@sgl.function
def chat(s: Any, messages: Sequence[str], memory: Sequence[str] = (), system: str = "Give short answers.") -> None:
    """Go through `messages`: those that end with a question mark are answered, others are remembered.

    Sets `replies`, an answer for each question, and `memory`, all that was remembered; given to the next chat as
    `memory`, it is known there from the start. One generation a question, which computes the turns since the last.
    """
    s += sgl.system(system)
    remembered = list(memory)
    if remembered:
        s += sgl.user("\n".join(remembered))
    replies: list[str] = []
    for message in messages:
        s += sgl.user(message)
        if not message.rstrip().endswith("?"):
            remembered.append(message)
            continue
        name = f"reply {len(replies) + 1}"
        s += sgl.assistant(sgl.gen(name, max_tokens=64, temperature=0))
        replies.append(s[name].strip())
    s.set_var("replies", replies)
    s.set_var("memory", remembered)
