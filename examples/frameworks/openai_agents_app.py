"""The writer, checker and rewriter in the OpenAI Agents SDK: agents that run one after the other.

    writer -> execute -> checker -> (OK: end | rewriter)

The models are whatever OPENAI_BASE_URL and OPENAI_API_KEY point at; the SDK speaks the Responses API with them. Prompts
are those of the text-to-SQL demo, because its model knows no others.
"""

import functools

from agents import Agent, ModelSettings, RunConfig, Runner, TResponseInputItem

from examples.text_to_sql.databases import Result, path, query, schema

MODELS = {"writer": "sql-writer", "checker": "sql-checker", "rewriter": "sql-rewriter"}
MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""

QUIET = RunConfig(tracing_disabled=True)
"""Traces would go to OpenAI."""


@functools.cache
def agent(name: str, database: str) -> Agent[None]:
    """Return an agent, made once: it keeps nothing between runs."""
    settings = ModelSettings(temperature=0, max_tokens=MAX_TOKENS)
    return Agent(name=name, model=MODELS[name], instructions=f"{name}\n{schema(database)}", model_settings=settings)


async def ask(name: str, database: str, *messages: TResponseInputItem) -> str:
    """Return an agent's answer as text."""
    result = await Runner.run(agent(name, database), list(messages), run_config=QUIET)
    return str(result.final_output)


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
    database = str(path(task["database"]))
    question: TResponseInputItem = {"role": "user", "content": task["question"]}
    sql = await ask("writer", database, question)
    seen = show(query(database, sql))
    answer: TResponseInputItem = {"role": "assistant", "content": sql}
    feedback = await ask("checker", database, question, answer, {"role": "user", "content": seen})
    if feedback == OK:
        return sql
    return await ask("rewriter", database, question, answer, {"role": "user", "content": f"{seen}\n{feedback}"})
