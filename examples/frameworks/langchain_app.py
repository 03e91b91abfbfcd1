"""The writer, checker and rewriter in LangGraph: the text-to-SQL demo's own graph."""

from examples.text_to_sql.agent import graph
from examples.text_to_sql.databases import path


async def solve(task: dict[str, str]) -> str:
    """Answer one question with a query."""
    state = await graph.ainvoke({"question": task["question"], "database": str(path(task["database"]))})
    return str(state["sql"])
