"""The writer, checker and rewriter in AutoGen AgentChat: agents that run one after the other.

    writer -> execute -> checker -> (OK: end | rewriter)

AutoGen's agents remember every conversation, so each question gets its own. The models are whatever OPENAI_BASE_URL and
OPENAI_API_KEY point at. Prompts are those of the text-to-SQL demo, because its model knows no others.
"""

import functools

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_core.model_context import UnboundedChatCompletionContext
from autogen_core.models import AssistantMessage, ModelFamily, ModelInfo, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient

from examples.text_to_sql.databases import Result, path, query, schema

MODELS = {"writer": "sql-writer", "checker": "sql-checker", "rewriter": "sql-rewriter"}
MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""

INFO = ModelInfo(
    vision=False, function_calling=False, json_output=False, structured_output=False, family=ModelFamily.UNKNOWN
)


@functools.cache
def client(model: str) -> OpenAIChatCompletionClient:
    """Return the client of a model, made on the first use: importing this module needs no key."""
    return OpenAIChatCompletionClient(model=model, temperature=0, max_tokens=MAX_TOKENS, model_info=INFO)


def build_agent(name: str, database: str, question: str = "", sql: str = "") -> AssistantAgent:
    """Make an agent; one that judges or rewrites a query remembers how it came about."""
    past = [UserMessage(content=question, source="user"), AssistantMessage(content=sql, source=name)] if sql else []
    return AssistantAgent(
        name,
        client(MODELS[name]),
        system_message=f"{name}\n{schema(database)}",
        model_context=UnboundedChatCompletionContext(initial_messages=past),
    )


async def ask(agent: AssistantAgent, text: str) -> str:
    """Return an agent's answer as text."""
    answer = (await agent.run(task=text)).messages[-1]
    return answer.content if isinstance(answer, TextMessage) else ""


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
    sql = await ask(build_agent("writer", database), question)
    seen = show(query(database, sql))
    feedback = await ask(build_agent("checker", database, question, sql), seen)
    if feedback == OK:
        return sql
    return await ask(build_agent("rewriter", database, question, sql), f"{seen}\n{feedback}")
