"""Agents to record: plain user code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentscope.agent import Agent, InjectionConfig, ReActConfig
from agentscope.credential import OpenAICredential
from agentscope.message import Msg, UserMsg
from agentscope.model import OpenAIChatModel
from agentscope.permission import PermissionBehavior, PermissionContext, PermissionDecision, PermissionMode
from agentscope.state import AgentState
from agentscope.tool import FunctionTool, Toolkit

from integration_tests.frameworks.story import Ask, Say
from leyden.spans import Kind, Span
from tests.capture.rollouts import Recorded


def model(base_url: str, *, stream: bool = False, retries: int = 0) -> OpenAIChatModel:
    """Return a model whose client retries `retries` times."""
    credential = OpenAICredential(api_key="user-key", base_url=base_url)
    client = {"max_retries": retries}
    return OpenAIChatModel(credential, "user-model", stream=stream, max_retries=0, client_kwargs=client)


def agent(
    name: str,
    base_url: str,
    *,
    tools: Sequence[Any] = (),
    stream: bool = False,
    retries: int = 0,
    raise_cancelled: bool = False,
    middlewares: Sequence[Any] = (),
) -> Agent:
    """Return an agent whose tools need no leave."""
    toolkit = Toolkit(tools=[tool if isinstance(tool, FunctionTool) else FunctionTool(tool) for tool in tools])
    return Agent(
        name,
        f"[[role={name}]] [[rollout=r1]]",
        model(base_url, stream=stream, retries=retries),
        toolkit=toolkit,
        middlewares=list(middlewares),
        state=AgentState(permission_context=PermissionContext(mode=PermissionMode.BYPASS)),
        react_config=ReActConfig(interruption_raise_cancelled_error=raise_cancelled),
        injection_config=InjectionConfig(inject_runtime_state=False),
    )


class Denied(FunctionTool):
    """A tool that nobody may use."""

    async def check_permissions(self, *args: Any, **options: Any) -> PermissionDecision:
        return PermissionDecision(behavior=PermissionBehavior.DENY, message="not you")


def said(text: str = "go") -> Msg:
    """Return a user's message."""
    return UserMsg("user", text)


async def search(query: str) -> str:
    """Search.

    Args:
        query (str): what for
    """
    return f"found {query}"


async def fail(query: str) -> str:
    """Fail.

    Args:
        query (str): what for
    """
    raise RuntimeError(f"no {query} here")


def calling(*calls: tuple[str, dict[str, object]]) -> Any:
    """Return a script that makes these tool calls once and then is done."""

    def script(ask: Ask) -> Say:
        is_first = not any(message.get("role") == "tool" for message in ask.messages)
        return Say(tool_calls=calls) if is_first else Say(text="done")

    return script


def tree(recorded: Recorded) -> list[str]:
    """Return each span as `kind name role status`, with the name of its parent, in the order they started."""
    spans = {record.span_id: record for record in recorded.records if isinstance(record, Span)}
    lines = []
    for span in sorted(spans.values(), key=lambda each: each.start_ns):
        parent = spans[span.parent_id].name if span.parent_id else "-"
        name = "chat" if span.kind is Kind.MODEL_CALL else span.name
        lines.append(f"{span.kind} {name} {span.role} {span.status} < {parent}")
    return lines[1:]
