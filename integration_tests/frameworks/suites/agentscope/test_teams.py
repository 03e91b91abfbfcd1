"""Teams and SOPs, which AgentScope has from 2.0.9 on."""

from __future__ import annotations

import pytest
from agentscope.pipeline import TeamMember, TeamPipeline
from agentscope.sop import SOP, SOPEngine, SOPStep

from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.agentscope.agents import agent, calling, said, tree
from integration_tests.frameworks.suites.agentscope.conftest import Run
from integration_tests.frameworks.suites.agentscope.server import Endpoint
from leyden.spans import Kind
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")


def test_the_leader_of_a_team_hands_over_to_members_who_are_declared_before_they_speak(
    run: Run, user: Endpoint, gateway: Endpoint
) -> None:
    lead = calling(*(("TeamAssign", {"member": member, "prompt": "work"}) for member in ("coder", "tester")))
    user.script = gateway.script = lambda ask: lead(ask) if ask.role == "lead" else Say(text="worked")

    async def episode() -> Recorded:
        leader, *others = (agent(name, user.base_url) for name in ("lead", "coder", "tester", "idler"))
        members = [TeamMember(agent=each, description="works") for each in others]
        with rollout(routing_to(gateway.base_url, "coder", "tester")) as recorded:
            async for _ in TeamPipeline(leader, members).reply_stream(said()):
                pass
        return recorded

    recorded = run(episode())
    assert sorted(tree(recorded)) == sorted(
        [
            "agent lead lead ok < rollout",
            "model_call chat lead ok < lead",
            "handoff handoff to coder lead ok < lead",
            "handoff handoff to tester lead ok < lead",
            "agent coder coder ok < rollout",
            "model_call chat coder ok < coder",
            "agent tester tester ok < rollout",
            "model_call chat tester ok < tester",
            "agent lead lead ok < rollout",
            "model_call chat lead ok < lead",
        ]
    )
    assert [span.attributes["leyden.handoff.to"] for span in recorded.spans(Kind.HANDOFF)] == ["coder", "tester"]
    assert recorded.context.declared_roles == {"lead", "coder", "tester", "idler"}
    assert sorted(gateway.roles) == ["coder", "tester"]


def test_the_agents_of_a_sop_are_roles_and_declared_before_they_speak(run: Run, user: Endpoint) -> None:
    user.script = lambda ask: Say(
        tool_calls=(
            (
                "GenerateStructuredOutput",
                {"handover": "done"} if ask.role != "judge" else {"passed": True, "message": ""},
            ),
        )
    )

    async def episode() -> Recorded:
        cook, waiter, judge = (agent(name, user.base_url) for name in ("cook", "waiter", "judge"))
        steps = [SOPStep("cook", "cook it", cook, judge), SOPStep("serve", "serve it", waiter)]
        with rollout() as recorded:
            events = SOPEngine(SOP("dinner", steps)).reply_stream(said())
            await anext(events)
            assert recorded.context.declared_roles == {"cook", "waiter", "judge"}
            async for _ in events:
                pass
        return recorded

    agents = [line for line in tree(run(episode())) if line.startswith("agent")]
    assert agents == [f"agent {name} {name} ok < rollout" for name in ("cook", "judge", "waiter")]
