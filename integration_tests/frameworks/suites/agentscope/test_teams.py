"""Teams, which AgentScope has from 2.0.9 on."""

from __future__ import annotations

import pytest
from agentscope.pipeline import TeamMember, TeamPipeline

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
