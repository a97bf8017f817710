"""Executors over small engines, which are empty in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from support.engine import finish, is_empty, until
from support.programs import POOLS, babbling_model, open_engine, reciting_model
from weft.backend.executor import ProgramExecutor
from weft.runtime.cache.capacity import PoolSizes

GEN: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


@asynccontextmanager
async def executing(*lines: str, pools: PoolSizes = POOLS, **options: Any) -> AsyncIterator[ProgramExecutor]:
    """An executor over an engine of its own, which is empty in the end. lines: what its model says."""
    with open_engine(reciting_model(*lines) if lines else babbling_model(), pools) as engine:
        with ProgramExecutor(engine, **options) as executor:
            yield executor
        await until(lambda: is_empty(engine))


def run(program: Any, *args: Any, lines: tuple[str, ...] = (), options: Any = None, **kwargs: Any) -> Any:
    """One program on an executor of its own."""

    async def work() -> Any:
        async with executing(*lines, **(options or {})) as executor:
            return await executor.run(program, *args, **kwargs)

    return finish(work())


def check(work: Coroutine[Any, Any, None]) -> None:
    finish(work)


async def settled() -> None:
    """Whatever was begun on this loop has had its turn."""
    for _ in range(5):
        await asyncio.sleep(0)
