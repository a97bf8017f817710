"""gen: text, lengths, stops and sampling parameters, against the engine and against the model's own logits."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from typing import Any

import sglang as sgl
import torch

from support.programs import Rig, reciting, same
from weft.runtime.text.tokens import EOS

QUESTION = "Why is the sky blue? "
# What a reciting model says after a colon; a babbling one that ends by itself is hard to rely on.
LINE = ":abcdefg" + EOS + "hijk"


@sgl.function
def program(s: Any, question: str, options: dict[str, Any]) -> None:
    s += question
    s += sgl.gen("answer", **options)


def ask(rig: Rig, question: str, **options: Any) -> Any:
    """A finished run of a program with one gen."""
    return rig.run(program, question, {"temperature": 0, "max_tokens": 12, **options})


def greedy(rig: Rig, tokens: list[int], count: int, blocked: Any = (), penalty: Any = None) -> list[int]:
    """Brute force: one forward pass over everything for each token."""
    drawn: list[int] = []
    for _ in range(count):
        logits = rig.logits([*tokens, *drawn])[-1].clone()
        logits[list(blocked)] = -torch.inf
        for token, times in Counter(drawn).items():
            logits[token] -= penalty(times) if penalty else 0
        drawn.append(int(logits.argmax()))
    return drawn


def probe_greedy_text_is_the_models(rig: Rig) -> None:
    tokens = rig.prompt(QUESTION)
    drawn = greedy(rig, tokens, 12)
    state = ask(rig, QUESTION)
    same(state["answer"], rig.engine.tokenizer.decode(drawn))
    same(state.text(), QUESTION + state["answer"])
    same(rig.complete(QUESTION, max_tokens=12).tokens, drawn)


def probe_meta_info_counts(rig: Rig) -> None:
    meta = ask(rig, QUESTION).get_meta_info("answer")
    same(meta["finish_reason"], {"type": "length", "length": 12})
    same((meta["prompt_tokens"], meta["completion_tokens"]), (len(rig.prompt(QUESTION)), 12))
    same((meta["cached_tokens"], meta["computed_tokens"]), (0, len(rig.prompt(QUESTION)) + 11))
    assert 0 < meta["first_token_latency"] <= meta["e2e_latency"]


def probe_end_of_sentence(rig: Rig) -> None:
    with reciting(LINE) as own:
        state = ask(own, "go:")
        same(state["answer"], "abcdefg")
        meta = state.get_meta_info("answer")
        same(meta["finish_reason"], {"type": "stop", "matched": own.engine.tokenizer.eos})
        same(meta["completion_tokens"], 8)


def probe_ignore_eos(rig: Rig) -> None:
    with reciting(LINE) as own:
        state = ask(own, "go:", ignore_eos=True)
        same(state["answer"], "abcdefg" + EOS + "hijk")


def probe_stop_string(rig: Rig) -> None:
    with reciting(LINE) as own:
        for stop, text in [("e", "abcd"), ("cde", "ab"), ("abc", ""), ("x", "abcdefg")]:
            state = ask(own, "go:", stop=stop)
            same(state["answer"], text)
            matched = own.engine.tokenizer.eos if stop == "x" else stop
            same(state.get_meta_info("answer")["finish_reason"], {"type": "stop", "matched": matched})
            same(state.text(), "go:" + text)


def probe_stop_list(rig: Rig) -> None:
    """The stop that comes first in the text wins, whatever its place in the list."""
    with reciting(LINE) as own:
        for stops in (["f", "cd", "never"], ("cd", "f")):
            state = ask(own, "go:", stop=stops)
            same((state["answer"], state.get_meta_info("answer")["finish_reason"]["matched"]), ("ab", "cd"))


def probe_stop_list_is_not_changed(rig: Rig) -> None:
    stops = ["never"]
    ask(rig, QUESTION, stop=stops)
    same(stops, ["never"])


def probe_stop_from_run(rig: Rig) -> None:
    @sgl.function
    def plain(s: Any) -> None:
        s += "go:" + sgl.gen("answer", max_tokens=20)

    with reciting(LINE) as own:
        same(own.run(plain, stop=["d"], temperature=0)["answer"], "abc")
        ids = own.engine.tokenizer.encode("d")
        same(own.run(plain, stop_token_ids=ids, temperature=0)["answer"], "abc")


def probe_stop_token_ids(rig: Rig) -> None:
    with reciting(LINE) as own:
        (token,) = own.engine.tokenizer.encode("e")
        state = ask(own, "go:", stop_token_ids=[token])
        same(state["answer"], "abcd")
        same(state.get_meta_info("answer")["finish_reason"], {"type": "stop", "matched": token})


def probe_stop_regex(rig: Rig) -> None:
    if "stop_regex" not in inspect.signature(sgl.gen).parameters:
        same(sgl.__version__, "0.5.2")  # the stock gen of this version has no such argument
        return
    with reciting(LINE) as own:
        for pattern in ("[cd]+e", ["never", "[cd]+e"]):
            state = ask(own, "go:", stop_regex=pattern)
            same(state["answer"], "ab")
            same(state.get_meta_info("answer")["finish_reason"], {"type": "stop", "matched": "cde"})
        error = own.error(ask(own, "go:", stop_regex=["fine", "(broken"]))
        assert "stop_regex = '(broken'" in str(error), error


def probe_min_tokens(rig: Rig) -> None:
    """Before there are enough tokens a stop token is not drawn, and a stop string does not end the output."""
    tokens = rig.prompt(QUESTION)
    stop = greedy(rig, tokens, 1)[0]
    state = ask(rig, QUESTION, max_tokens=6, stop_token_ids=[stop])
    same((state["answer"], state.get_meta_info("answer")["completion_tokens"]), ("", 1))
    state = ask(rig, QUESTION, min_tokens=6, max_tokens=6, stop_token_ids=[stop])
    expected = greedy(rig, tokens, 6, blocked=[stop, rig.engine.tokenizer.eos])
    same(state["answer"], rig.engine.tokenizer.decode(expected))
    with reciting(LINE) as own:
        same(ask(own, "go:", stop="b", min_tokens=5)["answer"], "abcdefg")


def probe_max_tokens_from_run(rig: Rig) -> None:
    """run() sets defaults, gen() overrides them."""

    @sgl.function
    def two(s: Any) -> None:
        s += QUESTION + sgl.gen("short") + sgl.gen("long", max_tokens=9)

    state = rig.run(two, max_new_tokens=5, temperature=0)
    same([state.get_meta_info(name)["completion_tokens"] for name in ("short", "long")], [5, 9])
    joined = rig.complete(QUESTION, max_tokens=14)
    same(state["short"] + state["long"], joined.text)
    same(state.get_meta_info("long")["prompt_tokens"], len(rig.prompt(QUESTION)) + 5)


def probe_no_tokens(rig: Rig) -> None:
    state = ask(rig, QUESTION, max_tokens=0)
    same((state["answer"], state.get_meta_info("answer")["completion_tokens"]), ("", 0))
    same(ask(rig, QUESTION)["answer"], rig.complete(QUESTION, max_tokens=12).text)


def probe_unnamed_gen(rig: Rig) -> None:
    @sgl.function
    def unnamed(s: Any) -> None:
        s += QUESTION
        s += sgl.gen(max_tokens=7, temperature=0)
        s += " And?" + sgl.gen(max_tokens=3, temperature=0)

    state = rig.run(unnamed)
    first = rig.complete(QUESTION, max_tokens=7)
    tokens = [*rig.prompt(QUESTION), *first.tokens, *rig.engine.tokenizer.encode(" And?")]
    same(state.text(), QUESTION + first.text + " And?" + rig.complete(tokens, max_tokens=3).text)


def probe_messages_outside_roles(rig: Rig) -> None:
    state = ask(rig, QUESTION)
    same(state.messages(), [])


def _sampled(rig: Rig, **options: Any) -> tuple[str, str]:
    """The text of a program and of the engine, from the seed that the program will draw."""
    random.seed(11)
    seed = random.getrandbits(63)
    random.seed(11)
    state = ask(rig, QUESTION, **{"temperature": 1.5, **options})
    params: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, **options}
    return state["answer"], rig.complete(QUESTION, seed=seed, **params).text


def probe_temperature(rig: Rig) -> None:
    ours, engines = _sampled(rig)
    same(ours, engines)
    others = {ask(rig, QUESTION, temperature=1.5)["answer"] for _ in range(3)}
    assert len({ours, *others}) == 4, "not drawn anew"


def probe_filters_reach_the_sampler(rig: Rig) -> None:
    free = _sampled(rig)[0]
    for name, value in [("top_k", 5), ("top_p", 0.5), ("min_p", 0.3), ("temperature", 0.7)]:
        ours, engines = _sampled(rig, **{name: value})
        same((name, ours), (name, engines))
        assert ours != free, f"{name} has no effect"


def probe_filters_at_their_ends_are_greedy(rig: Rig) -> None:
    best = rig.complete(QUESTION, max_tokens=12).text
    for name, value in [("top_k", 1), ("top_p", 1e-6), ("min_p", 1.0)]:
        same((name, ask(rig, QUESTION, temperature=2.0, **{name: value})["answer"]), (name, best))


def probe_penalties(rig: Rig) -> None:
    tokens = rig.prompt(QUESTION)
    free = greedy(rig, tokens, 20)
    assert len(set(free)) < 20, "nothing repeats, nothing to penalise"
    for name, penalty in [("frequency_penalty", lambda n: 2.0 * n), ("presence_penalty", lambda n: 2.0)]:
        expected = greedy(rig, tokens, 20, penalty=penalty)
        assert expected != free
        state = ask(rig, QUESTION, ignore_eos=True, max_tokens=20, **{name: 2.0})
        same((name, state["answer"]), (name, rig.engine.tokenizer.decode(expected)))


def probe_several_completions(rig: Rig) -> None:
    """n = 2: a list, of which the first goes on."""
    state = ask(rig, QUESTION, n=2, temperature=1.5, ignore_eos=True)
    first, second = state["answer"]
    assert first != second
    same(state.text(), QUESTION + first)
    metas = state.get_meta_info("answer")
    same([meta["completion_tokens"] for meta in metas], [12, 12])
    assert metas[0]["id"] != metas[1]["id"]
    same(ask(rig, QUESTION, n=3)["answer"], [rig.complete(QUESTION, max_tokens=12).text] * 3)
