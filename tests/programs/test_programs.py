"""Programs people know, on the model that comes with Weft: their answers, and the same ones under sglang's own
interpreter."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.programs import guarded
from weft.backend.executor import ProgramError, ProgramExecutor, Run, Tool, Toolbox, tool
from weft.backend.language import DeepSeekV4Backend
from weft.programs.chat import chat
from weft.programs.debate import debate
from weft.programs.few_shot import few_shot
from weft.programs.fork_and_judge import fork_and_judge
from weft.programs.form import form
from weft.programs.json_extraction import json_extraction
from weft.programs.map_reduce import map_reduce
from weft.programs.plan_and_execute import plan_and_execute
from weft.programs.react import react
from weft.programs.search import search
from weft.programs.self_ask import self_ask
from weft.programs.self_consistency import self_consistency
from weft.programs.tool_router import tool_router
from weft.programs.tree_of_thought import tree_of_thought
from weft.runtime.engine.front import Engine

BOSSES = {"Malles": "Tolkar", "Rinda": "Besnim", "Vommas": "Gunsis"}
ROOMS = {"Tolkar": "423", "Besnim": "118", "Gunsis": "231"}
CHAIN = (
    "The boss of Malles is Tolkar. The friend of Tolkar is Rinda. The room of Rinda is 423. "
    "The boss of Rorna is Gunsis. The friend of Gunsis is Vommas. The room of Vommas is 981. "
    "The friend of Vommas is Malles."
)
TWO = (
    "The boss of Malles is Tolkar. The room of Tolkar is 423. "
    "The boss of Rinda is Besnim. The room of Besnim is 981."
)
ROOMY = (
    "The city of Rorna is Besnim. The room of Malles is 423.",
    "The room of Malles is 118. Rinda has the city Gunsis.",
    "For Malles the room is 981. Vommas: seat 556.",
)
CITIES = (
    "The city of Rorna is Besnim. The city of Malles is Tolkar.",
    "The city of Malles is Tolkar. The city of Rinda is Gunsis.",
    "The city of Vommas is Ponlos. The city of Tolkar is Malles.",
)
RECORD = {"name": "Rorna", "city": "Besnim", "seat": 556, "color": "blue", "ship": "Gunsis", "age": 47}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.embedded() as own:
        yield own


@pytest.fixture(scope="module")
def run(engine: Engine) -> Iterator[Callable[..., Run]]:
    """Through the executor. thinking: of that run."""
    with ProgramExecutor(engine) as plain, ProgramExecutor(engine, thinking=True) as thinks:

        def own(program: Any, *, thinking: bool = False, **arguments: Any) -> Run:
            return asyncio.run((thinks if thinking else plain).run(program, **arguments))

        yield own


@pytest.fixture
def tools() -> Toolbox:
    return Toolbox(lookup("boss", BOSSES), lookup("room", ROOMS), tool(calculator))


def lookup(attribute: str, known: dict[str, str]) -> Tool:
    def find(name: str) -> str:
        return known.get(name, "error: not found")

    return tool(name=f"get_{attribute}", description=f"Look up the {attribute}.")(find)


def calculator(expression: str) -> str:
    """Compute."""
    left, sign, right = expression.split()
    return str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)))


# -- agents --------------------------------------------------------------------------------------------------


def test_react_thinks_acts_and_observes(run: Callable[..., Run], tools: Toolbox) -> None:
    question = "What is the room of the boss of Malles? Then add 5."
    found = run(react, thinking=True, question=question, tools=tools)
    assert found["answer"] == "428"
    assert [step["act"] for step in found["steps"]] == [
        ["get_boss", {"name": "Malles"}],
        ["get_room", {"name": "Tolkar"}],
        ["calculator", {"expression": "423 + 5"}],
    ]
    assert [step["observation"] for step in found["steps"]] == ["Tolkar", "423", "428"]
    assert found["steps"][0]["thought"] == "Plan: boss, room, + 5."
    assert "Tolkar" in found["steps"][1]["thought"] and "423" in found["steps"][2]["thought"]

    short = run(react, thinking=True, question=question, tools=tools, most=2)
    assert short["answer"] is None and len(short["steps"]) == 2
    plain = run(react, question=question, tools=tools)
    assert plain["answer"] == "428" and {step["thought"] for step in plain["steps"]} == {None}


@pytest.mark.parametrize(
    ("question", "called", "arguments", "answer"),
    [
        ("Which room does Tolkar have?", "get_room", {"name": "Tolkar"}, "423"),
        ("Which boss does Rinda have?", "get_boss", {"name": "Rinda"}, "Besnim"),
        ("Compute 423 + 118.", "calculator", {"expression": "423 + 118"}, "541"),
        ("Rinda has 423 and then gets 118 more. How many now?", "calculator", {"expression": "423 + 118"}, "541"),
    ],
)
def test_a_router_calls_the_one_tool(
    run: Callable[..., Run], tools: Toolbox, question: str, called: str, arguments: dict[str, str], answer: str
) -> None:
    found = run(tool_router, question=question, tools=tools)
    assert (found["tool"], found["arguments"]) == (called, arguments)
    assert found["result"] == found["answer"] == answer


def test_sub_agents_carry_out_one_plan(run: Callable[..., Run], tools: Toolbox) -> None:
    found = run(
        plan_and_execute,
        thinking=True,
        goal="What is the room of the boss of {}?",
        subjects=["Malles", "Rinda"],
        tools=tools,
    )
    assert found["plan"] == ["boss", "room"]
    assert found["results"] == ["423", "118"] and found["answer"] == "541"
    assert "Malles" not in found.text(), "what sub-agents say is theirs"
    assert found["answer"] in found.text()


# -- many answers to one question ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("Malles", "Tolkar Rinda 423"), ("Rorna", "Gunsis Vommas 981")])
def test_the_best_thoughts_go_on(run: Callable[..., Run], name: str, path: str) -> None:
    random.seed(1)
    steps = ["boss", "friend", "room"]
    found = run(tree_of_thought, facts=CHAIN, name=name, steps=steps, width=6, temperature=1.9)
    assert found["path"] == [name, *path.split()] and found["answer"] == path.split()[-1]
    assert found["tried"] > len(steps), "others were drawn, and judged worse"


def test_a_vote_outdoes_one_draw(run: Callable[..., Run]) -> None:
    random.seed(1)
    question = f"{TWO}\nWhat is the room of the boss of Malles?"
    found = run(self_consistency, question=question, width=12)
    assert found["answer"] == "423" and found["votes"].keys() > {"423"}
    assert sum(found["votes"].values()) == 12


def test_a_judge_hears_all_sides(run: Callable[..., Run]) -> None:
    for sides in (CITIES, CITIES[::-1]):
        found = run(debate, attribute="city", name="Rorna", sides=sides)
        assert found["answer"] == "Besnim" and len(set(found["answers"])) == 3
        granted = dict(zip(sides, found["granted"], strict=True))
        assert granted[CITIES[0]] == ["Besnim"]
    agreed = run(debate, attribute="city", name="Malles", sides=CITIES[:2])
    assert agreed["answers"] == ["Tolkar"] * 2 and agreed["granted"] == [["Tolkar"]] * 2


# -- many documents ------------------------------------------------------------------------------------------


def test_what_documents_say_is_put_together(run: Callable[..., Run]) -> None:
    question = "What is the room of Malles?"
    found = run(map_reduce, documents=ROOMY, question=question)
    assert found["found"] == ["423", "118", "981"] and found["answer"] == "118, 423, 981"
    added = run(map_reduce, documents=ROOMY[:2], question=question, combine="What is {}?", between=" + ")
    assert added["found"] == ["423", "118"] and added["answer"] == "541"
    lists = ["apple, pear, apple", "plum, apple", "fig, apple, apple, apple"]
    assert run(map_reduce, documents=lists, question="Count apple.")["found"] == ["2", "1", "3"]


def test_the_first_who_finds_it_ends_the_search(run: Callable[..., Run]) -> None:
    for name, city, place in (("Rorna", "Besnim", 0), ("Rinda", "Gunsis", 1), ("Vommas", "Ponlos", 2)):
        found = run(search, documents=CITIES, attribute="city", name=name)
        assert (found["answer"], found["document"]) == (city, place)
    with pytest.raises(ProgramError, match="the ship of Vommas is not in the document"):
        run(search, documents=ROOMY, attribute="ship", name="Vommas")
    with pytest.raises(ProgramError, match="the deadline has passed"):
        run(search, documents=CITIES, attribute="city", name="Rinda", seconds=1e-6)


# -- dialogues and records -----------------------------------------------------------------------------------


def test_a_chat_remembers(run: Callable[..., Run]) -> None:
    first = run(
        chat,
        messages=[
            "The city of Rorna is Besnim.",
            "The seat of Malles is 556.",
            "What is the city of Rorna?",
            "The boss of Vommas is Tolkar.",
            "What is the seat of Malles?",
            "Which boss does Vommas have?",
        ],
    )
    assert first["replies"] == ["Besnim", "556", "Tolkar"] and len(first["memory"]) == 3
    asked = ["What is the seat of Malles?", "What is 12 + 5?", "Which boss does Vommas have?"]
    later = run(chat, messages=asked, memory=first["memory"])
    assert later["replies"] == ["556", "17", "Tolkar"] and later["memory"] == first["memory"]
    forgot = run(chat, messages=asked)["replies"]
    assert forgot[0] != "556" and forgot[2] != "Tolkar"


SCHEMA = {
    "properties": {"seat": {"type": "integer"}, "age": {"type": "integer"}, "color": {"enum": ["red", "blue"]}}
}


def test_a_record_is_drawn_from_text(run: Callable[..., Run]) -> None:
    wanted = {"seat": 556, "age": 47, "color": "blue"}
    document = f"Here is a record:\n{json.dumps(RECORD)}"
    assert run(json_extraction, document=document, schema=SCHEMA)["found"] == wanted
    prose = "The seat of Rorna is 556. For Rorna the age is 47. Rorna has the color blue. The age of Malles is 62."
    said = run(json_extraction, document=prose, schema=SCHEMA, question="What is the {} of Rorna?")
    assert said["found"] == wanted


def test_a_value_that_will_not_do_is_drawn_again(run: Callable[..., Run]) -> None:
    random.seed(1)
    arguments = {
        "document": TWO,
        "schema": {"properties": {"room": {"type": "integer"}}},
        "question": "What is the {} of the boss of Rinda?",
    }
    assert run(json_extraction, **arguments)["found"] == {"room": 423}, "two hops are hard"
    drawn: list[int] = []

    def free(name: str, value: int) -> None:
        drawn.append(value)
        if value != 981:
            raise ValueError(f"the {name} {value} is taken")

    assert run(json_extraction, **arguments, check=free, most=20)["found"] == {"room": 981}
    assert drawn[0] == 423 and drawn[-1] == 981
    drawn.clear()
    with pytest.raises(ProgramError, match="the room 423 is taken"):
        run(json_extraction, **arguments, check=free, most=1)
    assert drawn == [423]


def test_a_form_is_filled_in(run: Callable[..., Run]) -> None:
    fields = {
        "seat": {"dtype": int},
        "color": {"choices": ["red", "blue"]},
        "city": {"max_tokens": 16},
        "age": {"regex": "[0-9]{2}"},
    }
    found = run(form, document=f"Here is a record:\n{json.dumps(RECORD)}", fields=fields)
    assert found["filled"] == {"seat": "556", "color": "blue", "city": "Besnim", "age": "47"}
    held = run(form, document=f"Here is a record:\n{json.dumps(RECORD)}", fields={"seat": {"regex": "[a-z]{3}"}})
    assert held["seat"].isalpha() and len(held["seat"]) == 3


SHOWN = ["423", "Malles", "981", "Tolkar", "77", "Rorna"]
ASKED = ["118", "Rinda", "56", "Besnim", "301", "Gunsis", "12", "Vommas"]


def test_examples_teach_labels(run: Callable[..., Run]) -> None:
    examples = [(text, "red" if text.isdigit() else "blue") for text in SHOWN]
    labels = ["red", "blue"]
    wanted = ["red" if text.isdigit() else "blue" for text in ASKED]

    def classify(shown: list[tuple[str, str]]) -> list[str]:
        return [run(few_shot, text=text, examples=shown, labels=labels, ask="{}")["label"] for text in ASKED]

    assert classify(examples) == wanted
    assert classify([]) != wanted, "without examples nothing says which label is which"


def test_claims_are_classified(run: Callable[..., Run]) -> None:
    facts = "The city of Rorna is Besnim. For Vommas the city is Ponlos. The city of Malles is Tolkar."
    facts += " Rinda has the city Gunsis."
    examples = [(f"{facts}\nThe city of Rorna is Besnim.", "yes"), ("The city of Vommas is Tolkar.", "no")]
    for name, city, label in (
        ("Rinda", "Gunsis", "yes"),
        ("Rinda", "Tolkar", "no"),
        ("Malles", "Tolkar", "yes"),
        ("Malles", "Besnim", "no"),
    ):
        found = run(few_shot, text=f"The city of {name} is {city}.", examples=examples)
        assert found["label"] == label == max(found["odds"], key=found["odds"].get)


def test_hops_are_asked_one_by_one(run: Callable[..., Run]) -> None:
    found = run(self_ask, facts=CHAIN, wanted="room of the friend of the boss of Malles")
    assert found["hops"] == ["Tolkar", "Rinda", "423"] and found["answer"] == "423"
    assert run(self_ask, facts=TWO, wanted="room of the boss of Rinda")["answer"] == "981", (
        "asked at once it fails"
    )


# -- sglang's own interpreter --------------------------------------------------------------------------------

DIALOGUE = ["The city of Rorna is Besnim.", "What is the city of Rorna?"]
ROOM = {"documents": ["The room of Malles is 423.", "The room of Malles is 118."], "question": "Room of Malles?"}
FIELDS = {"seat": {"dtype": int}, "color": {"choices": ["red", "blue"]}, "age": {"regex": "[0-9]{2}"}}
CITY = {"facts": CITIES[0], "attribute": "city", "name": "Rorna"}


@pytest.mark.parametrize(
    ("program", "arguments", "sets"),
    [
        (chat, {"messages": DIALOGUE}, ["replies", "memory"]),
        (debate, {"attribute": "city", "name": "Rorna", "sides": CITIES}, ["answers", "granted", "answer"]),
        (few_shot, {"text": "2", "examples": [("1", "red")], "labels": ["red", "blue"]}, ["label", "odds"]),
        (fork_and_judge, {**CITY, "temperature": 0}, ["answers", "verdicts", "answer"]),
        (form, {"document": json.dumps(RECORD), "fields": FIELDS}, ["filled"]),
        (map_reduce, ROOM, ["found", "answer"]),
        (self_ask, {"facts": TWO, "wanted": "room of the boss of Rinda"}, ["hops", "answer"]),
        (self_consistency, {"question": f"{TWO}\nBoss of Rinda?", "temperature": 0}, ["votes", "answer"]),
        (
            tree_of_thought,
            {"facts": CHAIN, "name": "Malles", "steps": ["boss", "friend"], "temperature": 0},
            ["path", "tried"],
        ),
    ],
    ids=lambda value: getattr(getattr(value, "func", None), "__name__", ""),
)
def test_both_interpreters_agree(
    engine: Engine, run: Callable[..., Run], program: Any, arguments: dict[str, Any], sets: list[str]
) -> None:
    backend = DeepSeekV4Backend(engine)
    try:
        state = guarded(lambda: program.run(backend=backend, **arguments))
        assert state.error() is None
        theirs = {name: state[name] for name in sets}
    finally:
        backend.shutdown()
    ours = run(program, **arguments)
    assert {name: ours[name] for name in sets} == theirs
    assert all(theirs.values())
