"""Self-ask: a question of several hops, taken apart and asked one hop at a time."""

from __future__ import annotations

from typing import Any

import sglang as sgl


@sgl.function
def self_ask(s: Any, facts: str, wanted: str, ask: str = "What is the {} of {}?") -> None:
    """Find `wanted`, such as "room of the boss of Malles", in `facts`: first the boss, then the boss's room.

    ask: the question of one hop. Sets `hops`, what was found at each one, and `answer`, the last. One generation a
    hop, which sees the ones before it.
    """
    chain, _, found = wanted.rpartition(" of ")
    s += sgl.user(facts)
    hops: list[str] = []
    for number, attribute in enumerate(reversed(chain.split(" of the ")), 1):
        s += sgl.user(ask.format(attribute, found))
        s += sgl.assistant(sgl.gen(f"hop {number}", max_tokens=16, temperature=0))
        found = s[f"hop {number}"].strip()
        hops.append(found)
    s.set_var("hops", hops)
    s.set_var("answer", found)
