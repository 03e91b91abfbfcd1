"""The agent's graph: it ends when the checker is content or the rewrites are spent; errors are text."""

import asyncio
from collections.abc import Sequence

import pytest

pytest.importorskip("langgraph")
pytest.importorskip("langchain_openai")

from langchain_core.messages import BaseMessage

from examples.text_to_sql import agent, databases

GOOD = "SELECT COUNT(*) FROM singer"
BAD = "SELECT MEAN(age) FROM singer"


class Script:
    """Answers in the models' place, in order, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, Sequence[BaseMessage]]] = []

    async def __call__(self, model: str, messages: Sequence[BaseMessage]) -> str:
        self.asked.append((model, messages))
        return self.answers.pop(0)


def solve(monkeypatch: pytest.MonkeyPatch, script: Script, *, rewrites: int = 1) -> agent.State:
    monkeypatch.setattr(agent, "ask", script)
    task = {"question": "How many singers?", "database": str(databases.path("music"))}
    return asyncio.run(agent.build_graph(rewrites).ainvoke(task))  # type: ignore[arg-type]  # a partial state


def test_a_query_that_the_checker_accepts_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(GOOD, "OK")

    state = solve(monkeypatch, script)

    assert [model for model, _ in script.asked] == [agent.WRITER_MODEL, agent.CHECKER_MODEL]
    assert state["sql"] == state["first_sql"] == GOOD
    assert state["rows"] == [(24,)]


def test_a_refused_query_is_rewritten_and_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(BAD, "wrong: function", GOOD)

    state = solve(monkeypatch, script)

    assert (state["first_sql"], state["sql"]) == (BAD, GOOD)
    assert (state["rows"], state["error"]) == ([(24,)], None)
    model, messages = script.asked[-1]
    assert model == agent.REWRITER_MODEL
    assert messages[-1].content == "error: no such function: MEAN\nwrong: function"


@pytest.mark.parametrize("rewrites", [0, 1, 3])
def test_the_loop_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch, rewrites: int) -> None:
    script = Script(BAD, *["wrong: function", BAD] * rewrites)

    state = solve(monkeypatch, script, rewrites=rewrites)

    assert script.answers == []
    assert (state["rows"], state["error"]) == ([], "no such function: MEAN")


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="rewrites must be 0 or more, not -1"):
        agent.build_graph(-1)


def test_importing_needs_no_key_and_the_agent_asks_for_temperature_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    agent.client.cache_clear()

    assert agent.client(agent.WRITER_MODEL).temperature == 0

    agent.client.cache_clear()


@pytest.mark.parametrize(
    ("rows", "error", "shown"),
    [
        ((), 'near ">": syntax error', 'error: near ">": syntax error'),
        ((), None, "empty"),
        (((None,),), None, "None"),
        (((1.25, "a"), (2, "b")), None, "1.2, a; 2, b"),
        ((("a",),) * 5, None, "a; a; a ... 5 rows"),
    ],
)
def test_a_result_is_shown_in_one_line(rows: tuple[tuple[object, ...], ...], error: str | None, shown: str) -> None:
    assert agent.show(databases.Result(rows, error)) == shown
