"""The writer, checker and rewriter in Microsoft Agent Framework: agents that run one after the other.

    writer -> execute -> checker -> (OK: end | rewriter)

An agent remembers nothing between runs unless it is given a session, so each run gets the messages it needs. The models
are whatever OPENAI_BASE_URL and OPENAI_API_KEY point at. Prompts are those of the text-to-SQL demo, because its model
knows no others.
"""

import functools

from agent_framework import Agent, Message
from agent_framework.openai import OpenAIChatCompletionClient

from examples.text_to_sql.databases import Result, path, query, schema

MODELS = {"writer": "sql-writer", "checker": "sql-checker", "rewriter": "sql-rewriter"}
MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""


@functools.cache
def client(model: str) -> OpenAIChatCompletionClient:
    """Return the client of a model, made on the first use: importing this module needs no key."""
    return OpenAIChatCompletionClient(model=model)


@functools.cache
def build_agent(name: str, database: str) -> Agent:
    """Make the agent that plays one part for one database."""
    instructions = f"{name}\n{schema(database)}"
    options = {"temperature": 0, "max_tokens": MAX_TOKENS}
    return Agent(client(MODELS[name]), instructions, name=name, default_options=options)


async def ask(name: str, database: str, question: str, sql: str = "", remark: str = "") -> str:
    """Return an agent's answer as text; one that judges or rewrites a query is told how it came about."""
    messages = [Message("user", [question])]
    if sql:
        messages += [Message("assistant", [sql]), Message("user", [remark])]
    return (await build_agent(name, database).run(messages)).text


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


async def solve(task: dict[str, str]) -> str:
    """Answer one question with a query."""
    question, database = task["question"], str(path(task["database"]))
    sql = await ask("writer", database, question)
    seen = show(query(database, sql))
    feedback = await ask("checker", database, question, sql, seen)
    if feedback == OK:
        return sql
    return await ask("rewriter", database, question, sql, f"{seen}\n{feedback}")
