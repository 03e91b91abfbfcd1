"""Agents in Node, on the official `openai` client from npm, which knows nothing of Leyden."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import leyden
from examples.other_languages.node import train
from integration_tests.gateway.test_dialects import Noting
from integration_tests.other_languages.packages import ROOT, npm_folder
from integration_tests.other_languages.rollouts import EXPECTED, call, check, results, run
from leyden.interfaces import GenerationRequest
from leyden.spans import Completion, Status
from leyden.sqlite import SQLiteStore
from leyden.testing.fakes import Answer, FakeEngine

EXAMPLE = ROOT / "examples" / "other_languages" / "node"
PROGRAMS = Path(__file__).parent / "programs"
ROLLOUTS = 4


@pytest.fixture(scope="module")
def agent() -> Path:
    return npm_folder(EXAMPLE) / "agent.mjs"


def looks_before_it_answers(request: GenerationRequest) -> Answer:
    """Call the tool for a table that is there, then for none, then answer."""
    match results(request):
        case []:
            return call("call_0", "columns", table="users")
        case ["users(id, name)"]:
            return call("call_1", "columns", table="sales")
        case ["users(id, name)", "there is no table sales"]:
            return Answer(text=EXPECTED)
    raise AssertionError(f"the agent made something else of the answers: {request.messages!r}")


def test_a_node_agent_with_tools_and_streams_is_recorded_exactly(agent: Path) -> None:
    engine = FakeEngine(looks_before_it_answers)
    ran = run(leyden.Command(["node", str(agent)]), engine, rollouts=ROLLOUTS)
    check(ran, calls=3)
    for rollout_id, result in ran.results.items():
        assert ran.rewards(rollout_id) == result.rewards == {"reward": 1.0}
        assert [one.choices[0].finish_reason for one in ran.completions(rollout_id)] == ["tool_calls"] * 2 + ["stop"]
    assert {sampled.request.stream for sampled in engine.log} == {True}


def answers_or_judges(request: GenerationRequest) -> Answer:
    """Play both agents of `responses.mjs`."""
    if "[[role=critic]]" in str(request.messages[0]["content"]):
        return Answer(text="yes" if EXPECTED in str(request.messages[-1]["content"]) else "no")
    return Answer(text=EXPECTED) if results(request) else call("call_0", "columns", table="users")


def test_responses_and_a_second_agent_known_by_its_key_are_recorded_under_their_roles() -> None:
    program = npm_folder(PROGRAMS) / "responses.mjs"
    command = leyden.Command(["node", str(program)], roles=["critic"], reward="post")
    ran = run(command, FakeEngine(answers_or_judges), rollouts=ROLLOUTS)
    check(ran, calls=3)
    for rollout_id in ran.results:
        assert [one.role for one in ran.completions(rollout_id)] == ["main", "main", "critic"]
        assert [len(one.choices) for one in ran.completions(rollout_id)] == [1, 1, 2]
        assert ran.rewards(rollout_id) == {"reward": 1.0, "agreed": 2.0}


async def stored(path: Path) -> list[Completion]:
    """Return every completion of a run."""
    async with await SQLiteStore.open(path, read_only=True) as store:
        rollouts = await store.rollouts()
        return [
            one
            for records in await store.records([rollout.rollout_id for rollout in rollouts])
            for one in records.completions
        ]


def test_the_example_trains_with_the_embedded_model(agent: Path, tmp_path: Path) -> None:
    engine = Noting()
    with train.trainer(engine, agent=agent, count=16, run=tmp_path / "run") as trainer:
        summary = trainer.fit(2)
    assert (summary["steps"], summary["rollouts"], summary["failures"]) == (2, 32, {})
    found = asyncio.run(stored(tmp_path / "run" / "store.db"))
    recorded = sorted((one.prompt_token_ids, one.choices[0].token_ids, one.choices[0].logprobs) for one in found)
    assert recorded == sorted((each.prompt_token_ids, each.token_ids[0], each.logprobs[0]) for each in engine.log)
    assert {(one.role, one.policy, one.status) for one in found} == {("main", "sql", Status.OK)}
    assert {one.version for one in found} == {0, 1}
