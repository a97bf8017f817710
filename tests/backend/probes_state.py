"""States and programs: variables, scopes, tracing, caching, binding, and the functions of sglang's module."""

from __future__ import annotations

from typing import Any

import sglang as sgl

from support.programs import Rig, same

GEN = {"max_tokens": 3, "temperature": 0}
LONG = "The same long beginning of every program of this kind, longer than sixty-four characters. "


def probe_var_scope(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Before. "
        with s.var_scope("inside"):
            s += "In: " + sgl.gen("x", **GEN)
            s += " Out."
        s += "After."

    state = rig.run(program)
    same(state["inside"], f"In: {state['x']} Out.")
    same(state.text(), f"Before. {state['inside']}After.")


def probe_variables(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s["mine"] = [1, 2]
        s.set_var("other", "wool")
        s += "Of " + s["other"] + sgl.gen("x", **GEN)
        s.sync()
        s["known"] = ("x" in s, "mine" in s, "y" in s)
        s += " Again: " + s["x"]

    state = rig.run(program)
    same((state["mine"], state.get_var("other"), state["known"]), ([1, 2], "wool", (True, True, False)))
    same(state["x"], rig.complete("Of wool", max_tokens=3).text)
    same(state.text(), f"Of wool{state['x']} Again: {state['x']}")


def probe_meta_info_by_name(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "A" + sgl.gen("x", **GEN) + "B" + sgl.gen("y", **GEN) + sgl.select("z", ["1", "2"])

    state = rig.run(program)
    x, y = state.get_meta_info("x"), state.get_meta_info("y")
    same(y["prompt_tokens"], x["prompt_tokens"] + x["completion_tokens"] + 1)
    # The last token that x drew was never fed: y computes it along with its own text.
    same(y["cached_tokens"], x["prompt_tokens"] + x["completion_tokens"])
    assert x["id"] != y["id"]
    same(len(state.get_meta_info("z")["input_token_logprobs"]), 2)
    same(state.get_meta_info("nothing"), None)


def probe_control_flow(rig: Rig) -> None:
    """A program reads what was generated and goes on accordingly."""

    @sgl.function
    def program(s: Any, turns: int) -> None:
        for turn in range(turns):
            s += f"Turn {turn}: " + sgl.gen(f"x{turn}", **GEN) + "\n"
            if "never" in s[f"x{turn}"]:
                return

    state = rig.run(program, 3)
    tokens = [rig.engine.tokenizer.bos]
    for turn in range(3):
        tokens += rig.engine.tokenizer.encode(f"Turn {turn}: ")
        output = rig.complete(tokens, max_tokens=3)
        same(state[f"x{turn}"], output.text)
        tokens += [*output.tokens[: output.kept], *rig.engine.tokenizer.encode("\n")]


def probe_arguments_and_return_value(rig: Rig) -> None:
    @sgl.function
    def program(s: Any, topic: str, times: int = 2, *, mark: str = "?") -> dict[str, Any]:
        s += topic * times + mark + sgl.gen("x", **GEN)
        return {"topic": topic, "x": s["x"]}

    for args, options, prompt in [
        (("ab",), {}, "abab?"),
        (("ab", 1), {}, "ab?"),
        ((), {"topic": "c", "times": 3, "mark": "!"}, "ccc!"),
    ]:
        state = rig.run(program, *args, **options)
        same(state["x"], rig.complete(prompt, max_tokens=3).text)
        same(state.ret_value["x"], state["x"])


def probe_wrong_arguments(rig: Rig) -> None:
    @sgl.function
    def program(s: Any, topic: str) -> None:
        s += topic

    for args, options in [((), {}), (("a", "b"), {}), (("a",), {"unknown": 1})]:
        try:
            program.run(*args, backend=rig.backend, **options)
        except TypeError as error:
            assert "argument" in str(error)
        else:
            raise AssertionError("accepted")


def probe_a_programs_own_error(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "A" + sgl.gen("x", **GEN)
        raise LookupError(s["x"])

    try:
        program.run(backend=rig.backend)
    except LookupError as error:
        same(error.args[0], rig.complete("A", max_tokens=3).text)
    else:
        raise AssertionError("swallowed")


def probe_bind(rig: Rig) -> None:
    @sgl.function
    def program(s: Any, topic: str, mark: str) -> None:
        s += topic + mark + sgl.gen("x", **GEN)

    bound = program.bind(mark="!")
    same(rig.run(bound, "a")["x"], rig.complete("a!", max_tokens=3).text)
    states = bound.run_batch([{"topic": topic} for topic in "ab"], backend=rig.backend)
    same([state["x"] for state in states], [rig.complete(f"{topic}!", max_tokens=3).text for topic in "ab"])


def probe_default_backend(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "A" + sgl.gen("x", **GEN)

    sgl.set_default_backend(rig.backend)
    try:
        expected = rig.complete("A", max_tokens=3).text
        same((program.run()["x"], program()["x"]), (expected, expected))
        cached = program.run().get_meta_info("x")["cached_tokens"]
        same(sgl.flush_cache(), None)
        same((cached, program.run().get_meta_info("x")["cached_tokens"]), (2, 0))
        same(sgl.get_server_info(), rig.backend.get_server_info())
    finally:
        sgl.set_default_backend(None)


def probe_server_info(rig: Rig) -> None:
    info = sgl.get_server_info(rig.backend)
    expected = {"model_type": "deepseek_v4", "num_hidden_layers": 3, "context_length": 1024}
    same({key: info[key] for key in expected}, expected)
    same(info["kv_bytes"], rig.engine.capacity.total)
    same(rig.backend.get_model_name(), "deepseek_v4")


def probe_no_backend(rig: Rig) -> None:
    same((sgl.flush_cache(), sgl.get_server_info()), (False, None))


def probe_cache(rig: Rig) -> None:
    """`cache()` computes the text before the first argument or gen."""

    @sgl.function
    def program(s: Any, topic: str) -> None:
        s += LONG
        s += topic + sgl.gen("x", **GEN)

    program.cache(backend=rig.backend)
    assert rig.engine._link.core.pools.free_slots < rig.engine.slots
    state = rig.run(program, "weft")
    same(state.get_meta_info("x")["cached_tokens"], len(rig.prompt(LONG)))
    same(state["x"], rig.complete(f"{LONG}weft", max_tokens=3).text)


def probe_trace(rig: Rig) -> None:
    @sgl.function
    def program(s: Any, topic: str) -> None:
        s += sgl.system("S") + sgl.user(LONG)
        s += sgl.assistant("On " + topic + sgl.gen("x", **GEN))
        children = s.fork(2)
        children += sgl.gen("y", **GEN)

    tracer = program.trace(backend=rig.backend)
    texts = [node.value for node in tracer.flatten_nodes() if type(node).__name__ == "SglConstantText"]
    same(texts, ["", "S", "", "<｜User｜>", LONG, "", "<｜Assistant｜></think>", "On ", "<｜end▁of▁sentence｜>"])
    same(sorted(tracer.variables), ["x"])
    same(len(tracer.child_states), 2)
    assert "Gen('x')" in tracer.last_node.print_graph_dfs()


def probe_untraceable_program(rig: Rig) -> None:
    """What cannot be traced runs all the same, without a cached prefix."""

    @sgl.function
    def program(s: Any, topic: str) -> None:
        s += f"{LONG}{topic}"
        s += sgl.gen("x", **GEN)

    @sgl.function
    def by_method(s: Any, topic: str) -> None:
        s.user(LONG)
        s += topic + sgl.gen("x", **GEN)

    topics = ["a", "b"]
    states = program.run_batch([{"topic": topic} for topic in topics], backend=rig.backend)
    same([state["x"] for state in states], [rig.complete(LONG + topic, max_tokens=3).text for topic in topics])
    states = by_method.run_batch([{"topic": topic} for topic in topics], backend=rig.backend)
    prompts = [f"<｜User｜>{LONG}{topic}" for topic in topics]
    same([state["x"] for state in states], [rig.complete(prompt, max_tokens=3).text for prompt in prompts])
    for untraceable, error in [(program, TypeError), (by_method, AttributeError)]:
        try:
            untraceable.trace(backend=rig.backend)
        except error:
            continue
        raise AssertionError("was traced")


def probe_program_in_a_program(rig: Rig) -> None:
    @sgl.function
    def inner(s: Any, topic: str) -> None:
        s += topic + sgl.gen("x", **GEN)

    @sgl.function
    def outer(s: Any) -> None:
        s["one"] = inner.run("one", backend=rig.backend)["x"]
        s += s["one"] + sgl.gen("x", **GEN)

    state = rig.run(outer)
    same(state["one"], rig.complete("one", max_tokens=3).text)


def probe_without_threads(rig: Rig) -> None:
    """use_thread=False runs everything in the calling thread, and lets errors through."""

    @sgl.function
    def program(s: Any, options: dict[str, Any]) -> None:
        s += "A" + sgl.gen("x", **GEN, **options)

    state = program.run({}, backend=rig.backend, use_thread=False)
    same(state["x"], rig.complete("A", max_tokens=3).text)
    try:
        program.run({"regex": "a(?=b)"}, backend=rig.backend, use_thread=False)
    except ValueError as error:
        assert str(error).startswith("regex = 'a(?=b)'"), error
    else:
        raise AssertionError("accepted")
