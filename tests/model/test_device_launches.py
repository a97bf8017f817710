"""What a decode step launches: so many kernels a layer, and nothing of torch's between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Model, sequences and step are those of benchmarks/step_gpu.py, whose modules are called like those of the tests.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
import torch
from step_gpu import RATIOS, begun, config_of, step_of
from support.random_weights import RandomWeights
from weft.kernels.gpu.interpreter import install, launches
from weft.runtime.config import ModelConfig
from weft.runtime.model.cuda.model import DeviceModel

install()
torch.manual_seed(0)
small = replace(
    ModelConfig(), vocab_size=64, hidden_size=128, num_attention_heads=4, head_dim=64, qk_rope_head_dim=16,
    q_lora_rank=32, o_lora_rank=16, o_groups=2, index_n_heads=4, index_head_dim=32, index_topk=8,
    n_routed_experts=8, moe_intermediate_size=64, num_experts_per_tok=2, sliding_window=64,
)
found = {}
for kind, ratio in RATIOS.items():
    config = config_of(ratio, small)
    model = DeviceModel(config, RandomWeights(config, "cpu"), device="cpu", experts="fp8")
    blocks, seen = model.blocks, []
    for depth in (1, 2):
        model.blocks = blocks[:depth]
        pools, states = begun(model, 2, 256)
        with launches() as count:
            assert bool(torch.isfinite(step_of(model, states, pools)).all())
        seen.append(count.names)
    for name in seen[0]:
        seen[1].remove(name)
    found[kind] = seen[1]
print(json.dumps(found))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts launches")
def test_a_layer_more_is_so_many_kernels_more() -> None:
    """With contexts beyond 64k tokens c4a has one more, see test_launches."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {kind: len(names) for kind, names in found.items()} == {"window": 14, "c4a": 19, "c128a": 16}
    assert not [name for names in found.values() for name in names if name.startswith("aten.")]
