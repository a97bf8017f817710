"""What the embedded model is and how it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from weft.runtime.config import ModelConfig, RopeScaling, preset
from weft.runtime.embedded.data import TASKS, WEIGHTS
from weft.runtime.embedded.optimizer import Rates

CONFIG: ModelConfig = dataclasses.replace(
    preset("tiny"),
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_lora_rank=64,
    o_groups=2,
    sliding_window=64,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 4, 0),
    index_n_heads=16,
    index_head_dim=32,
    index_topk=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=2,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    rope_scaling=RopeScaling(original_max_position_embeddings=4096),
    max_position_embeddings=16384,
)


@dataclass(frozen=True)
class Stage:
    """share: of the training. length: tokens of a row, rows: of a step. longest: tokens of a document at most,
    `long`: share of documents that are long. sparse: c4a layers attend to the indexer's choice only. shipped:
    weights are rounded to the released formats (KV rows and indexer vectors always are). tasks: their weights."""

    share: float
    length: int
    rows: int
    longest: int
    long: float = 0.0
    sparse: bool = True
    shipped: bool = False
    tasks: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)


@dataclass(frozen=True)
class Recipe:
    """stages: from short to long. The training ends after so many steps or minutes, whatever comes first. draft,
    index, other: weights of the MTP loss, of the indexers' loss, and of tokens that the model does not say itself.
    seed: of weights and data."""

    stages: tuple[Stage, ...]
    config: ModelConfig = CONFIG
    steps: int = 1_000_000
    minutes: float = 1e9
    seed: int = 0
    rates: Rates = field(default_factory=Rates)
    warmup: int = 100  # steps over which the rates rise
    cooldown: float = 0.8  # share of the training at the end over which they fall to nothing
    draft: float = 0.3
    index: float = 0.5
    other: float = 0.05

    def progress(self, step: int, seconds: float) -> float:
        """From 0 to 1, the end."""
        return min(max(step / self.steps, seconds / (60 * self.minutes)), 1.0)

    def stage(self, progress: float) -> int:
        """The number of the stage that is on."""
        end = 0.0
        for number, stage in enumerate(self.stages):
            end += stage.share
            if progress < end:
                return number
        return len(self.stages) - 1

    def scale(self, step: int, progress: float) -> float:
        """Of the rates."""
        return min((step + 1) / self.warmup, 1.0, (1 - progress) / self.cooldown)


# More of what is right on phrasings that were trained on and wrong on others.
_GENERALISE = {task: 0.5 for task in TASKS} | {"two_hop": 4.0, "sort": 3.0, "multiple_choice": 2.0, "judge": 2.0}
_RETRIEVE = {task: 0.5 for task in TASKS} | {"recall": 4.0, "two_hop": 4.0, "table_extract": 2.0, "sort": 1.0}

RECIPES = {
    "gpu": Recipe(
        (
            Stage(0.22, 2048, 32, 512, sparse=False),
            Stage(0.33, 2048, 32, 2048, 0.15, shipped=True),
            Stage(0.45, 8192, 8, 8192, 0.25, shipped=True),
        ),
        minutes=34,
    ),
    # Goes on from a trained model (`--start`), on a CPU too: for phrasings that were added since.
    "polish": Recipe(
        (Stage(1.0, 512, 8, 512, shipped=True, tasks=_GENERALISE),),
        minutes=34,
        seed=1,
        rates=Rates(muon=0.004, adam=4e-4),
        warmup=10,
        cooldown=1.0,
    ),
    # Goes on from that, on a GPU: for facts far back.
    "far": Recipe(
        (
            Stage(0.35, 2048, 32, 2048, 0.3, shipped=True, tasks=_GENERALISE),
            Stage(0.65, 8192, 8, 8192, 0.6, shipped=True, tasks=_RETRIEVE),
        ),
        minutes=23.5,
        seed=2,
        rates=Rates(muon=0.01, adam=1e-3),
        cooldown=1.0,
    ),
    # Every stage, in a minute on a CPU; it learns nothing.
    "smoke": Recipe(
        (
            Stage(0.4, 512, 1, 512, sparse=False),
            Stage(0.3, 512, 2, 512),
            Stage(0.3, 1024, 1, 1024, 0.5, shipped=True),
        ),
        config=dataclasses.replace(CONFIG, hidden_size=64, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0)),
        steps=10,
        warmup=4,
    ),
}
