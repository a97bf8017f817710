"""DeepSeek-V4's special tokens and the layout of a chat, as published with the model (encoding_dsv4)."""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

# BOS, EOS and PAD have the ids 0, 1 and 2 in every V4 vocabulary.
LEADING = (BOS, EOS, PAD)
TRAILING = (USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER)
