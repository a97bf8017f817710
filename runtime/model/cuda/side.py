"""A second stream, for work of a step that does not wait for what its first stream does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Side:
    """Work within `beside` runs beside what follows it, until `join`. Without a GPU it runs in its place.

    In a captured graph these become branches. Torch hands memory out by stream: tensors made before `beside` that
    are read within must be held until `join`, and so must those made within, by whoever reads them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forked = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._forked = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What follows waits for what was begun beside it."""
        if self._stream is not None and self._forked:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._forked = False
