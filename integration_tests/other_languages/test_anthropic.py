"""An agent on Anthropic's own Python client, as a program of an environment that it does not share with the trainer."""

from __future__ import annotations

from pathlib import Path

import leyden
from integration_tests.other_languages.rollouts import EXPECTED, call, check, results, run
from leyden.interfaces import GenerationRequest
from leyden.testing.fakes import Answer, FakeEngine
from scripts.environments import lane

PROGRAM = Path(__file__).parent / "programs" / "messages.py"
ROLLOUTS = 3


def answers_or_judges(request: GenerationRequest) -> Answer:
    """Play both agents of `messages.py`; the first looks twice, the second time for a table that is not there."""
    if "[[role=critic]]" in str(request.messages[0]["content"]):
        return Answer(text="yes" if EXPECTED in str(request.messages[-1]["content"]) else "no")
    match results(request):
        case []:
            return call("call_0", "columns", text="I look first.", table="users")
        case ["users(id, name)"]:
            return call("call_1", "columns", table="sales")
        case ["users(id, name)", "Error: no such table"]:
            return Answer(text=EXPECTED)
    raise AssertionError(f"the agent made something else of the answers: {request.messages!r}")


def test_an_anthropic_agent_that_streams_and_calls_tools_is_recorded_exactly() -> None:
    argv = [str(lane("together")), str(PROGRAM)]
    engine = FakeEngine(answers_or_judges)
    ran = run(leyden.Command(argv, roles=["critic"], reward="file"), engine, rollouts=ROLLOUTS)
    check(ran, calls=4)
    for rollout_id in ran.results:
        assert [one.role for one in ran.completions(rollout_id)] == ["main", "main", "main", "critic"]
        assert ran.rewards(rollout_id) == {"reward": 1.0, "agreed": 1.0}
    assert [sampled.request.stream for sampled in engine.log].count(False) == ROLLOUTS
