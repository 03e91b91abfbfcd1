"""The writer, checker and rewriter in plain `openai`: functions that call a model, one after the other.

    writer -> execute -> checker -> (OK: end | rewriter)

No framework says who speaks, so this app alone names Leyden: `leyden.role` around a call, and once which roles there
are, because the rewriter may stay silent. Without a training run both do nothing. The models are whatever
OPENAI_BASE_URL and OPENAI_API_KEY point at. Prompts are those of the text-to-SQL demo, because its model knows no
others.
"""

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

import leyden
from examples.text_to_sql.databases import Result, path, query, schema

MODELS = {"writer": "sql-writer", "checker": "sql-checker", "rewriter": "sql-rewriter"}
MAX_TOKENS = 48
OK = "OK"
"""What the checker answers when it finds nothing wrong; anything else is its feedback."""


async def ask(client: AsyncOpenAI, name: str, database: str, *messages: ChatCompletionMessageParam) -> str:
    """Return a model's answer as text."""
    with leyden.role(name):
        completion = await client.chat.completions.create(
            model=MODELS[name],
            messages=[{"role": "system", "content": f"{name}\n{schema(database)}"}, *messages],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
    return completion.choices[0].message.content or ""


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
    leyden.declare_roles(*MODELS)
    database = str(path(task["database"]))
    question: ChatCompletionMessageParam = {"role": "user", "content": task["question"]}
    async with AsyncOpenAI() as client:
        sql = await ask(client, "writer", database, question)
        seen = show(query(database, sql))
        answer: ChatCompletionMessageParam = {"role": "assistant", "content": sql}
        feedback = await ask(client, "checker", database, question, answer, {"role": "user", "content": seen})
        if feedback == OK:
            return sql
        remark: ChatCompletionMessageParam = {"role": "user", "content": f"{seen}\n{feedback}"}
        return await ask(client, "rewriter", database, question, answer, remark)
