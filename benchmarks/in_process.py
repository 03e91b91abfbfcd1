"""Train plain async agents with the engine called in process: no gateway, no wire, no worker processes.

What is measured is then the learning core alone: the MDP builder, credit, the algorithm, the learner and the engine
are those of every run; only what lies between an agent and the engine is left out. One arm of the learning benchmark
is repeated through the full path, to show that this changes nothing.

    async def solve(task, episode):
        said = await episode.ask("writer", [{"role": "user", "content": task}])
        return float(said.text == "42")
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from leyden import mdp
from leyden.credit import Credit, broadcast
from leyden.interfaces import (
    Algorithm,
    Batch,
    GenerationRequest,
    Group,
    RolloutRecords,
    SamplingParameters,
    Transition,
)
from leyden.roles import RESERVED_MODEL, Policy, matches
from leyden.spans import Choice, Completion, Mode, Reward, Rollout, RolloutState, Status
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.learners.torch import TorchLearner

MAX_TOKENS = 48

Messages = Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer."""

    text: str
    call_id: str


@dataclass(kw_only=True)
class Episode:
    """What one rollout may do: ask the model of a role, and be rewarded."""

    rollout_id: str
    engine: TransformersEngine
    policies: Sequence[Policy]
    seed: str
    temperature: float = 1.0
    completions: list[Completion] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    score: float | None = None
    """How well it went, where the agent's reward does not say so; for curves and evaluation only."""

    async def ask(self, role: str, messages: Messages, *, max_tokens: int = MAX_TOKENS) -> Said:
        """Let a role's policy answer; a role of no policy is answered by the base, unrecorded."""
        policy = next((one.name for one in self.policies if matches(one.roles, role)), RESERVED_MODEL)
        number = len(self.completions)
        sampling = SamplingParameters(
            temperature=self.temperature,
            max_tokens=max_tokens,
            seed=random.Random(f"{self.seed}/{role}/{number}").getrandbits(63),
        )
        generation = await self.engine.generate(
            GenerationRequest(model=policy, messages=messages, sampling=sampling, stream=False)
        )
        token_ids: list[int] = []
        logprobs: list[float] = []
        text = ""
        reason = "stop"
        async for delta in generation.deltas:
            token_ids += delta.token_ids
            logprobs += delta.logprobs
            text += delta.text
            reason = delta.finish_reason or reason
        call_id = f"{self.rollout_id}/{number}/{role}"
        if policy != RESERVED_MODEL:
            choice = Choice(index=0, token_ids=token_ids, logprobs=logprobs, finish_reason=reason, text=text)
            self.completions.append(
                Completion(
                    span_id=call_id,
                    http_attempt=0,
                    rollout_id=self.rollout_id,
                    attempt=1,
                    role=role,
                    policy=policy,
                    version=generation.version,
                    prompt_token_ids=list(generation.prompt_token_ids),
                    choices=[choice],
                    sampling={"temperature": self.temperature},
                    off_distribution=False,
                    status=Status.OK,
                    delivered=True,
                    start_ns=number,
                    first_token_ns=number,
                    end_ns=number,
                )
            )
        return Said(text=text, call_id=call_id)

    def reward(self, value: float, name: str = "reward", *, role: str | None = None, call: str | None = None) -> None:
        """Reward a role or a call of this rollout."""
        self.rewards.append(
            Reward(
                rollout_id=self.rollout_id,
                attempt=1,
                name=name,
                value=value,
                target_role=role,
                target_span=call,
                index=len(self.rewards),
            )
        )


Agent = Callable[[object, Episode], Awaitable[float]]


@dataclass(kw_only=True)
class Run:
    """One training run; implements `leyden.interfaces.Session`."""

    agent: Agent
    tasks: Sequence[object]
    policies: Sequence[Policy]
    model: Path
    total_steps: int
    tasks_per_step: int = 16
    seed: int = 0
    credit: Credit = broadcast
    max_staleness: int = 0
    curve: list[float] = field(default_factory=list)
    """Mean score, by default reward, of each step's rollouts, sampled at temperature 1."""
    scores: dict[str, float] = field(default_factory=dict)
    """By rollout."""
    rollouts: int = 0
    """Sampled for training."""
    step: int = 0
    """The step under way; 0 before the first."""
    stop_requested: bool = False
    metrics: list[Mapping[str, float]] = field(default_factory=list)

    async def open(self) -> None:
        """Load the base into engine and learner."""
        self.engine = TransformersEngine(self.model, max_batch_size=128, seed=self.seed)
        self.learner = TorchLearner()
        self.versions = dict.fromkeys((policy.name for policy in self.policies), 0)
        self.updated: set[str] = set()
        await self.engine.start(self.policies)
        self.learner.open(self.policies, str(self.model), seed=self.seed)
        for policy in self.policies:
            if policy.trainable:
                await self.engine.publish(policy.name, 0, self.learner.weights(policy.name))

    async def train(self, algorithm: Algorithm) -> None:
        """Train for `total_steps` steps."""
        algorithm.check(self.policies)
        await algorithm.run(self)

    async def close(self) -> None:
        """Free the engine and the learner."""
        await self.engine.stop()
        self.learner.close()

    async def evaluate(self, tasks: Sequence[object], *, temperature: float = 0.0, seed: int = 0) -> list[float]:
        """Return the score of each task, by default of greedy answers."""
        found = await asyncio.gather(
            *(self._rollout(f"e{seed}-{index}", "", task, temperature=temperature) for index, task in enumerate(tasks))
        )
        return [self.scores[records.rollout.rollout_id] for records in found]

    async def steps(self, until: int | None = None) -> AsyncIterator[int]:
        """Yield the steps still to do."""
        for step in range(self.step + 1, (self.total_steps if until is None else until) + 1):
            self.step = step
            yield step

    async def sample(
        self,
        step: int,
        *,
        group_size: int,
        accept: Callable[[Group], bool] | None = None,
        most_batches: int = 1,
        speakers: Mapping[str, str | None] | None = None,
    ) -> Sequence[Group]:
        """Run the step's tasks; rejected groups are replaced by those of further tasks. Policies speak for themselves.

        Raises:
            ValueError: others are to speak.
        """
        if speakers:
            raise ValueError(f"policies speak for themselves here, got {dict(speakers)!r}")
        kept: list[Group] = []
        scores: list[float] = []
        for batch in range(most_batches):
            drawn = random.Random(f"{self.seed}/{step}/{batch}").sample(range(len(self.tasks)), self.tasks_per_step)
            groups = await asyncio.gather(
                *(self._group(f"s{step}.{batch}-t{task}", task, group_size) for task in drawn)
            )
            self.rollouts += len(drawn) * group_size
            scores += [self.scores[one.rollout.rollout_id] for group in groups for one in group.rollouts]
            kept += [group for group in groups if accept is None or accept(group)]
            if len(kept) >= self.tasks_per_step or accept is None:
                break
        self.curve.append(sum(scores) / len(scores))
        return kept[: self.tasks_per_step]

    async def _group(self, group_id: str, task: int, size: int) -> Group:
        names = [f"{group_id}-{sample}" for sample in range(size)]
        rollouts = await asyncio.gather(
            *(self._rollout(name, group_id, self.tasks[task], temperature=1.0) for name in names)
        )
        return Group(group_id=group_id, task=self.tasks[task], rollouts=rollouts)

    async def _rollout(self, name: str, group_id: str, task: object, *, temperature: float) -> RolloutRecords:
        episode = Episode(
            rollout_id=name,
            engine=self.engine,
            policies=self.policies,
            seed=f"{self.seed}/{name}",
            temperature=temperature,
        )
        total = await self.agent(task, episode)
        self.scores[name] = total if episode.score is None else episode.score
        rollout = Rollout(
            rollout_id=name,
            task=task,
            task_id=group_id,
            group_id=group_id,
            mode=Mode.TRAIN,
            step=self.step if temperature else 0,
            state=RolloutState.SUCCEEDED,
            attempt=1,
            reward=total,
        )
        return RolloutRecords(rollout=rollout, spans=(), completions=episode.completions, rewards=episode.rewards)

    def progress(self, phase: str, done: int, of: int) -> None:
        """Show nothing."""

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        """Return nothing: no arm replays."""
        return ()

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the policy's transitions."""
        return [
            one
            for group in groups
            for records in group.rollouts
            for one in mdp.transitions(records, self.policies, credit=self.credit)
            if one.policy == policy.name
        ]

    def staleness(self, transition: Transition) -> int:
        """Return 0: sampling waits for every update."""
        return 0

    async def logprobs(
        self, policy: Policy, transitions: Sequence[Transition], *, reference: bool = False
    ) -> Sequence[Sequence[float]]:
        """Return the learner's log-probabilities."""
        return self.learner.logprobs(policy.name, mdp.samples(transitions), reference=reference)

    async def values(self, policy: Policy, transitions: Sequence[Transition]) -> Sequence[Sequence[float]]:
        """Return the value head's predictions."""
        return self.learner.values(policy.name, mdp.samples(transitions))

    async def update(self, policy: Policy, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Take one optimizer step a batch."""
        progress = (self.step - 1) / max(1, self.total_steps - 1)
        rate = policy.learning_rate * (1 - progress * (1 - policy.final_learning_rate_fraction))
        found: dict[str, float] = {}
        for batch in batches:
            found = dict(self.learner.forward_backward(policy.name, batch))
            found |= self.learner.optim_step(policy.name, rate)
            self.updated.add(policy.name)
        return found

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Publish what was updated."""
        for name in sorted(self.updated):
            self.versions[name] += 1
            await self.engine.publish(name, self.versions[name], self.learner.weights(name))
        self.updated.clear()
        self.metrics.append(metrics)


async def trained(session: Run, algorithm: Algorithm, *, samples: int) -> dict[str, object]:
    """Open, evaluate, train, evaluate and close a run; return what came of it.

    Args:
        session: untrained.
        algorithm: what trains it.
        samples: each of its own tasks is asked so often in an evaluation, at temperature 1.
    """
    await session.open()
    tasks = [*session.tasks] * samples
    before = await session.evaluate(tasks, temperature=1.0, seed=session.seed)
    await session.train(algorithm)
    final = await session.evaluate(tasks, temperature=1.0, seed=session.seed)
    await session.close()
    return {
        "curve": session.curve,
        "before": sum(before) / len(before),
        "final": sum(final) / len(final),
        "final_n": len(final),
    }


def with_choice(completion: Completion, **changes: object) -> Completion:
    """Return a completion whose only choice is changed."""
    (choice,) = completion.choices
    return msgspec.structs.replace(completion, choices=[msgspec.structs.replace(choice, **changes)])
