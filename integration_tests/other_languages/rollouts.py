"""Run programs as rollouts against the real gateway, with a scripted engine behind it.

One idea: the truth is the engine's own log. A task carries the tag `[[rollout=r3]]`, a system prompt `[[role=critic]]`,
and both stand in the prompt that the engine read; so who spoke is known without anything of Leyden's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import leyden
from leyden.interfaces import Access, AttemptResult, GenerationRequest, RolloutSpec
from leyden.roles import MAIN_ROLE, Policy, Route, Routing, Sampling
from leyden.running.attempts import run_attempt
from leyden.spans import Completion, Kind, Mode, Record, Reward, Span, Status
from leyden.testing.fakes import Answer, FakeEngine, Sampled
from leyden_plugins.gateway import HttpGateway

POLICY = "sql"
SCHEMA = "users(id, name)\norders(id, user_id)"
EXPECTED = "SELECT COUNT(*) FROM users"

SAMPLING = Sampling(max_tokens=1000)
"""A fake's tokens are bytes: what is short for a model is long for it."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a few rollouts left behind."""

    engine: FakeEngine
    results: Mapping[str, AttemptResult]
    records: Sequence[Record]

    def completions(self, rollout_id: str) -> list[Completion]:
        """Return a rollout's completions in the order they began."""
        found = [one for one in self.records if isinstance(one, Completion) and one.rollout_id == rollout_id]
        return sorted(found, key=lambda one: one.start_ns)

    def spans(self, rollout_id: str, kind: Kind) -> list[Span]:
        """Return a rollout's spans of a kind in the order they began."""
        found = [one for one in self.records if isinstance(one, Span) and one.rollout_id == rollout_id]
        return sorted((one for one in found if one.kind is kind), key=lambda one: one.start_ns)

    def rewards(self, rollout_id: str) -> dict[str, float]:
        """Return a rollout's recorded rewards by name."""
        found = [one for one in self.records if isinstance(one, Reward) and one.rollout_id == rollout_id]
        return {one.name: one.value for one in found}


def question(rollout_id: str) -> object:
    """Return the task of the text-to-SQL programs."""
    return {"question": f"[[rollout={rollout_id}]] how many users?", "schema": SCHEMA, "expected": EXPECTED}


def run(
    command: leyden.Command,
    engine: FakeEngine,
    *,
    rollouts: int = 1,
    roles: tuple[str, ...] | None = None,
    task: Callable[[str], object] = question,
    timeout_seconds: float = 60.0,
) -> Ran:
    """Run the command as several rollouts at once.

    Args:
        command: the agent.
        engine: says what it is told to.
        rollouts: how many.
        roles: those of the one policy; `None` for all.
        task: what a rollout of that id works on; its tag must reach every prompt.
        timeout_seconds: of each rollout.
    """

    def spec(rollout_id: str, gateway: HttpGateway) -> RolloutSpec:
        routes = (Route(model=POLICY, roles=roles),)
        access = Access(rollout_id=rollout_id, attempt=1, models={POLICY: SAMPLING}, routes=routes)
        return RolloutSpec(
            rollout_id=rollout_id,
            attempt=1,
            task=task(rollout_id),
            mode=Mode.TRAIN,
            timeout_seconds=timeout_seconds,
            routing=Routing(base_url=gateway.base_url, token=gateway.admit(access), routes=routes),
        )

    return asyncio.run(_run(command, engine, [f"r{index}" for index in range(rollouts)], spec))


async def _run(
    command: leyden.Command,
    engine: FakeEngine,
    rollout_ids: Sequence[str],
    spec: Callable[[str, HttpGateway], RolloutSpec],
) -> Ran:
    records: list[Record] = []

    async def keep(batch: Sequence[Record]) -> None:
        records.extend(batch)

    async def attempt(rollout_id: str) -> AttemptResult:
        result = await run_attempt(spec(rollout_id, gateway), command, sink=records.append)
        await gateway.revoke(rollout_id)
        return result

    gateway = HttpGateway()
    await engine.start([Policy(POLICY)])
    await gateway.start(engine, keep)
    try:
        results = await asyncio.gather(*(attempt(rollout_id) for rollout_id in rollout_ids))
    finally:
        await gateway.stop()
    return Ran(engine=engine, results={result.rollout_id: result for result in results}, records=records)


def tags(text: str) -> dict[str, str]:
    """Return the tags of a prompt."""
    return {"role": MAIN_ROLE} | dict(re.findall(r"\[\[(rollout|role)=([\w-]+)\]\]", text))


def truth(engine: FakeEngine, rollout_id: str, role: str | None) -> list[tuple[str, list[int], list[list[int]]]]:
    """Return (role, prompt, tokens) of everything the engine said in a rollout, by the tags of its prompts."""
    said: list[tuple[str, list[int], list[list[int]]]] = []
    for sampled in engine.log:
        found = tags_of(engine, sampled)
        if found.get("rollout") == rollout_id:
            said.append((role or found["role"], list(sampled.prompt_token_ids), sampled.token_ids))
    return sorted(said)


def tags_of(engine: FakeEngine, sampled: Sampled) -> dict[str, str]:
    """Return the tags of what the engine read."""
    return tags(engine.decode(sampled.prompt_token_ids))


def check(ran: Ran, *, calls: int, role: str | None = None) -> None:
    """Compare everything recorded with what the engine really said; `role` is who spoke where no tag says it."""
    assert len(ran.engine.log) == calls * len(ran.results), "a call that belongs to no rollout"
    for rollout_id, result in ran.results.items():
        assert result.error is None, result.error
        completions = ran.completions(rollout_id)
        recorded = [
            (one.role, one.prompt_token_ids, [choice.token_ids for choice in one.choices]) for one in completions
        ]
        assert sorted(recorded) == truth(ran.engine, rollout_id, role)
        assert len(recorded) == calls
        for one in completions:
            assert (one.policy, one.status, one.delivered, one.http_attempt) == (POLICY, Status.OK, True, 0)
            for choice in one.choices:
                assert choice.logprobs == [FakeEngine.logprob(token) for token in choice.token_ids]
        check_tree(ran, rollout_id)
        for each in {one.role for one in completions}:
            check_memory(ran, rollout_id, each)


def check_tree(ran: Ran, rollout_id: str) -> None:
    """See that the calls hang below the program, and the program below the rollout."""
    (root,) = ran.spans(rollout_id, Kind.ROLLOUT)
    (program,) = ran.spans(rollout_id, Kind.AGENT)
    calls = ran.spans(rollout_id, Kind.MODEL_CALL)
    assert (root.parent_id, program.parent_id) == (None, root.span_id)
    assert {(span.parent_id, span.status) for span in calls} == {(program.span_id, Status.OK)}
    assert [(span.span_id, span.role) for span in calls] == [
        (one.span_id, one.role) for one in ran.completions(rollout_id)
    ]
    for span in calls:
        assert program.start_ns <= span.start_ns <= span.end_ns <= program.end_ns


def check_memory(ran: Ran, rollout_id: str, role: str) -> None:
    """See that what a client sends back as its model's words is what the model said, tool calls letter by letter."""
    calls = [span for span in ran.spans(rollout_id, Kind.MODEL_CALL) if span.role == role]
    prompts = [messages(span, "input") for span in calls]
    said = [message for span in calls[:-1] for message in messages(span, "output")]
    assert [message for message in prompts[-1] if message["role"] == "assistant"] == said
    for before, after in pairwise(prompts):
        assert after[: len(before)] == before, "a prompt goes on from the one before"


def messages(span: Span, side: str) -> list[dict[str, object]]:
    """Return what a call read (`input`) or said (`output`)."""
    found = span.attributes[f"gen_ai.{side}.messages"]
    assert isinstance(found, list)
    return found


def call(call_id: str, name: str, *, text: str = "", **arguments: object) -> Answer:
    """Return an answer that calls a tool after some text."""
    # Spelled as no client would, so that one that spells it anew is found out.
    function = {"name": name, "arguments": json.dumps(arguments, indent=1)}
    return Answer(text=text, tool_calls=[{"id": call_id, "type": "function", "function": function}])


def results(request: GenerationRequest) -> list[str]:
    """Return what tools have answered so far."""
    return [str(message["content"]) for message in request.messages if message["role"] == "tool"]
