"""DeepSeek-V4's chat layout as an sglang chat template.

sglang itself resolves V4 model names to a template with `USER:` markers, which V4 was not trained on.
"""

from __future__ import annotations

from typing import Any

from sglang.lang.chat_template import ChatTemplate

from weft.runtime.text.tokens import ASSISTANT, EOS, THINK_END, THINK_START, USER


class DeepSeekV4Template(ChatTemplate):
    """`{system}<｜User｜>{user}<｜Assistant｜></think>{assistant}EOS`, BOS added by the backend.

    thinking: the assistant turn opens `<think>` instead of closing it, and its text is reasoning, `</think>`,
    answer. `stop_str` is empty on purpose: the engine stops at the EOS token, and sglang would append the
    strings to the caller's own stop list.
    """

    def __init__(self, thinking: bool = False) -> None:
        opening = ASSISTANT + (THINK_START if thinking else THINK_END)
        super().__init__(
            name="deepseek-v4-thinking" if thinking else "deepseek-v4",
            default_system_prompt=None,
            role_prefix_and_suffix={"system": ("", ""), "user": (USER, ""), "assistant": (opening, EOS)},
            stop_str=(),
        )

    def get_prefix_and_suffix(self, role: str, hist_messages: list[dict[str, Any]]) -> tuple[str, str]:
        """As the model's encoder: consecutive user messages are one turn, joined by a blank line."""
        if role == "user" and hist_messages and hist_messages[-1]["role"] == "user":
            return "\n\n", ""
        prefix, suffix = super().get_prefix_and_suffix(role, hist_messages)
        return prefix, suffix
