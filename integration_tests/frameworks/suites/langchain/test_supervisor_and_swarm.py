"""The packages langgraph-supervisor and langgraph-swarm: each agent speaks under its own name, and is routed by it."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from integration_tests.langchain.apps import model, react_agent, search
from integration_tests.langchain.conftest import Run
from leyden.spans import Kind, Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

supervisor = pytest.importorskip("langgraph_supervisor", reason="needs the package langgraph-supervisor")
swarm = pytest.importorskip("langgraph_swarm", reason="needs the package langgraph-swarm")

pytestmark = pytest.mark.usefixtures("instrumented")


def supervised(base_url: str) -> Any:
    """A supervisor that asks alice, and has the last word."""
    llm = model(base_url)
    alice, bob = (react_agent(llm, [search], f"role={name} call=search", name=name) for name in ("alice", "bob"))
    return supervisor.create_supervisor(
        [alice, bob], model=llm, prompt="role=supervisor call=transfer_to_alice"
    ).compile()


def swarming(base_url: str) -> Any:
    """Alice, who hands over to bob."""
    llm = model(base_url)
    to_bob = swarm.create_handoff_tool(agent_name="bob")
    alice = react_agent(llm, [to_bob], "role=alice call=transfer_to_bob", name="alice")
    bob = react_agent(llm, [search], "role=bob", name="bob")
    return swarm.create_swarm([alice, bob], default_active_agent="alice").compile()


CASES = [
    (supervised, ["supervisor", "alice", "supervisor"], "alice"),
    (swarming, ["alice", "bob"], "bob"),
]


@pytest.mark.parametrize("is_sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize(("make", "speakers", "trained"), CASES, ids=["supervisor", "swarm"])
def test_each_agent_speaks_under_its_name_and_only_the_trained_one_is_rerouted(
    run: Run,
    user_server: FakeOpenAI,
    gateway: FakeOpenAI,
    make: Any,
    speakers: list[str],
    trained: str,
    is_sync: bool,
) -> None:
    app, start = make(user_server.base_url), {"messages": [HumanMessage("go")]}

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url, trained)) as recorded:
            if is_sync:
                app.invoke(start)
            else:
                await app.ainvoke(start)
        return recorded

    recorded = run(episode())
    assert [span.role for span in recorded.calls] == speakers
    for span in recorded.calls:
        assert f"role={span.role}" in str(span.attributes["gen_ai.input.messages"])
        assert (recorded.parent_of(span).kind, recorded.parent_of(span).role) == (Kind.AGENT, span.role)
    assert [seen.true_role for seen in gateway.seen] == [trained]
    assert [seen.true_role for seen in user_server.seen] == [role for role in speakers if role != trained]
    assert set(speakers) <= recorded.context.declared_roles
    assert {span.attributes["leyden.handoff.to"] for span in recorded.spans(Kind.HANDOFF)} >= {trained}
    assert {span.status for span in recorded.spans(Kind.AGENT)} == {Status.OK}
