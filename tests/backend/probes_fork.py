"""fork and join: children say what programs that never forked say, and share what was computed before them."""

from __future__ import annotations

from typing import Any

import sglang as sgl

from support.programs import Rig, same

try:
    from sglang.global_config import global_config
except ImportError:  # moved in later versions
    from sglang.lang.global_config import global_config

STORY = "Once upon a time there was a loom. "
WAYS = ("It sang", "It broke", "It slept")
GEN = {"max_tokens": 4, "temperature": 0}


_KNOWN: dict[tuple[str, ...], tuple[list[int], str]] = {}  # all probes here use one model


def history(rig: Rig, *texts: str) -> tuple[list[int], str]:
    """Tokens of a program that never forks, with a gen after each text, and what it generates last."""
    if texts not in _KNOWN:
        before = history(rig, *texts[:-1])[0] if texts[1:] else [rig.engine.tokenizer.bos]
        tokens = [*before, *rig.engine.tokenizer.encode(texts[-1])]
        output = rig.complete(tokens, max_tokens=4)
        _KNOWN[texts] = [*tokens, *output.tokens[: output.kept]], output.text
    return _KNOWN[texts]


def unforked(rig: Rig, *texts: str) -> str:
    return history(rig, *texts)[1]


def probe_fork_and_gather(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        children = s.fork(3)
        for child, way in zip(children, WAYS, strict=True):
            child += way + sgl.gen("x", **GEN)
        children.join("gather_variable")
        s += "The end." + sgl.gen("last", **GEN)

    state = rig.run(program)
    same(state["x"], [unforked(rig, STORY + way) for way in WAYS])
    same(state["last"], unforked(rig, STORY + "The end."))
    same(state.text(), STORY + "The end." + state["last"])


def probe_group_operations(rig: Rig) -> None:
    """`+=` on a group: a function of the index, a list, one expression for all."""

    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        children = s.fork(3)
        children += lambda i: WAYS[i]
        children += sgl.gen("a", **GEN)
        children += [" and " + word for word in ("red", "green", "blue")]
        children += " wool" + sgl.gen("b", **GEN)
        children.join()

    state = rig.run(program)
    a = [unforked(rig, STORY + way) for way in WAYS]
    same(state["a"], a)
    words = ("red", "green", "blue")
    same(
        state["b"],
        [unforked(rig, STORY + way, f" and {word} wool") for way, word in zip(WAYS, words, strict=True)],
    )


def probe_same_text_in_every_child(rig: Rig) -> None:
    """Children that ask the same at once: all of them are answered, and the question is computed once."""

    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        s.sync()
        children = s.fork(6)
        children += "It" + sgl.gen("x", **GEN)
        s["metas"] = [child.get_meta_info("x") for child in children]
        children.join()

    state = rig.run(program)
    same(state["x"], [unforked(rig, STORY + "It")] * 6)
    tokens = len(rig.prompt(STORY + "It"))
    same(sorted({meta["prompt_tokens"] for meta in state["metas"]}), [tokens])
    cached = sorted(meta["cached_tokens"] for meta in state["metas"])
    same(cached, [len(rig.prompt(STORY)), *[tokens] * 5])


def probe_children_share_a_committed_prefix(rig: Rig) -> None:
    """After a sync, sglang announces the fork, and each child computes only what is its own."""

    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        s.sync()
        children = s.fork(3)
        for child, way in zip(children, WAYS, strict=True):
            child += way + sgl.gen("x", **GEN)
        s["metas"] = [child.get_meta_info("x") for child in children]
        children.join()

    state = rig.run(program)
    shared = len(rig.prompt(STORY))
    for meta, way in zip(state["metas"], WAYS, strict=True):
        same((meta["cached_tokens"], meta["prompt_tokens"]), (shared, shared + len(way)))
        same(meta["computed_tokens"], len(way) + meta["completion_tokens"] - 1)


def probe_nested_forks(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += STORY + sgl.gen("root", **GEN)
        outer = s.fork(2)
        for i, child in enumerate(outer):
            child += f" Part {i}:" + sgl.gen("part", **GEN)
            inner = child.fork(2)
            for j, grandchild in enumerate(inner):
                grandchild += f" line {j}:" + sgl.gen("line", **GEN)
            inner.join()
        outer.join()

    state = rig.run(program)
    same(state["root"], unforked(rig, STORY))
    same(state["part"], [unforked(rig, STORY, f" Part {i}:") for i in range(2)])
    same(
        state["line"],
        [[unforked(rig, STORY, f" Part {i}:", f" line {j}:") for j in range(2)] for i in range(2)],
    )


def probe_fork_of_one(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        children = s.fork(1)
        children[0] += WAYS[0] + sgl.gen("x", **GEN)
        children.join()

    same(rig.run(program)["x"], [unforked(rig, STORY + WAYS[0])])


def probe_fork_of_nothing(rig: Rig) -> None:
    """A state without text has nothing to commit."""

    @sgl.function
    def program(s: Any) -> None:
        children = s.fork(2)
        children += lambda i: WAYS[i]
        children += sgl.gen("x", **GEN)
        children.join()

    same(rig.run(program)["x"], [unforked(rig, way) for way in WAYS[:2]])


def probe_copy(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        with s.copy() as aside:
            aside += "(Aside: " + sgl.gen("aside", **GEN)
        s += "Now" + sgl.gen("x", **GEN)

    state = rig.run(program)
    same(state["aside"], [unforked(rig, STORY + "(Aside: ")])
    same(state["x"], unforked(rig, STORY + "Now"))


def probe_children_inherit_roles_and_variables(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("Two ideas?")
        s += sgl.assistant_begin()
        s += "First" + sgl.gen("common", **GEN)
        children = s.fork(2)
        for child in children:
            child += " then " + child["common"] + sgl.gen("x", **GEN)
            child += sgl.assistant_end()
        s["messages"] = [child.messages() for child in children]
        s["texts"] = [child.text() for child in children]
        children.join()

    state = rig.run(program)
    for messages, text, x in zip(state["messages"], state["texts"], state["x"], strict=True):
        said = f"First{state['common']} then {state['common']}{x}"
        same(messages[-1], {"role": "assistant", "content": said.lstrip()})
        same(text, f"<｜User｜>Two ideas?<｜Assistant｜></think>{said}<｜end▁of▁sentence｜>")


def _concatenating(rig: Rig, supported: bool) -> None:
    """Both ways to join texts give the same."""

    @sgl.function
    def program(s: Any) -> None:
        s += STORY
        children = s.fork(3)
        for child, way in zip(children, WAYS, strict=True):
            child += way + sgl.gen("x", **GEN) + ". "
        children.join("concate_and_append")
        s += "So" + sgl.gen("last", **GEN)

    before = global_config.enable_parallel_encoding
    global_config.enable_parallel_encoding = True
    rig.backend.support_concate_and_append = supported
    calls: list[tuple[int, str]] = []
    rig.backend.concatenate_and_append = lambda src, dst: calls.append((len(src), dst))
    try:
        state = rig.run(program)
    finally:
        global_config.enable_parallel_encoding = before
        del rig.backend.concatenate_and_append
    same(len(calls), 1 if supported else 0)
    first, *rest = [(way, *history(rig, STORY + way)) for way in WAYS]
    after = ". " + "".join(f"{way}{text}. " for way, _, text in rest) + "So"
    same(state.text(), f"{STORY}{first[0]}{first[2]}{after}{state['last']}")
    assert "x" not in state
    # The first child's output keeps its tokens, being the beginning of a text that was generated as such.
    same(state["last"], rig.complete([*first[1], *rig.engine.tokenizer.encode(after)], max_tokens=4).text)


def probe_join_text(rig: Rig) -> None:
    _concatenating(rig, supported=False)


def probe_join_kv(rig: Rig) -> None:
    _concatenating(rig, supported=True)


def probe_join_kv_hook_of_the_backend(rig: Rig) -> None:
    """The hook itself: nothing to do, the text is computed when it is needed."""
    same(rig.backend.concatenate_and_append(["a", "b"], "c"), None)


def probe_unknown_join(rig: Rig) -> None:
    @sgl.function
    def program(s: Any) -> None:
        children = s.fork(2)
        try:
            children.join("sideways")
        except ValueError as error:
            s["error"] = str(error)
        children.join()

    assert "sideways" in rig.run(program)["error"]
