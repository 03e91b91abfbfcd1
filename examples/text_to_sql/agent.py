"""A text-to-SQL agent that corrects itself: a plain LangGraph app with langchain-openai.

    writer -> execute -> checker -> (OK: end | rewriter -> execute -> ...)

It is started with a question and the path of a SQLite file, and ends with `sql` and `rows`. The models are
whatever OPENAI_BASE_URL and OPENAI_API_KEY point at.

Prompts are as short as the task allows, because the demo's model knows only this task.
"""

import functools
import operator
from typing import Annotated, TypedDict

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from examples.text_to_sql.databases import Result, query, schema

WRITER_MODEL = "sql-writer"
CHECKER_MODEL = "sql-checker"
REWRITER_MODEL = "sql-rewriter"

MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""


class State(TypedDict, total=False):
    """The graph's state; `question` and `database` are its input."""

    question: str
    database: str
    """Path of the SQLite file."""
    sql: str
    """The newest query."""
    first_sql: str
    """The writer's query, before any rewrite."""
    rows: list[tuple[object, ...]]
    """What `sql` returned; empty after an error."""
    error: str | None
    """SQLite's complaint about `sql`."""
    feedback: str
    """The checker's last answer."""
    rewrites: Annotated[int, operator.add]
    """How often the rewriter spoke."""


@functools.cache
def client(model: str) -> ChatOpenAI:
    """Return the client of a model, made on the first use: importing this module needs no key."""
    return ChatOpenAI(model=model, temperature=0, max_completion_tokens=MAX_TOKENS)


@functools.cache
def instructions(node: str, database: str) -> SystemMessage:
    """Return the system message of a node: its name and the tables."""
    return SystemMessage(f"{node}\n{schema(database)}")


def show(result: Result) -> str:
    """Put a query's result in a line: the error, or the first rows and how many there are."""
    if result.error is not None:
        return f"error: {result.error[:40]}"
    if not result.rows:
        return "empty"
    shown = "; ".join(", ".join(show_cell(cell) for cell in row[:3]) for row in result.rows[:3])
    return f"{shown} ... {len(result.rows)} rows" if len(result.rows) > 3 else shown


def show_cell(cell: object) -> str:
    """Put a value in text, floats with one decimal."""
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def writer_messages(question: str, database: str) -> list[BaseMessage]:
    """Ask for a query."""
    return [instructions("writer", database), HumanMessage(question)]


def checker_messages(question: str, database: str, sql: str, result: Result) -> list[BaseMessage]:
    """Ask whether a query answers the question."""
    return [
        instructions("checker", database),
        HumanMessage(question),
        AIMessage(sql),
        HumanMessage(show(result)),
    ]


def rewriter_messages(question: str, database: str, sql: str, result: Result, feedback: str) -> list[BaseMessage]:
    """Ask for a better query."""
    remark = f"{show(result)}\n{feedback}"
    return [instructions("rewriter", database), HumanMessage(question), AIMessage(sql), HumanMessage(remark)]


async def ask(model: str, messages: list[BaseMessage]) -> str:
    """Return a model's answer as text."""
    reply = await client(model).ainvoke(messages)
    return str(reply.content)


async def writer(state: State) -> State:
    """Write the first query."""
    sql = await ask(WRITER_MODEL, writer_messages(state["question"], state["database"]))
    return {"sql": sql, "first_sql": sql}


async def execute(state: State) -> State:
    """Run the newest query."""
    result = query(state["database"], state["sql"])
    return {"rows": list(result.rows), "error": result.error}


async def checker(state: State) -> State:
    """Judge the newest query by its text and its result."""
    result = Result(tuple(state["rows"]), state["error"])
    messages = checker_messages(state["question"], state["database"], state["sql"], result)
    return {"feedback": await ask(CHECKER_MODEL, messages)}


async def rewriter(state: State) -> State:
    """Replace the query that the checker found wrong."""
    result = Result(tuple(state["rows"]), state["error"])
    question, database = state["question"], state["database"]
    messages = rewriter_messages(question, database, state["sql"], result, state["feedback"])
    return {"sql": await ask(REWRITER_MODEL, messages), "rewrites": 1}


def build_graph(rewrites: int = 1) -> CompiledStateGraph[State, None, State, State]:
    """Compile the agent; `rewrites` limits how often it may correct itself.

    Raises:
        ValueError: `rewrites` is negative.
    """
    if rewrites < 0:
        raise ValueError(f"rewrites must be 0 or more, not {rewrites!r}")

    def after_execute(state: State) -> str:
        return "checker" if state.get("rewrites", 0) < rewrites else END

    def after_checker(state: State) -> str:
        return END if state["feedback"] == OK else "rewriter"

    graph = StateGraph(State)
    for node in (writer, execute, checker, rewriter):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "writer")
    graph.add_edge("writer", "execute")
    graph.add_conditional_edges("execute", after_execute, ["checker", END])
    graph.add_conditional_edges("checker", after_checker, ["rewriter", END])
    graph.add_edge("rewriter", "execute")
    return graph.compile()


graph = build_graph()
