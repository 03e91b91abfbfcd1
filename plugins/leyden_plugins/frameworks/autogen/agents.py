"""Agents and their tools: what stands around their methods, on a class or on one object.

One trap: in autogen-agentchat 0.7.5 anything that a tool call raises leaves its agent waiting for ever, deaf to
cancellation: the reader of its queue is never told. So while a rollout runs nothing leaves a tool call but a result.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

from autogen_agentchat.base import Response
from autogen_agentchat.messages import HandoffMessage
from autogen_core.models import FunctionExecutionResult

from leyden import context
from leyden.activity import close_items, handoff, unbroken
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Status
from leyden_plugins.frameworks.autogen.members import declare, members
from leyden_plugins.frameworks.autogen.work import CLAIMS, ENDED, Active, Work, is_at_work

Method = Callable[..., Any]


def begin(agent: Any) -> Work:
    """Start an agent's work.

    Raises:
        ConcurrentUseError: another rollout has used this agent and still runs.
    """
    if CLAIMS.take([agent]):
        declare(members(agent))
    return Work(agent, Kind.AGENT, agent.name, role=agent.name, **{"gen_ai.agent.name": agent.name})


def observed_messages(on_messages: Method, active: Active) -> Method:
    """Return an agent's `on_messages`, as its work."""

    @functools.wraps(on_messages)
    async def observe(agent: Any, *args: Any, **options: Any) -> Any:
        if not active() or is_at_work(agent):
            return await on_messages(agent, *args, **options)
        work = begin(agent)
        with work.running():
            response = await on_messages(agent, *args, **options)
            note_handoff(work, response)
        return response

    return observe


def observed_stream(on_messages_stream: Method, active: Active) -> Method:
    """Return an agent's `on_messages_stream`, as its work."""

    @functools.wraps(on_messages_stream)
    def observe(agent: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
        if not active() or is_at_work(agent):
            return on_messages_stream(agent, *args, **options)  # type: ignore[no-any-return]  # the method we wrap
        return answering(agent, functools.partial(on_messages_stream, agent, *args, **options))

    return observe


async def answering(agent: Any, start: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
    """Yield an agent's events and its response, as its work; many are single tokens, so there is but this layer."""
    work = begin(agent)
    with work.entered():
        items = start()
    step = work.step
    try:
        while (item := await step(items)) is not ENDED:
            if isinstance(item, Response):
                note_handoff(work, item)
                work.answered()
            yield item
    except BaseException as error:
        with work.entered():
            await close_items(items)
        work.fail(error)
        raise
    work.close()


@unbroken
def note_handoff(work: Work, response: Any) -> None:
    """Record that an agent's response passes control on; an agent around another returns the same message."""
    message = response.chat_message
    if not isinstance(message, HandoffMessage):
        return
    if message.id not in work.handoffs:
        handoff(message.target, source=work)
    outer = work.around()
    if outer is not None:
        outer.handoffs.add(message.id)


def observed_tool_call(execute: Method, active: Active) -> Method:
    """Return `AssistantAgent._execute_tool_call`, as a tool's work that ends in a result whatever happens."""

    @functools.wraps(execute)
    async def observe(
        tool_call: Any, workbench: Any, handoff_tools: Any, agent_name: Any, cancellation_token: Any, stream: Any
    ) -> Any:
        run = functools.partial(
            execute,
            tool_call=tool_call,
            workbench=workbench,
            handoff_tools=handoff_tools,
            agent_name=agent_name,
            cancellation_token=cancellation_token,
            stream=stream,
        )
        if not active() or is_at_work(tool_call):
            return await run()
        work = Work(
            tool_call,
            Kind.TOOL,
            tool_call.name,
            **{
                "gen_ai.tool.name": tool_call.name,
                "gen_ai.tool.call.id": tool_call.id,
                "gen_ai.tool.call.arguments": tool_call.arguments,
            },
        )
        try:
            with work.entered():
                answer = await run()
        except BaseException as error:
            work.fail(error)
            if work.rollout is None or not is_swallowed(error):
                raise
            return tool_call, failure(tool_call, error)
        result = answer[1]
        status, text = (Status.ERROR, result.content) if result.is_error else (Status.OK, None)
        work.close(status, text, **{"gen_ai.tool.call.result": result.content})
        return answer

    return observe


def is_swallowed(error: BaseException) -> bool:
    """Say whether a tool call may end with `error` as its result: not when its own task is cancelled.

    After the deadline the next model call raises again, where AutoGen does not wait for ever. A cancelled token cancels
    what the tool call waits for, not the tool call.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | DeadlineExceeded)


def failure(tool_call: Any, error: BaseException) -> FunctionExecutionResult:
    """Return the result that AutoGen gives for arguments that are no JSON, with this error."""
    text = f"Error: {type(error).__name__}: {error}"
    return FunctionExecutionResult(content=text, call_id=tool_call.id, is_error=True, name=tool_call.name)


def observed_function(run: Method, active: Active) -> Method:
    """Return `FunctionTool.run`, which carries the context into the thread of a sync function."""

    @functools.wraps(run)
    async def observe(tool: Any, args: Any, cancellation_token: Any) -> Any:
        if active() and context.current() is not None and not inspect.iscoroutinefunction(tool._func):
            # `run_in_executor` copies no context; a copy of the tool, because parallel calls share it.
            tool = copy.copy(tool)
            tool._func = functools.partial(contextvars.copy_context().run, tool._func)
        return await run(tool, args, cancellation_token)

    return observe
