"""What improves policies or prompts from rollouts, and what it may ask of the trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from leyden.interfaces.learner import Loss, TrainingRow
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
    """Set by the algorithm."""
    weight: float = 0.0
    """Set with the loss weights, a token: 1 / (Z * N)."""


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

    def steps(self) -> AsyncIterator[int]:
        """Yield the steps still to do, from 1; ends early when the user asked to stop."""
        ...

    async def sample(self, step: int, *, group_size: int) -> Sequence[Group]:
        """Run `group_size` rollouts of each task of this step; those stored by an earlier, killed run are reused."""
        ...

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the policy's admitted transitions with their credit, by rollout and then start time."""
        ...

    async def update(self, policy: Policy, batches: Sequence[Sequence[TrainingRow]], loss: Loss) -> Mapping[str, float]:
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
