"""Everything at once, at random: what finishes is right, nothing hangs and nothing stays behind."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from support.engine import SECONDS, core_of, drawn_again, finish, running, some_tokens
from weft.runtime.decoding.params import SamplingParams
from weft.runtime.engine.front import Engine
from weft.runtime.engine.handle import Sequence
from weft.runtime.errors import Cancelled, ContextLengthError, Overloaded, RequestError

OPERATIONS = 400
PASSING = (Cancelled, Overloaded, ContextLengthError, asyncio.CancelledError)


class Client:
    """Opens, forks, extends, scores, truncates, cancels and closes, and knows what each history must be.

    A history is forgotten (None) once a call on it was cut short, since only the core knows how far it came.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.draw = Random(seed)
        self.open: dict[Sequence, list[int] | None] = {}
        self.checked = 0

    async def work(self, operations: int) -> None:
        for _ in range(operations):
            names = ["start"] if not self.open else ["start", *ACTIONS] if len(self.open) < 5 else ["close"]
            name = self.draw.choice(names)
            if name == "start":
                tokens = self.some(60)
                self.open[self.engine.open(tokens)] = tokens
                continue
            sequence = self.draw.choice(list(self.open))
            task = asyncio.ensure_future(getattr(self, name)(sequence))
            if self.draw.random() < 0.25:
                await asyncio.sleep(self.draw.random() * 0.03)
                task.cancel()
            try:
                await task
            except PASSING:
                if sequence in self.open:
                    self.open[sequence] = None
            except RequestError as error:
                assert name == "truncate", error
        for sequence in self.open:
            sequence.close()

    def some(self, most: int) -> list[int]:
        return some_tokens(self.draw.randint(1, most), self.draw.randrange(1 << 20))

    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        history = self.open[sequence]
        if history is not None:
            self.open[sequence] = history + tokens

    async def generate(self, sequence: Sequence) -> None:
        params = SamplingParams(max_tokens=self.draw.randint(0, 12), seed=self.draw.randrange(99), ignore_eos=True)
        output = await sequence.complete(params)
        history = self.open[sequence]
        assert output.finish_reason == "length"
        if history is not None:
            assert output.usage.history == len(history)
            if output.tokens:
                assert output.tokens == drawn_again(history, output.tokens, params)
                self.checked += 1
        self.append(sequence, output.tokens)

    async def fork(self, sequence: Sequence) -> None:
        for child in await sequence.fork(self.draw.randint(1, 2)):
            history = self.open[sequence]
            self.open[child] = None if history is None else list(history)

    async def score(self, sequence: Sequence) -> None:
        parts = [self.some(5) for _ in range(2)]
        found = await sequence.score(parts)
        assert [[entry.token for entry in one] for one in found] == parts

    async def append_scored(self, sequence: Sequence) -> None:
        tokens = self.some(20)
        assert [entry.token for entry in await sequence.append_scored(tokens)] == tokens
        self.append(sequence, tokens)

    async def extend(self, sequence: Sequence) -> None:
        tokens = self.some(20)
        sequence.extend(tokens)
        self.append(sequence, tokens)

    async def truncate(self, sequence: Sequence) -> None:
        history = self.open[sequence]
        if history is not None and history:
            length = max(1, len(history) - self.draw.randint(0, 1))
            await sequence.truncate(length)
            self.open[sequence] = history[:length]

    async def close(self, sequence: Sequence) -> None:
        del self.open[sequence]
        sequence.close()


ACTIONS = ("generate", "generate", "fork", "score", "append_scored", "extend", "truncate", "close")


@pytest.mark.parametrize(("seed", "slots", "tokens"), [(1, 40, 8192), (2, 6, 8192), (3, 20, 256)])
def test_random_clients(seed: int, slots: int, tokens: int) -> None:
    """With plenty of memory, with too few slots, and with too few pages."""

    async def work(engine: Engine) -> list[Client]:
        clients = [Client(engine, 10 * seed + i) for i in range(5)]
        await asyncio.gather(*(client.work(OPERATIONS // 5) for client in clients))
        return clients

    with running(slots=slots, tokens=tokens, context=256, chunk=23, page=4) as engine:
        clients = finish(asyncio.wait_for(work(engine), SECONDS))
        assert core_of(engine).pools.sizes.slots == slots
    assert sum(client.checked for client in clients) >= 5
