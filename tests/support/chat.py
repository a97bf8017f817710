"""Chat messages, tools, and tokenizers to render them with."""

from __future__ import annotations

from functools import cache
from typing import Any

import tokenizers

from weft.runtime.text.tokenizer import Tokenizer, byte_tokenizer_json
from weft.runtime.text.tokens import LEADING, TRAILING

# Spelled out once more: the code under test must not vouch for its own constants.
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, D = "<｜User｜>", "<｜Assistant｜>", "｜DSML｜"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Wetter für "eine" Stadt',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id: str, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


@cache
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer_json()))


@cache
def merging_json() -> str:
    """Merges, V4's kind of splitting, and specials of which some are not flagged as such, as in the releases."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.Regex(
        r"\p{N}{1,3}|[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=list(LEADING),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(
        ["".join(TRAILING) * 9, "Reasoning effort: You can invoke the tools by parameter name. " * 9], trainer
    )
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in TRAILING[:2]])
    backend.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in TRAILING[2:]])
    text: str = backend.to_str()
    return text
