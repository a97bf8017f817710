"""The predicted timeline of a decode step, on counts given by hand: its bytes and its launches."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# Its modules are called like those of the tests.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from support.timeline import CARDS, Item, Step, distinct, totals
from support.timeline_counts import Count
from timeline import predicted

def count(kernels):
    return Count(4, 1000, 1000.0, ("kernel",) * kernels)

once = "norm_rope_store compress_c4 compress_c128 index_query index_logits top_k_rows fp8_linear linear route"
counts = {name: count(1) for name in (*once.split(), "hyper_head")}
counts |= {name: count(2) for name in ("hyper", "experts fp8", "experts fp4", "sample_rows")}
out = {str(us): predicted(counts, us * 1e-6) for us in (0, 2)}
out["distinct"] = [distinct(256, 6, batch) for batch in (1, 32, 256)]
items = [Item("a", 2, 8e6), Item("b", 1, 1.0, 4e9, "fp8"), Item("a", 0, 8e6)]
out["totals"] = totals(items, CARDS["B200"], 1e-6)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def figures() -> Any:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(BENCHMARKS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_op_takes_its_bytes_or_its_products_and_its_launches(figures: Any) -> None:
    assert figures["totals"] == {"a": pytest.approx(2.0), "b": pytest.approx(1.0), "launches": pytest.approx(3.0)}


def test_expected_experts(figures: Any) -> None:
    """Of one token six; of very many all."""
    one, some, many = figures["distinct"]
    assert one == pytest.approx(6) and 135 < some < 137 and 254 < many < 256


@pytest.mark.parametrize(("batch", "gigabytes"), [("1", 11.2), ("32", 86.5), ("256", 158.0)])
def test_bytes_of_a_step(figures: Any, batch: str, gigabytes: float) -> None:
    """As added up by hand for FP4 experts at 8k, with index keys in FP4, which are 3 MB a token less."""
    step = figures["2"]["H200"]["8k"]["fp4"][batch]
    keys = int(batch) * 0.003
    assert step["roofline GB"] == pytest.approx(gigabytes + keys, rel=0.01)


def test_a_step_is_its_layers_and_the_rest(figures: Any) -> None:
    for contexts in figures["2"].values():
        for formats in contexts.values():
            for step in (step for by_batch in formats.values() for step in by_batch.values()):
                layers = step["layers"]
                total = 2 * layers["window"]["us"] + 21 * layers["c4a"]["us"] + 20 * layers["c128a"]["us"]
                assert step["step us"] == pytest.approx(total + step["rest us"], rel=1e-3)
                assert step["step us"] > step["roofline us"]


def test_launches_of_a_layer(figures: Any) -> None:
    """At most 14, 20 and 16 for few tokens; each is counted at what it costs."""
    for batch in ("1", "32"):
        layers = figures["2"]["H200"]["128k"]["fp8"][batch]["layers"]
        assert [layers[kind]["launches"] for kind in ("window", "c4a", "c128a")] == [14, 20, 16]
    free, costly = (figures[us]["B200"]["8k"]["fp4"]["1"] for us in ("0", "2"))
    assert costly["step us"] - free["step us"] == pytest.approx(2 * free["launches"], abs=0.2)
