"""An agent of two roles whose model is a local server, and an algorithm that tries given prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

import leyden
from leyden.interfaces import Demands, RolloutRecords, Session
from leyden.roles import Policy
from tests.capture.servers import FakeOpenAI

client = httpx.Client(trust_env=False)


def two_roles(server: FakeOpenAI, prompts: Mapping[str, str]) -> Callable[[object], float]:
    """Return an agent whose reward is how many of its roles were answered under a prompt with the word `good`."""

    def agent(task: object) -> float:
        return float(sum("good" in ask(server, role, text, task) for role, text in prompts.items()))

    return agent


def ask(server: FakeOpenAI, role: str, system: str, task: object) -> str:
    """Return the answer, which repeats the last `role=` of the system message that the server was sent."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": str(task)}]
    with leyden.role(role):
        reply = client.post(server.base_url + "/chat/completions", json={"model": "m", "messages": messages})
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


@dataclass
class Try:
    """Tries each of some prompts on some tasks, and publishes the last."""

    candidates: Sequence[Mapping[str, str]]
    tasks: Sequence[int] = (0, 1)
    seeds: dict[str, str] = field(default_factory=dict)
    rewards: list[list[float | None]] = field(default_factory=list)
    records: list[Sequence[RolloutRecords]] = field(default_factory=list)
    group_size: int = 1
    demands: Demands = field(
        default_factory=lambda: Demands(steps=1, trains=False, prompts=True, synchronous=True), kw_only=True
    )

    def check(self, policies: Sequence[Policy]) -> None: ...

    async def run(self, session: Session) -> None:
        async for step in session.steps():
            self.seeds = dict(await session.seed_prompts())
            for prompts in self.candidates:
                found = await session.try_prompts(prompts, self.tasks)
                self.records.append(found)
                self.rewards.append([one.rollout.reward for one in found])
            if self.candidates:
                await session.publish_prompts(self.candidates[-1])
            await session.finish_step(step, [], {})


def prompt_trainer(run: Path, agent: object, algorithm: object, **options: object) -> leyden.Trainer:
    """Return a trainer without policies."""
    defaults: dict[str, object] = {
        "tasks": ["a", "b", "c"],
        "prompts": ["writer", "critic"],
        "run": run,
        "sinks": (),
        "workers": 0,
    }
    return leyden.Trainer(agent, algorithm=algorithm, **{**defaults, **options})  # type: ignore[arg-type]
