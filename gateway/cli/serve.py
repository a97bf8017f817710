"""`weft serve`: programs and compatible APIs over HTTP."""

from __future__ import annotations

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

import uvloop

from weft.gateway.http.config import Bounds, ServeConfig
from weft.gateway.http.keys import Keys
from weft.gateway.http.server import Server
from weft.gateway.http.start import make_engine, prepare
from weft.gateway.http.state import State
from weft.runtime.cache.capacity import PoolSizes
from weft.runtime.engine.config import CoreLimits, EngineConfig
from weft.runtime.engine.front import EMBEDDED


def run(args: argparse.Namespace) -> int:
    config = ServeConfig(
        host=args.host,
        port=args.port,
        names=tuple(args.name or ("deepseek-v4",)),
        thinking=args.thinking,
        programs=tuple(args.programs),
        keys=Keys.load(Path(args.api_keys)) if args.api_keys else Keys(),
        bounds=Bounds(queue=args.queue, share=args.share, drain=args.drain, keepalive=args.keepalive),
    )
    sizes = PoolSizes()
    engine = EngineConfig(
        device=args.device,
        dtype=args.dtype,
        quant_sim=args.quant_sim,
        pools=PoolSizes(
            tokens=args.kv_tokens or sizes.tokens,
            slots=args.slots or sizes.slots,
            context=args.context or sizes.context,
        ),
        limits=CoreLimits(queue=max(1024, 2 * args.queue), drafts=args.drafts),
        threads=args.threads,
    )
    path = EMBEDDED if args.model == "embedded" else Path(args.model)
    server = Server(State(config), partial(make_engine, path, engine), _prepare)
    uvloop.run(server.run(_tell))
    return 0


async def _prepare(state: State) -> None:
    await prepare(state)
    # What exists now stays: it need not be looked through for garbage again, while requests wait.
    gc.collect()
    gc.freeze()


def _tell(stage: str) -> None:
    print(f"weft: {stage}", file=sys.stderr, flush=True)
