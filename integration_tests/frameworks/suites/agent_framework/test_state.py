"""What remembers a conversation may serve one rollout; what does not may serve them all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agent_framework import AgentSession, Executor, WorkflowBuilder, WorkflowContext, handler
from agent_framework.orchestrations import SequentialBuilder

from integration_tests.frameworks.suites.agent_framework.apps import TASK, agent, calling, run, search
from integration_tests.frameworks.suites.server import Endpoint
from leyden.errors import ConcurrentUseError
from leyden.spans import Kind
from tests.capture.rollouts import Recorded, rollout

pytestmark = pytest.mark.usefixtures("instrumented")

streamed = pytest.mark.parametrize("stream", [False, True], ids=["awaited", "streamed"])


async def in_rollout(name: str, runnable: Any, **options: Any) -> Recorded:
    """Run in a rollout of that name; what went wrong stands in its context."""
    with rollout(rollout_id=name) as recorded:
        await run(runnable, TASK.replace("r1", name), **options)
    return recorded


@streamed
def test_one_agent_serves_fifty_rollouts_at_once(user: Endpoint, stream: bool) -> None:
    worker = agent(user, "worker", tools=[search])
    user.script = calling("worker", ("search", {"query": "a"}), ("search", {"query": "b"}))

    async def episodes() -> list[Recorded]:
        return await asyncio.gather(*(in_rollout(f"r{index}", worker, stream=stream) for index in range(50)))

    for index, recorded in enumerate(asyncio.run(episodes())):
        prompts = [str(call.attributes["gen_ai.input.messages"]) for call in recorded.calls]
        assert len(prompts) == 2 and all(f"[[rollout=r{index}]]" in prompt for prompt in prompts)
        assert {recorded.parent_of(span).name for span in recorded.spans(Kind.TOOL)} == {"worker"}
        assert len(recorded.spans(Kind.TOOL)) == 2


@streamed
def test_a_workflow_in_two_rollouts_at_once_is_refused(user: Endpoint, stream: bool) -> None:
    flow = SequentialBuilder(participants=[agent(user, "a"), agent(user, "b")]).build()

    async def episodes() -> list[Any]:
        both = (in_rollout(name, flow, stream=stream) for name in ("r1", "r2"))
        return await asyncio.gather(*both, return_exceptions=True)

    first, second = asyncio.run(episodes())
    assert len(first.calls) == 2
    with pytest.raises(ConcurrentUseError, match=r"'Sequential' runs in rollout 'r1'.*per_rollout"):
        raise second


def test_a_workflow_that_holds_another_rollouts_conversation_is_refused(user: Endpoint) -> None:
    flow = SequentialBuilder(participants=[agent(user, "a")]).build()

    async def episodes() -> None:
        await in_rollout("r1", flow)
        with rollout(rollout_id="r2") as recorded:
            with pytest.raises(ConcurrentUseError, match=r"ran in rollout 'r1' and still holds.*per_rollout"):
                await flow.run(TASK)
        assert isinstance(recorded.context.infrastructure_error, ConcurrentUseError)

    asyncio.run(episodes())
    assert len(user.seen) == 1


def test_a_workflow_may_run_twice_in_one_rollout_and_in_no_rollout(user: Endpoint) -> None:
    flow = SequentialBuilder(participants=[agent(user, "a")]).build()

    async def episodes() -> None:
        await flow.run(TASK)
        with rollout():
            await flow.run(TASK)
            await flow.run(TASK)
        await flow.run(TASK)

    asyncio.run(episodes())
    assert len(user.seen) == 4


class Counting(Executor):
    """Remembers no conversation."""

    @handler
    async def work(self, task: str, ctx: WorkflowContext[str, str]) -> None:
        await ctx.yield_output(task)


def test_a_workflow_without_agents_may_serve_one_rollout_after_the_other() -> None:
    flow = WorkflowBuilder(start_executor=Counting(id="counting")).build()

    async def episodes() -> list[Recorded]:
        return [await in_rollout(name, flow) for name in ("r1", "r2")]

    assert len(asyncio.run(episodes())) == 2


@streamed
def test_a_session_in_two_rollouts_at_once_is_refused(user: Endpoint, stream: bool) -> None:
    worker, session = agent(user, "worker"), AgentSession()

    async def episodes() -> list[Any]:
        both = (in_rollout(name, worker, stream=stream, session=session) for name in ("r1", "r2"))
        return await asyncio.gather(*both, return_exceptions=True)

    first, second = asyncio.run(episodes())
    assert len(first.calls) == 1
    with pytest.raises(ConcurrentUseError, match="a session of worker"):
        raise second


def test_sessions_of_their_own_keep_rollouts_apart_and_remember(user: Endpoint) -> None:
    worker = agent(user, "worker")

    async def one(name: str) -> Recorded:
        session = worker.create_session()
        with rollout(rollout_id=name) as recorded:
            for _ in range(2):
                await run(worker, f"[[rollout={name}]] again", session=session)
        return recorded

    async def episodes() -> list[Recorded]:
        return await asyncio.gather(*map(one, ("r1", "r2")))

    for name, recorded in zip(("r1", "r2"), asyncio.run(episodes()), strict=True):
        last = str(recorded.calls[-1].attributes["gen_ai.input.messages"])
        assert last.count(f"[[rollout={name}]]") == 2 and last.count("[[rollout=") == 2
