"""What is recorded of AgentScope's agents: replies, tool calls, assignments of a team.

One idea: an agent's reply and each of its tool calls is an async generator, so both forms hand theirs to `RECORDER`
and get back one that records; a generator that is being recorded already is handed back as it is.
One trap: AgentScope turns `CancelledError` into an ordinary last message; only its `finished_reason` tells.

This module imports nothing of AgentScope.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from leyden import context, wire
from leyden.activity import Activity, Exclusive, advancing, close_items, handoff, unbroken
from leyden.context import RolloutContext
from leyden.spans import Kind, Status

ASSIGN = "TeamAssign"
"""The tool with which the leader of a `TeamPipeline` turns to a member."""

TOOL_STATUS = {"success": Status.OK, "running": Status.OK, "interrupted": Status.CANCELLED}
"""Any other state is an error."""

REPLY_STATUS = {"interrupted": Status.CANCELLED, "error": Status.ERROR}
"""Any other reason for which a reply ended is fine."""


class Reply(Activity):
    """An agent's reply, from its first event to its last."""

    def __init__(self, agent: Any, acting: set[str]) -> None:
        super().__init__(Kind.AGENT, agent.name, role=agent.name, **{"gen_ai.agent.name": agent.name})
        self.agent = agent
        self.acting = acting
        """Ids of the agent's tool calls that have a span of their own."""
        self.results: dict[str, str] = {}
        """Tool call id -> what was heard so far of a result that no tool here made."""
        self.reason: str | None = None
        """Why the reply ended; `None` before it has, and when it waits for somebody."""

    async def watched(self, events: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """Yield the reply's events and take note of them; say how it ended."""
        try:
            async for event in events:
                self.note(event)
                yield event
        except GeneratorExit:
            # Readers may stop at the last event, before the message that follows it.
            await close_items(events)
            self.settle()
            raise
        self.settle()

    def settle(self) -> None:
        """End the span as the reply ended; one that has not is left to whoever advances it."""
        if self.reason is None:
            return
        status = REPLY_STATUS.get(self.reason, Status.OK)
        error = None if status is Status.OK else f"the reply ended as {self.reason!r}"
        self.close(status, error, **{"agentscope.finished_reason": self.reason})

    def note(self, event: Any) -> None:
        """Take note of one event."""
        noted = NOTED.get(type(event).__name__)
        if noted is not None:
            noted(self, event)

    @unbroken
    def ended(self, event: Any) -> None:
        """Remember why the reply ended."""
        self.reason = str(event.finished_reason)

    @unbroken
    def submitted(self, event: Any) -> None:
        """Record the members to whom the leader of a team turns."""
        for call in event.tool_calls:
            member = member_of(call.input) if call.name == ASSIGN else None
            if member:
                handoff(member, source=self)

    @unbroken
    def heard(self, event: Any) -> None:
        """Keep the text of a result that no tool here made."""
        if event.tool_call_id not in self.acting:
            self.results[event.tool_call_id] = self.results.get(event.tool_call_id, "") + event.delta

    @unbroken
    def tool_ended(self, event: Any) -> None:
        """Record a tool call that was answered without running here: denied, malformed, or run by somebody else."""
        if event.tool_call_id in self.acting:
            self.acting.discard(event.tool_call_id)
            return
        call = call_of(self.agent, event.tool_call_id)
        if call is None or call.name == ASSIGN:
            return
        tool = Tool(self.agent, call, parent=self)
        tool.ended(event.state, self.results.pop(event.tool_call_id, ""))


NOTED: dict[str, Callable[[Reply, Any], None]] = {
    "ReplyEndEvent": Reply.ended,
    "RequireExternalExecutionEvent": Reply.submitted,
    "ToolResultTextDeltaEvent": Reply.heard,
    "ToolResultEndEvent": Reply.tool_ended,
}
"""By the names of their classes, because streams have thousands of others."""


class Tool(Activity):
    """One tool call of an agent."""

    def __init__(self, agent: Any, call: Any, *, parent: Activity | None = None) -> None:
        attributes = {
            "gen_ai.tool.name": call.name,
            "gen_ai.tool.call.id": call.id,
            "gen_ai.tool.call.arguments": call.input,
        }
        super().__init__(Kind.TOOL, call.name, parent=parent, **attributes)
        self.agent = agent
        self.call_id = call.id

    async def watched(self, chunks: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """Yield the tool's chunks; the response that follows them says how it ended."""
        async for chunk in chunks:
            if type(chunk).__name__ == "ToolResponse":
                self.responded(chunk)
            yield chunk

    @unbroken
    def responded(self, response: Any) -> None:
        """End the span with the whole response."""
        self.ended(response.state, text_of(response.content))

    def ended(self, state: object, result: str) -> None:
        """End the span in the words of AgentScope's `ToolResultState`."""
        status = TOOL_STATUS.get(str(state), Status.ERROR)
        error = None if status is Status.OK else f"{state!s}: {result}"
        self.close(status, error, **{"gen_ai.tool.call.result": result, "agentscope.tool.state": str(state)})


class Recorder:
    """The agents of this process, shared by both forms, so that together they record everything once."""

    def __init__(self) -> None:
        self.exclusive = Exclusive()
        self.claims: weakref.WeakKeyDictionary[Any, tuple[RolloutContext, Callable[[], None]]]
        self.claims = weakref.WeakKeyDictionary()
        """Agent -> the last rollout it spoke in, and what gives it back."""
        self.acting: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()

    def reply(self, agent: Any, events: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Return the events of a reply, recorded.

        Raises:
            ConcurrentUseError: the agent serves another rollout that is not over.
        """
        if not is_wanted() or is_inside(Reply, agent):
            return events
        self.claim(agent)
        reply = Reply(agent, self.acting.setdefault(agent, set()))
        declare(agent)
        return advancing(reply.watched(events), reply)

    def act(self, agent: Any, call: Any, chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Return the chunks of a tool call, recorded."""
        if not is_wanted() or is_inside(Tool, agent, call.id):
            return chunks
        self.acting.setdefault(agent, set()).add(call.id)
        tool = Tool(agent, call)
        return advancing(tool.watched(chunks), tool)

    async def compress(self, agent: Any, work: Callable[[], Awaitable[None]]) -> None:
        """Let an agent sum up its context, which may ask its model, in its own name.

        Raises:
            ConcurrentUseError: the agent serves another rollout that is not over.
        """
        frame = context.current()
        if not is_wanted() or (frame is not None and frame.role == agent.name):
            await work()
            return
        self.claim(agent)
        with Activity(Kind.AGENT, agent.name, role=agent.name, **{"gen_ai.agent.name": agent.name}).running():
            await work()

    def claim(self, agent: Any) -> None:
        """Keep an agent for the current rollout until that is over: what it heard stays in its memory.

        Raises:
            ConcurrentUseError: the agent serves another rollout that is not over.
        """
        frame = context.current()
        rollout = frame.rollout if frame else None
        claimed = self.claims.get(agent)
        if rollout is None or (claimed is not None and claimed[0] is rollout):
            return
        give_back = self.exclusive.take(agent, agent.name)
        if claimed is not None:
            claimed[1]()
        self.claims[agent] = (rollout, give_back)


RECORDER = Recorder()


def is_wanted() -> bool:
    """Say whether anybody wants to know who speaks."""
    return context.current() is not None or wire.default_routing() is not None


def is_inside(activity: type[Reply] | type[Tool], agent: Any, call_id: str | None = None) -> bool:
    """Say whether the other form records this already."""
    frame = context.current()
    owner = frame.owner if frame else None
    return isinstance(owner, activity) and owner.agent is agent and getattr(owner, "call_id", None) == call_id


@unbroken
def declare(agent: Any) -> None:
    """Declare the roles that an agent and, when it leads a team, its members speak under."""
    frame = context.current()
    if frame is not None and frame.rollout is not None:
        frame.rollout.declared_roles.update(roles_of(agent))


def roles_of(speaker: Any) -> Iterator[str]:
    """Yield the names of the agents in an agent, a pipeline or a SOP."""
    name = getattr(speaker, "name", None)
    if isinstance(name, str):
        yield name
    for group in getattr(getattr(speaker, "toolkit", None), "tool_groups", ()):
        for tool in group.tools:
            if tool.name == ASSIGN:
                yield from tool.input_schema["properties"]["member"]["enum"]
    for part in ("leader", "executor", "verifier"):
        if getattr(speaker, part, None) is not None:
            yield from roles_of(getattr(speaker, part))
    for member in getattr(speaker, "members", {}).values():
        yield from roles_of(member.agent)
    for step in getattr(getattr(speaker, "sop", None), "steps", ()):
        yield from roles_of(step)


def member_of(arguments: str) -> str | None:
    """Return the member that the arguments of an assignment name; AgentScope has checked them, after some repair."""
    try:
        return str(json.loads(arguments)["member"])
    except (ValueError, KeyError, TypeError):
        found = re.search(r"member\W+([\w-]+)", arguments)
        return found[1] if found else None


def call_of(agent: Any, call_id: str) -> Any:
    """Return an agent's latest tool call with this id, `None` without one."""
    for message in reversed(agent.state.context):
        for block in message.content:
            if getattr(block, "type", None) == "tool_call" and block.id == call_id:
                return block
    return None


def text_of(content: Any) -> str:
    """Return the text of a tool's response; what is none is named by its type."""
    if isinstance(content, str):
        return content
    return "".join(getattr(block, "text", f"[{block.type}]") for block in content)
