"""Few-shot classification: examples as turns, then the label that the model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl


@sgl.function
def few_shot(
    s: Any,
    text: str,
    examples: Sequence[tuple[str, str]],
    labels: Sequence[str] = ("yes", "no"),
    ask: str = "{} Right? Answer yes or no.",
    system: str = "",
) -> None:
    """Show `examples`, each a text and its label, as turns of a chat, and choose one of `labels` for `text`.

    ask: how a text is put. system: what stands before the examples. Sets `label` and `odds`, the log-probability
    of each label. One choice and no generation; runs that share the examples compute them once.
    """
    s += sgl.system(system)
    for shown, label in examples:
        s += sgl.user(ask.format(shown)) + sgl.assistant(label)
    s += sgl.user(ask.format(text))
    s += sgl.assistant(sgl.select("label", list(labels)))
    logprobs = s.get_meta_info("label")["normalized_prompt_logprobs"]
    s.set_var("odds", {label: round(float(p), 2) for label, p in zip(labels, logprobs, strict=True)})
