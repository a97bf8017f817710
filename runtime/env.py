"""The environment variables that Weft sets. It reads none."""

from __future__ import annotations

import os


def limit_blas_threads(count: int) -> None:
    """Of numpy's BLAS, in this process; has no effect once numpy is imported."""
    os.environ["OPENBLAS_NUM_THREADS"] = str(count)
