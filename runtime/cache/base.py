"""The contract of state at a cut: what a sequence must have before its next token can be computed exactly.

At a cut p (the next token has position p; L layers, window W) a sequence needs

- the entries of every complete group: c4a entries and indexer keys j < p // 4, c128a entries j < p // 128.
  Together they are its *chain*. A chain depends on the tokens alone, is never changed once written, and may be
  shared.
- *raw* state, which belongs to the cut: window rows of the positions p-W+1 .. p-1 of every layer, the last inputs
  of each c4a compressor (p % 4 + 4 of them), the running fold of each c128a compressor's open group, and the
  streams of token p - 1, which give its logits. With an MTP block also its window rows p-W .. p-2.

Both come from computing every token from 0. Raw state alone can also be rebuilt behind a chain that is there:

- **Restore**: raw state was saved at the cut, or before it: then the tokens between are computed, and their
  entries, being in the chain, are not written.
- **Replay**: the tokens from some R < p on are computed against the chain. At layer l a row is exact if the W - 1
  rows before it are exact at layer l - 1, so rows are exact from R + (W-1) l on, and only those are computed.
  `replay_start` gives the latest R that makes all raw state exact.

Exact means equal to the bit: each op gives a row the same bits whatever else it computes (docs/structures.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.runtime.config import C4, C128, ModelConfig


@dataclass(frozen=True)
class Span:
    """`count` consecutive tokens of the sequence in `slot`, the first at position `start`.

    chain: entries of the groups below this position are there already and are only read. floor: where a replay has
    begun, or 0; layer l then leaves out the rows before floor + (W - 1) * l, which are not exact (above).
    """

    slot: int
    start: int
    count: int
    chain: int = 0
    floor: int = 0


def replay_start(config: ModelConfig, cut: int, *, mtp: bool = False) -> int:
    """Where computing must begin to have exact raw state at `cut`, the chain being there; 0 is a cold start.

    mtp: the MTP block's window rows are wanted too. Source: the dependence of window rows on the layer below
    (DeepSeek-V4 report, section 3.5.2), tightened to the row; the tests poison every row before it.
    """
    reach = config.sliding_window - 1
    layers = config.num_hidden_layers
    starts = [cut - 1 - reach * (layers + mtp)]
    for layer, kind in enumerate(config.layer_kinds):
        if kind == "c4a":
            starts.append(cut - (cut % C4 + C4) - reach * layer)
        elif kind == "c128a":
            starts.append(cut - cut % C128 - reach * layer)
    return max(0, min(starts))
