"""Records, groups and a session for tests of the learning core; every builder takes keyword overrides."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leyden import mdp
from leyden.demonstrations import Source, demonstrations
from leyden.interfaces import Batch, Group, Learner, RolloutRecords, Sample, Transition
from leyden.roles import Policy
from leyden.spans import Choice, Completion, Mode, Reward, Rollout, RolloutState, Status

POLICY = Policy("sql")


def choice(token_ids: Sequence[int], *, index: int = 0, logprob: float = -1.0, finish_reason: str = "stop") -> Choice:
    return Choice(
        index=index, token_ids=list(token_ids), logprobs=[logprob] * len(token_ids), finish_reason=finish_reason
    )


def call(
    prompt: Sequence[int],
    *answers: Choice,
    span_id: str = "s0",
    http_attempt: int = 0,
    rollout_id: str = "r0",
    attempt: int = 1,
    role: str = "writer",
    policy: str = "sql",
    version: int = 0,
    sampling: Mapping[str, object] | None = None,
    off_distribution: bool = False,
    status: Status = Status.OK,
    delivered: bool = True,
    start_ns: int = 0,
) -> Completion:
    return Completion(
        span_id=span_id,
        http_attempt=http_attempt,
        rollout_id=rollout_id,
        attempt=attempt,
        role=role,
        policy=policy,
        version=version,
        prompt_token_ids=list(prompt),
        choices=list(answers),
        sampling={"temperature": 1.0} if sampling is None else dict(sampling),
        off_distribution=off_distribution,
        status=status,
        delivered=delivered,
        start_ns=start_ns,
        first_token_ns=start_ns,
        end_ns=start_ns + 1,
    )


def reward(
    value: float, *, role: str | None = None, span: str | None = None, index: int = 0, rollout_id: str = "r0"
) -> Reward:
    return Reward(
        rollout_id=rollout_id,
        attempt=1,
        name="reward",
        value=value,
        target_role=role,
        target_span=span,
        index=index,
    )


def records(
    *completions: Completion,
    total: float | None = 1.0,
    rollout_id: str = "r0",
    group_id: str = "g0",
    state: RolloutState = RolloutState.SUCCEEDED,
    attempt: int = 1,
    rewards: Sequence[Reward] = (),
) -> RolloutRecords:
    rollout = Rollout(
        rollout_id=rollout_id,
        task={},
        task_id=group_id,
        group_id=group_id,
        mode=Mode.TRAIN,
        step=1,
        state=state,
        attempt=attempt,
        reward=total,
    )
    return RolloutRecords(rollout=rollout, spans=(), completions=completions, rewards=rewards)


def transition(
    *,
    prompt: Sequence[int] = (1, 2),
    tokens: Sequence[int] = (3, 4),
    logprobs: Sequence[float] | None = None,
    rollout_id: str = "r0",
    group_id: str = "g0",
    role: str = "writer",
    span_id: str = "s0",
    choice_index: int = 0,
    temperature: float = 1.0,
    turn: int = 0,
    value: float = 1.0,
    advantage: float = 0.0,
    weight: float = 0.0,
    off_distribution: bool = False,
) -> Transition:
    return Transition(
        rollout_id=rollout_id,
        group_id=group_id,
        role=role,
        policy="sql",
        version=0,
        span_id=span_id,
        choice_index=choice_index,
        prompt_token_ids=list(prompt),
        token_ids=list(tokens),
        logprobs=[-1.0] * len(tokens) if logprobs is None else list(logprobs),
        temperature=temperature,
        off_distribution=off_distribution,
        finish_reason="stop",
        turn=turn,
        value=value,
        advantage=advantage,
        weight=weight,
    )


def group(*rewards: float | None, group_id: str = "g0", speaks: bool = True) -> Group:
    """Return a group with one rollout a reward, each with one call of two random-looking tokens."""
    rollouts = []
    for number, total in enumerate(rewards):
        rollout_id = f"{group_id}-{number}"
        calls = [call([1, 2], choice([3, number]), span_id=rollout_id, rollout_id=rollout_id)] if speaks else []
        rollouts.append(records(*calls, total=total, rollout_id=rollout_id, group_id=group_id))
    return Group(group_id=group_id, task={}, rollouts=rollouts)


def sample(
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    logprobs: Sequence[float] | None = None,
    advantage: float = 1.0,
    weight: float = 1.0,
    temperature: float = 1.0,
) -> Sample:
    one = transition(
        prompt=prompt,
        tokens=tokens,
        logprobs=logprobs,
        advantage=advantage,
        weight=weight,
        temperature=temperature,
    )
    return mdp.samples([one])[0]


@dataclass(kw_only=True)
class RecordedSession:
    """A session over given groups; hands samples to a learner where there is one, and keeps what it was told."""

    groups: Callable[[int], Sequence[Group]]
    policies: Sequence[Policy] = (POLICY,)
    total_steps: int = 1
    learner: Learner | None = None
    max_staleness: int = 0
    updates: list[tuple[str, Sequence[Batch]]] = field(default_factory=list)
    finished: list[Mapping[str, float]] = field(default_factory=list)
    asked_group_size: int = 0
    asked_speakers: Mapping[str, str | None] | None = None
    asked_exact: list[bool] = field(default_factory=list)
    sources: Mapping[str, Sequence[Group]] = field(default_factory=dict)
    """What `stored` finds."""

    async def steps(self, until: int | None = None) -> AsyncIterator[int]:
        for step in range(1, (self.total_steps if until is None else until) + 1):
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
        self.asked_group_size = group_size
        self.asked_speakers = speakers
        found = self.groups(step)
        return found if accept is None else [one for one in found if accept(one)]

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        return ()

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        return [one for group in groups for each in group.rollouts for one in mdp.transitions(each, [policy])]

    async def stored(self, source: str | Path) -> Sequence[Group]:
        return self.sources[str(source)]

    async def demonstrations(
        self, groups: Sequence[Group], policy: Policy, *, exact: bool = True
    ) -> Sequence[Transition]:
        self.asked_exact.append(exact)
        made = Source(policy=policy, policies=self.policies, tokenise=None)
        return [one for group in groups for each in group.rollouts for one in demonstrations(each, made).transitions]

    def progress(self, phase: str, done: int, of: int) -> None: ...

    def staleness(self, transition: Transition) -> int:
        return 0

    async def logprobs(
        self, policy: Policy, transitions: Sequence[Transition], *, reference: bool = False
    ) -> Sequence[Sequence[float]]:
        assert self.learner is not None
        return self.learner.logprobs(policy.name, mdp.samples(transitions), reference=reference)

    async def values(self, policy: Policy, transitions: Sequence[Transition]) -> Sequence[Sequence[float]]:
        assert self.learner is not None
        return self.learner.values(policy.name, mdp.samples(transitions))

    async def update(self, policy: Policy, batches: Sequence[Batch]) -> Mapping[str, float]:
        self.updates.append((policy.name, batches))
        metrics: dict[str, float] = {}
        for batch in batches:
            if self.learner is not None:
                metrics = dict(self.learner.forward_backward(policy.name, batch))
                metrics |= self.learner.optim_step(policy.name, policy.learning_rate)
        return metrics

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        self.finished.append(metrics)


def rich_transitions(vocabulary: int, *, seed: int = 0, temperatures: Sequence[float] = (1.0,)) -> list[Transition]:
    """Return transitions with turns that extend each other, branches, exact duplicates and prompts of their own."""
    rng = random.Random(seed)

    def draw(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(length)]

    found: list[Transition] = []
    for number in range(4):
        history = draw(5)
        for turn in range(3):
            answers = [draw(rng.randint(1, 5)) for _ in range(2)]
            for copy, answer in enumerate([*answers, answers[0]]):  # two branches, and a retry that says the same
                found.append(
                    transition(
                        prompt=history,
                        tokens=answer,
                        logprobs=[rng.uniform(-4, -1) for _ in answer],
                        rollout_id=f"r{number}",
                        group_id=f"g{number // 2}",
                        span_id=f"s{number}-{turn}-{copy}",
                        temperature=temperatures[(turn + copy) % len(temperatures)],
                        turn=turn,
                        advantage=rng.uniform(-1, 1),
                    )
                )
            history = history + answers[0] + draw(3)
        found.append(
            transition(
                prompt=draw(4),
                tokens=draw(3),
                logprobs=[-2.0] * 3,
                rollout_id=f"r{number}",
                group_id=f"g{number // 2}",
                span_id=f"s{number}-own",
                advantage=0.5,
            )
        )
    return found
