"""Steps are timed where they run."""

from __future__ import annotations

import time

import pytest
import torch

from weft.runtime.engine.watch import Watch


def test_on_the_host_it_is_a_clock() -> None:
    watch = Watch(torch.device("cpu"))
    time.sleep(0.02)
    watch.stop()
    seconds = watch.seconds
    time.sleep(0.02)
    assert 0.02 <= seconds == watch.seconds < 1


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_devices_time() -> None:
    """Products that take milliseconds are launched in microseconds."""
    x = torch.randn(8192, 8192, device="cuda")
    x @ x
    torch.cuda.synchronize()
    begun = time.monotonic()
    watch = Watch(x.device)
    for _ in range(8):
        x @ x
    watch.stop()
    launched = time.monotonic() - begun
    assert watch.seconds > 2 * launched
