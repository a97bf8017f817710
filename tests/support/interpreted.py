"""Triton's interpreter, for tests of kernels with many device functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from weft.kernels.gpu.interpreter import install


@contextmanager
def quick_calls() -> Iterator[None]:
    """Calls of device functions within one launch replace the language's builtins once per module, not every time:
    that is most of the time that small launches take. Where there is a GPU, nothing is interpreted."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter as ti

    install()
    replaced: set[str] = set()
    launch = ti.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in replaced:
            replaced.add(module)
            ti._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ti.InterpretedFunction, "__call__", call)
        patch.setattr(ti.GridExecutor, "__call__", start)
        yield
