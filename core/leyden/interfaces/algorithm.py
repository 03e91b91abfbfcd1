"""What improves policies or prompts from rollouts, and what it may ask of the trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from leyden.interfaces.learner import Batch
from leyden.interfaces.store import RolloutRecords
from leyden.roles import Policy


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One admitted sample of a policy: state = prompt tokens, action = response tokens."""

    rollout_id: str
    group_id: str
    role: str
    policy: str
    version: int
    span_id: str
    choice_index: int
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Aligned with `token_ids`."""
    temperature: float
    off_distribution: bool
    finish_reason: str
    turn: int
    """This role's how-manieth call in the rollout, from 0, by start time."""
    value: float
    """The return that credit assignment gave this call."""
    advantage: float = 0.0
    """Of every token, set by the algorithm."""
    weight: float = 0.0
    """Of every token, set with the loss weights: 1 / (Z * N)."""
    shaping: float = 0.0
    """What of `value` the algorithm itself added for this call alone (a punishment, a divergence)."""
    token_advantages: Sequence[float] | None = None
    """In place of `advantage`, where tokens differ (GAE); aligned with `token_ids`, as all that follow."""
    corrections: Sequence[float] | None = None
    """Multiply the tokens' weights: importance sampling of stale or mismatched samples; `None` is 1."""
    old_logprobs: Sequence[float] | None = None
    """Under the learner's weights when the update began; `None`: the recorded ones stand for them."""
    reference_logprobs: Sequence[float] | None = None
    """Under the base weights, for a divergence term."""
    returns: Sequence[float] | None = None
    """What a value head should predict before each token."""
    values: Sequence[float] | None = None
    """What it predicted when the update began."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rollouts of one task in one step: the baseline is computed over them."""

    group_id: str
    task: object
    rollouts: Sequence[RolloutRecords]
    """Finished ones, in sample order; those without a reward have `rollout.reward is None`."""


class Session(Protocol):
    """What a running algorithm may ask of the trainer."""

    policies: Sequence[Policy]
    total_steps: int
    max_staleness: int
    """How many updates of its policy a sample may be behind when it is trained; 0: sampling waits for every update."""

    def steps(self) -> AsyncIterator[int]:
        """Yield the steps still to do, from 1; ends early when the user asked to stop."""
        ...

    async def sample(
        self, step: int, *, group_size: int, accept: Callable[[Group], bool] | None = None, most_batches: int = 1
    ) -> Sequence[Group]:
        """Return the step's groups: `group_size` rollouts of each of its tasks.

        Those stored by an earlier, killed run are used again. Groups are whole, whatever the order rollouts end in.

        Args:
            step: the step under way.
            group_size: rollouts a task.
            accept: keep only these groups, and sample further tasks in place of the others.
            most_batches: sample at most this many times a step's tasks, whatever was accepted.
        """
        ...

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        """Return up to `count` groups of the last `max_age` steps before this one, drawn with the run's seed."""
        ...

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the policy's admitted transitions with their credit, by rollout and then start time."""
        ...

    def staleness(self, transition: Transition) -> int:
        """Return how many updates its policy has had since it was sampled."""
        ...

    async def logprobs(
        self, policy: Policy, transitions: Sequence[Transition], *, reference: bool = False
    ) -> Sequence[Sequence[float]]:
        """Return the answers' log-probabilities under the learner's weights now, or the base's; off the loop."""
        ...

    async def values(self, policy: Policy, transitions: Sequence[Transition]) -> Sequence[Sequence[float]]:
        """Return the value head's prediction before each answer token; off the loop."""
        ...

    async def update(self, policy: Policy, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Take one optimizer step a batch, in order, off the loop; return metrics averaged over the batches."""
        ...

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Publish the new versions, enter the ledger, report, and evaluate and checkpoint when due."""
        ...


class Algorithm(Protocol):
    """Improves policies or prompts from rollouts."""

    @property
    def group_size(self) -> int:
        """How many rollouts of one task a step makes."""
        ...

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse options that do not go together, before anything is loaded.

        Raises:
            ConfigurationError: names the option and what to change.
        """
        ...

    async def run(self, session: Session) -> None: ...
