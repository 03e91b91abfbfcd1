"""The writer, checker and rewriter in AgentScope 2.x: agents that run one after the other.

    writer -> execute -> checker -> (OK: end | rewriter)

An agent remembers what it hears and says, so each question gets its own agents. The models are whatever OPENAI_BASE_URL
and OPENAI_API_KEY point at. Prompts are those of the text-to-SQL demo, because its model knows no others.
"""

import functools
import os

from agentscope.agent import Agent, InjectionConfig
from agentscope.credential import OpenAICredential
from agentscope.message import AssistantMsg, UserMsg
from agentscope.model import OpenAIChatModel

from examples.text_to_sql.databases import Result, path, query, schema

MODELS = {"writer": "sql-writer", "checker": "sql-checker", "rewriter": "sql-rewriter"}
MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""

PLAIN = InjectionConfig(inject_runtime_state=False)
"""Without it AgentScope tells every agent the time."""


@functools.cache
def model(name: str) -> OpenAIChatModel:
    """Return the model of an agent, made on the first use: importing this module needs no key."""
    credential = OpenAICredential(api_key=os.environ["OPENAI_API_KEY"], base_url=os.environ.get("OPENAI_BASE_URL"))
    parameters = OpenAIChatModel.Parameters(temperature=0, max_tokens=MAX_TOKENS)
    return OpenAIChatModel(credential, MODELS[name], parameters=parameters, stream=False)


async def ask(name: str, database: str, question: str, sql: str = "", remark: str = "") -> str:
    """Return an agent's answer as text; one that judges or rewrites a query has heard how it came about."""
    agent = Agent(name, f"{name}\n{schema(database)}", model(name), injection_config=PLAIN)
    if sql:
        await agent.observe([UserMsg("user", question), AssistantMsg(name, sql)])
    answer = await agent.reply(UserMsg("user", remark or question))
    return answer.get_text_content() or ""


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
