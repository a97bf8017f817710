"""Parts that run side by side, limits, and drawing again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import sglang as sgl

from support.engine import core_of, finish, free, until
from support.executor import GEN, check, executing, run
from weft.backend.executor import Attempts, Branch, Limits, Price, ProgramError
from weft.runtime.errors import BudgetExceeded, Cancelled, ConfigError, DeadlineExceeded, RequestError

LONG: dict[str, Any] = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}


def short(b: Any) -> str:
    b += "s" + sgl.gen("x", **GEN)
    return str(b["x"])


async def long(b: Any) -> str:
    for turn in range(3):
        b += "l" + sgl.gen(f"x{turn}", **LONG)
        _ = b[f"x{turn}"]
    return "long"


def odd(b: Any) -> None:
    b += sgl.gen("odd", temperature=-1)


def broken(b: Any) -> None:
    raise LookupError("mine")


def test_parts_run_at_the_same_time_and_come_back_in_order() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        meet = asyncio.Barrier(3)

        async def one(b: Any, number: int) -> int:
            await meet.wait()  # nobody passes before all are here
            b += f"{number}" + sgl.gen("x", **GEN)
            return number

        branches = s.gather(*(lambda b, n=n: _wait(one(b, n)) for n in range(3)))
        return [(branch.value, branch["x"], branch.state.text()) for branch in branches]

    def _wait(coroutine: Any) -> Any:
        return coroutine

    ended = run(program)
    assert [value for value, _, _ in ended.value] == [0, 1, 2]
    assert all(text == f"Once {value}{x}" for value, x, text in ended.value)
    assert ended.cost.generations == 3


def test_the_first_to_succeed_wins_and_the_rest_is_cancelled_at_once() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        winner = s.race(long, odd, short, broken)
        return winner.place, winner.value, winner["x"]

    async def work() -> None:
        async with executing() as executor:
            ended = await executor.run(program)
            place, value, variable = ended.value
            assert (place, value) == (2, variable)
            assert ended.cost.generated < 100  # of 450 and more

    check(work())


def test_some_of_many() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        return [branch.place for branch in s.first(2, long, short, odd, short)]

    assert sorted(run(program).value) == [1, 3]


def test_a_failure_at_the_join_has_its_origin_and_what_the_others_made() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Once "

        def nested(b: Any) -> None:
            b += "more "
            b.gather(short, odd)

        s.gather(short, nested)

    with pytest.raises(ProgramError) as caught:
        run(program)
    error = caught.value
    assert (error.program, error.path, error.variable) == ("program", "/1/1", "odd")
    assert isinstance(error.__cause__, RequestError)
    first, second = error.partial
    assert isinstance(first, Branch) and first.value == first["x"]
    inner = second.error.partial
    assert inner[0].value == inner[0]["x"] and inner[1].error.variable == "odd"


def test_too_few_succeed() -> None:
    @sgl.function
    def program(s: Any, wanted: int) -> None:
        s.first(wanted, short, odd, long, broken)

    with pytest.raises(ProgramError) as caught:
        run(program, 3)
    states = [branch.error and type(branch.error.__cause__) for branch in caught.value.partial]
    assert states[1] is RequestError and states[3] is LookupError and states[2] is Cancelled
    with pytest.raises(RequestError, match="count"):
        run(program, 5)


def test_a_part_goes_on_where_another_came_to() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        kept = s.gather(short, short, keep=True)
        s.become(kept[1].state)
        s += "!" + sgl.gen("y", **GEN)
        return kept[0].state.text()

    ended = run(program)
    assert ended.text() == f"{ended.value}!{ended['y']}" and ended.value == f"Once s{ended['x']}"
    assert ended.state.get_meta_info("y")["cached_tokens"] > 8


def test_a_fresh_part_knows_nothing() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        (branch,) = s.gather(short, fresh=True)
        return branch.state.text()

    ended = run(program)
    assert ended.value.startswith("s") and ended.text() == "Once "


# -- limits ------------------------------------------------------------------------------------------------


def test_a_part_is_held_to_its_own_deadline() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        with pytest.raises(ProgramError) as caught:
            s.gather(short, lambda b: asyncio.sleep(60), within=Limits(seconds=0.3))
        assert isinstance(caught.value.__cause__, DeadlineExceeded)
        assert caught.value.partial[0].value is not None
        s += sgl.gen("x", **GEN)
        return s["x"]

    assert run(program).value


def test_a_part_is_held_to_the_deadline_of_the_whole() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s.gather(lambda b: b.gather(long, long, within=Limits(seconds=60)))

    with pytest.raises(DeadlineExceeded, match="program"):
        run(program, within=Limits(seconds=0.1))


@pytest.mark.parametrize(
    ("limits", "name"), [(Limits(tokens=40), "tokens"), (Limits(cost=4.0, price=Price(generated=0.1)), "cost")]
)
def test_a_budget_is_kept_over_all_states(limits: Limits, name: str) -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        forks = s.fork(3)
        forks += sgl.gen("x", **LONG)
        forks.join()

    async def work() -> None:
        async with executing() as executor:
            with pytest.raises(ProgramError) as caught:
                await executor.run(program, within=limits)
            cause = caught.value.__cause__
            assert isinstance(cause, BudgetExceeded) and cause.limit == name
            await until(lambda: not core_of(executor.engine).calls)

    check(work())


def test_a_parts_budget_leaves_the_rest_its_own() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        with pytest.raises(ProgramError, match="tokens = 20"):
            s.gather(long, within=Limits(tokens=20))
        s += sgl.gen("x", **GEN)
        return s["x"]

    ended = run(program, within=Limits(tokens=60))
    assert len(ended.value) > 0 and 28 < ended.cost.generated < 40


def test_a_budget_that_is_just_enough() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once " + sgl.gen("x", **GEN) + "!"
        s.sync()

    assert run(program, within=Limits(tokens=8)).cost.generated == 8


@pytest.mark.parametrize("field", ["seconds", "tokens", "cost"])
@pytest.mark.parametrize("value", [0, -1, "1", True])
def test_limits_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Limits(**{field: value})


# -- cancelling --------------------------------------------------------------------------------------------


def test_cancelling_frees_all_within_a_step_even_in_the_middle_of_a_prompt() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "word " * 150 + sgl.gen("first", **GEN)
        forks = s.fork(3)
        forks += lambda i: f"{i} " * 40 + sgl.gen("x", **LONG)
        forks.join()

    async def cancelled_after(steps: int) -> None:
        async with executing() as executor:
            core = core_of(executor.engine)
            taken, step = 0, core.step

            def counted() -> None:
                nonlocal taken
                step()
                taken += 1

            core.step = counted  # type: ignore[method-assign]
            task = asyncio.ensure_future(executor.run(program))
            await until(lambda: taken >= steps)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            at = taken
            await until(lambda: not core.sequences and free(core.pools, core.memory.prefix))
            assert taken - at <= 2  # the one under way, and at most one begun before the messages were read

    for steps in (1, 2, 4, 9, 14):
        finish(cancelled_after(steps))


# -- drawing again -----------------------------------------------------------------------------------------


SCHEMA = json.dumps(
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
)


def test_what_does_not_pass_is_drawn_anew_from_where_it_began() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        seen: list[str] = []

        def check_(trial: Any) -> None:
            seen.append(trial["x"])
            if len(seen) < 3:
                raise ValueError("not yet")

        s.attempt(sgl.gen("x", **GEN) + ".", check_, Attempts(4, temperature=2.0))
        return seen

    ended = run(program)
    assert len(ended.value) == 3 and len(set(ended.value)) > 1
    assert ended.text() == f"Once {ended.value[-1]}." and ended["x"] == ended.value[-1]


def test_a_cut_off_document_is_drawn_again_and_at_last_refused() -> None:
    @sgl.function
    def program(s: Any, room: int) -> Any:
        s += "Once "
        s.attempt(sgl.gen("x", json_schema=SCHEMA, max_tokens=room), lambda b: json.loads(b["x"]), Attempts(2))
        return json.loads(s["x"])

    assert set(run(program, 40).value) == {"a"}
    with pytest.raises(ProgramError) as caught:
        run(program, 4)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    assert caught.value.variable == "x" and len(caught.value.partial) == 2


def test_feedback_stays_in_the_text() -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "Once "
        seen: list[str] = []

        def check_(trial: Any) -> None:
            seen.append(trial["x"])
            if len(seen) < 2:
                raise ValueError("too dull")

        s.attempt(sgl.gen("x", **GEN), check_, Attempts(2, feedback=lambda error: f"({error})"))
        return seen

    ended = run(program)
    first, second = ended.value
    assert ended.text() == f"Once {first}(too dull){second}"


def test_a_refused_request_is_not_tried_again() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s.attempt(sgl.gen("x", temperature=-1), lambda b: None)

    with pytest.raises(ProgramError) as caught:
        run(program)
    assert isinstance(caught.value.__cause__, RequestError) and not caught.value.partial
