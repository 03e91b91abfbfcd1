"""The app of the contract suite: its numbers, and that its episodes keep apart in every mode."""

from __future__ import annotations

import asyncio
import threading

import pytest

from integration_tests.frameworks.apps import autogen as app
from integration_tests.frameworks.scripts.autogen import answer
from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.autogen.server import Endpoint, Seen
from integration_tests.frameworks.suites.autogen.teams import counted, handoffs
from leyden.spans import Kind, Status
from leyden_plugins.frameworks.autogen import AutoGenAdapter
from tests.capture.rollouts import Recorded, rollout, routing_to

TRAINED = ("worker", "critic")


def script(seen: Seen) -> Say:
    return answer(Ask(role=seen.role, rollout=seen.rollout, messages=seen.messages))


@pytest.mark.parametrize("mode", [*app.MODES, "threads"])
def test_the_app_makes_the_calls_it_says(
    user: Endpoint, gateway: Endpoint, automatic: AutoGenAdapter, mode: str
) -> None:
    user.script = gateway.script = script
    found: dict[str, Recorded] = {}

    async def episode(name: str) -> None:
        with rollout(routing_to(gateway.base_url, *TRAINED), rollout_id=name) as found[name]:
            run = app.build(user.base_url, stream=mode.endswith("stream"), sync=False)
            assert await run(f"[[rollout={name}]] How many?") == f"The second draft for {name}: eight rooms."

    async def share(names: list[str]) -> None:
        await asyncio.gather(*map(episode, names))

    names = [f"r{index}" for index in range(8)]
    if mode == "threads":
        threads = [threading.Thread(target=lambda part=names[at::2]: asyncio.run(share(part))) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        asyncio.run(share(names))
    assert sorted(found) == sorted(names)
    for recorded in found.values():
        assert counted(recorded, Kind.MODEL_CALL) == app.CALLS
        assert counted(recorded, Kind.TOOL) == app.TOOLS
        assert {each: handoffs(recorded).count(each) for each in handoffs(recorded)} == app.HANDOFFS
        assert {span.status for kind in Kind for span in recorded.spans(kind)} == {Status.OK}
        assert recorded.context.declared_roles == set(app.CALLS)
    assert set(user.roles) == {"planner"} and set(gateway.roles) == set(TRAINED)
    for seen in gateway.seen:
        assert (seen.role, seen.rollout) == (seen.claimed_role, seen.headers["x-leyden-rollout"])
