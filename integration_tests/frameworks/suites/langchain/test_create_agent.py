"""LangChain's `create_agent`: named, unnamed, and one as a tool of another."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from integration_tests.langchain.apps import model, search
from integration_tests.langchain.conftest import Run
from leyden.spans import Kind
from tests.capture.rollouts import Recorded, rollout
from tests.capture.servers import FakeOpenAI

create_agent = pytest.importorskip("langchain.agents", reason="needs the package langchain").create_agent

pytestmark = pytest.mark.usefixtures("instrumented")

GO = {"messages": [HumanMessage("go")]}


def go(run: Run, app: Any) -> Recorded:
    async def episode() -> Recorded:
        with rollout() as recorded:
            await app.ainvoke(GO)
        return recorded

    return run(episode())  # type: ignore[no-any-return]  # what `episode` returns


@pytest.mark.parametrize(("name", "role"), [("worker", "worker"), (None, "main")])
def test_an_agent_speaks_under_its_name_and_without_one_as_main(
    run: Run, user_server: FakeOpenAI, name: str | None, role: str
) -> None:
    agent = create_agent(model(user_server.base_url), [search], system_prompt=f"role={role} call=search", name=name)
    recorded = go(run, agent)
    assert [span.role for span in recorded.calls] == [role, role]
    assert [span.role for span in recorded.spans(Kind.TOOL)] == [role]
    assert role == "main" or role in recorded.context.declared_roles


@pytest.mark.parametrize("is_named", [True, False])
def test_an_agent_used_as_a_tool_speaks_under_its_name_or_the_tools(
    run: Run, user_server: FakeOpenAI, is_named: bool
) -> None:
    llm, role = model(user_server.base_url), "researcher" if is_named else "ask"
    options = {"name": role} if is_named else {}
    inner = create_agent(llm, [search], system_prompt=f"role={role} call=search", **options)

    @tool
    async def ask(query: str) -> str:
        """Ask somebody."""
        return str((await inner.ainvoke({"messages": [HumanMessage(query)]}))["messages"][-1].text)

    recorded = go(run, create_agent(llm, [ask], system_prompt="role=boss call=ask", name="boss"))
    assert [span.role for span in recorded.calls] == ["boss", role, role, "boss"]
