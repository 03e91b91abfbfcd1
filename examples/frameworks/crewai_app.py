"""The writer, checker and rewriter in CrewAI: agents that run one after the other.

    writer -> execute -> checker -> (OK: end | rewriter)

An agent is busy while it works, so each question gets its own. The models are whatever OPENAI_BASE_URL and
OPENAI_API_KEY point at. Prompts are those of the text-to-SQL demo, because its model knows no others; CrewAI puts its
own words around every prompt, and `in_plain_words` takes them out again.
"""

import functools
from typing import Any

from crewai import LLM, Agent
from crewai.events.event_listener import event_listener
from crewai.hooks import LLMCallHookContext, register_before_llm_call_hook

from examples.text_to_sql.databases import Result, path, query, schema

MODELS = {"writer": "sql-writer", "checker": "sql-checker", "rewriter": "sql-rewriter"}
MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""


@functools.cache
def model(name: str) -> Any:
    """Return the model of an agent, made on the first use: importing this module needs no key."""
    # With `provider` CrewAI takes any name for a model of this server's, and does not ask litellm.
    return LLM(model=MODELS[name], provider="openai", temperature=0, max_tokens=MAX_TOKENS)


def in_plain_words(context: LLMCallHookContext) -> None:
    """Leave of CrewAI's prompts the agent's backstory and what it is asked."""
    first, *_, last = context.messages
    first["content"] = context.agent.backstory
    asked = str(last["content"]).rpartition("Current Task: ")[2]
    last["content"] = asked.partition("\n\nProvide your complete response:")[0]


register_before_llm_call_hook(in_plain_words)
event_listener.formatter.verbose = False  # it would print a panel for every answer


async def ask(name: str, database: str, *messages: Any) -> str:
    """Return an agent's answer as text."""
    agent = Agent(role=name, goal="a query", backstory=f"{name}\n{schema(database)}", llm=model(name))
    answer: Any = await agent.kickoff_async(list(messages))
    return str(answer.raw)


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
    question = {"role": "user", "content": task["question"]}
    sql = await ask("writer", database, question)
    seen = show(query(database, sql))
    answer = {"role": "assistant", "content": sql}
    feedback = await ask("checker", database, question, answer, {"role": "user", "content": seen})
    if feedback == OK:
        return sql
    return await ask("rewriter", database, question, answer, {"role": "user", "content": f"{seen}\n{feedback}"})
