"""Teams: their work and how it ends.

One idea: while a rollout runs, a team gets a token of ours, linked to the user's, so that whatever ends its stream
(cancellation, a reader that left, the deadline) also ends what AutoGen would let run on in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.teams import GraphFlow, RoundRobinGroupChat, SelectorGroupChat, Swarm
from autogen_core import CancellationToken

from leyden import context, wire
from leyden.context import RolloutContext
from leyden.errors import ConfigurationError, DeadlineExceeded
from leyden.spans import Kind
from leyden_plugins.frameworks.autogen.members import declare, members
from leyden_plugins.frameworks.autogen.runtimes import carrying_senders
from leyden_plugins.frameworks.autogen.work import CLAIMS, ENDED, Active, Work, is_at_work

Method = Callable[..., Any]

SILENT = (RoundRobinGroupChat, Swarm, GraphFlow)
"""Teams whose manager calls no model."""


def observed_run_stream(run_stream: Method, active: Active) -> Method:
    """Return a team's `run_stream`, as its work."""

    @functools.wraps(run_stream)
    def observe(team: Any, **options: Any) -> AsyncIterator[Any]:
        if not active() or is_at_work(team):
            return run_stream(team, **options)  # type: ignore[no-any-return]  # the method we wrap
        return conversing(team, run_stream, options)

    return observe


async def conversing(team: Any, run_stream: Method, options: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield a team's messages and its result, as its work."""
    work = begin(team)
    conversation = Conversation(work.rollout, options.get("cancellation_token"))
    if work.rollout is not None:
        options = {**options, "cancellation_token": conversation.token}
    with work.entered():
        items = run_stream(team, **options)
    steps = Interruptible(items, conversation.token)
    try:
        with carrying_senders(team):
            while (item := await work.step(steps)) is not ENDED:
                if isinstance(item, TaskResult):
                    work.answered()
                yield item
    except BaseException as error:
        conversation.token.cancel()
        with work.entered(), contextlib.suppress(Exception, asyncio.CancelledError):
            await items.aclose()
        late = conversation.deadline_error(error)
        work.fail(late or error)
        if late is not None:
            raise late from error
        raise
    finally:
        conversation.end()
    work.close()


def begin(team: Any) -> Work:
    """Start a team's work; who speaks in it outside its agents is its manager.

    Raises:
        ConcurrentUseError: another rollout has used the team or one of its agents and still runs.
        ConfigurationError: the prompt of a selector is to be replaced.
    """
    found = members(team)
    CLAIMS.take(each for each in found if isinstance(each, ChatAgent | Team))
    declare(found)
    manager = None if isinstance(team, SILENT) else str(team._group_chat_manager_name)
    check_prompt(team, manager)
    return Work(team, Kind.AGENT, team.name, role=manager, **{"gen_ai.agent.name": team.name})


def check_prompt(team: Any, manager: str | None) -> None:
    """Refuse another prompt for a selector, because its request is one message made from a template.

    Raises:
        ConfigurationError: says where the template belongs.
    """
    frame = context.current()
    routing = frame.rollout.routing if frame and frame.rollout else wire.default_routing()
    if routing is not None and manager in routing.prompts and isinstance(team, SelectorGroupChat):
        raise ConfigurationError(
            f"the prompt of role {manager!r} cannot be replaced on its way: AutoGen sends the conversation in the same "
            "message. Give the text to SelectorGroupChat(selector_prompt=...) and take the role out of the prompts"
        )


class Conversation:
    """One run of a team: what may end it early."""

    def __init__(self, rollout: RolloutContext | None, users: CancellationToken | None) -> None:
        self.rollout = rollout
        self.is_late = False
        self.token = CancellationToken()
        self.timer: asyncio.TimerHandle | None = None
        if rollout is None:
            return
        if users is not None:
            users.add_callback(self.token.cancel)
        left = rollout.seconds_left()
        if left is not None:
            self.timer = asyncio.get_running_loop().call_later(max(left, 0.0), self.stop_late)

    def stop_late(self) -> None:
        """Stop at the deadline. What a manager raises in the background, AutoGen would not notice."""
        self.is_late = True
        self.token.cancel()

    def deadline_error(self, error: BaseException) -> DeadlineExceeded | None:
        """Return what to raise in place of `error` when the deadline was the cause."""
        if not self.is_late or self.rollout is None or isinstance(error, DeadlineExceeded | GeneratorExit):
            return None
        return DeadlineExceeded(f"the deadline of rollout {self.rollout.rollout_id!r} passed while its team worked")

    def end(self) -> None:
        """Forget the deadline."""
        if self.timer is not None:
            self.timer.cancel()


class Interruptible:
    """The next item of a stream, awaited; cancels a token before a cancellation reaches the stream.

    AutoGen answers the cancellation of a stream by waiting until the team has finished its whole conversation.
    """

    def __init__(self, items: Any, token: CancellationToken) -> None:
        self.items = items
        self.token = token

    def __aiter__(self) -> Interruptible:
        return self

    def __anext__(self) -> Interruptible:
        return self

    def __await__(self) -> Generator[Any, Any, Any]:
        """Pass on what the stream waits for, and what comes back."""
        item = self.items.__anext__().__await__()
        send, given = item.send, None
        while True:
            try:
                future = send(given)
            except StopIteration as end:
                return end.value
            try:
                send, given = item.send, (yield future)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    self.token.cancel()
                send, given = item.throw, error
