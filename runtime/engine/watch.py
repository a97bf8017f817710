"""How long work on a device takes, measured without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Watch:
    """Begins when it is made. On a GPU it marks the stream, and reads the marks when it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = self._mark()
        self._ended = self._begun

    def stop(self) -> None:
        self._ended = self._mark()

    @property
    def seconds(self) -> float:
        """From its beginning to when it was stopped. Waits until the device has come there: to be asked once
        something behind it has been waited for."""
        if self._device.type != "cuda":
            return float(self._ended - self._begun)
        self._ended.synchronize()
        return float(self._begun.elapsed_time(self._ended)) / 1000

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
