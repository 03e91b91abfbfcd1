"""What improves policies or prompts from rollouts, and what it may ask of the trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    is_retokenised: bool = False
    """Its tokens were made from recorded text: nobody knows which ones were sampled, so `logprobs` are zeros."""


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
    tasks: Sequence[object]
    """To train on."""
    stop_requested: bool
    """The user asked to stop: end the step soon, with what there is."""
    step: int
    """The step under way; between two steps, the last finished one."""
    total_steps: int
    max_staleness: int
    """How many updates of its policy a sample may be behind when it is trained; 0: sampling waits for every update."""

    def steps(self, until: int | None = None) -> AsyncIterator[int]:
        """Yield the steps still to do, from 1, up to `until`; ends early when the user asked to stop."""
        ...

    async def sample(
        self,
        step: int,
        *,
        group_size: int,
        accept: Callable[[Group], bool] | None = None,
        most_batches: int = 1,
        speakers: Mapping[str, str | None] | None = None,
    ) -> Sequence[Group]:
        """Return the step's groups: `group_size` rollouts of each of its tasks.

        Those stored by an earlier, killed run are used again. Groups are whole, whatever the order rollouts end in.

        Args:
            step: the step under way.
            group_size: rollouts a task.
            accept: keep only these groups, and sample further tasks in place of the others.
            most_batches: sample at most this many times a step's tasks, whatever was accepted.
            speakers: policy -> the policy that speaks for its roles in these rollouts; `None`: the app's own model.
        """
        ...

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        """Return up to `count` groups of the last `max_age` steps before this one, drawn with the run's seed."""
        ...

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the policy's admitted transitions with their credit, by rollout and then start time."""
        ...

    async def stored(self, source: str | Path) -> Sequence[Group]:
        """Return the finished rollouts of another run folder or store, which is only read.

        Raises:
            ConfigurationError: there is no store.
        """
        ...

    async def demonstrations(
        self, groups: Sequence[Group], policy: Policy, *, exact: bool = True
    ) -> Sequence[Transition]:
        """Return the calls of the policy's roles, whoever answered them, by rollout and then start time.

        Unlike `transitions` they say nothing of what the policy would do: only imitation may use them. Calls that were
        recorded without token ids are tokenised anew, with the policy's own chat template, and marked so.

        Args:
            groups: sampled in this run, or `stored` by another.
            policy: its roles' calls; its chat template.
            exact: recorded token ids are of the policy's tokenizer; False tokenises every call anew.

        Raises:
            ConfigurationError: calls must be tokenised anew and the engine cannot.
        """
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

    # ---- prompts -----------------------------------------------------------------------------------------------

    async def seed_prompts(self) -> Mapping[str, str]:
        """Return the prompts to improve as they are now: role -> system prompt.

        Those that the trainer was not told are read from rollouts, which must show one text a role.

        Raises:
            ConfigurationError: a role's system prompt differs from call to call, or it has none.
            RoleError: a role that does not speak.
        """
        ...

    async def try_prompts(self, prompts: Mapping[str, str], tasks: Sequence[int]) -> Sequence[RolloutRecords]:
        """Run training tasks, given by index, under these prompts, one rollout each; return the records in order.

        What these prompts did on a task before, also in a run that was killed, is taken from the store.
        """
        ...

    async def is_tried(self, prompts: Mapping[str, str], tasks: Sequence[int]) -> Sequence[bool]:
        """Say of which of these tasks `try_prompts` would find the rollout in the store."""
        ...

    async def publish_prompts(self, prompts: Mapping[str, str]) -> None:
        """Put prompts in force for every later rollout and for the export, each under a new version."""
        ...

    # ---- the run -----------------------------------------------------------------------------------------------

    async def get_note(self, key: str) -> str | None:
        """Return what `put_note` kept in the run's store, also before a resume."""
        ...

    async def put_note(self, key: str, value: str) -> None:
        """Keep a text in the run's store."""
        ...

    def progress(self, phase: str, done: int, of: int) -> None:
        """Show how far the step under way is."""
        ...

    def notice(self, line: str) -> None:
        """Tell the user something."""
        ...

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Publish the new versions, enter the ledger, report, and evaluate and checkpoint when due."""
        ...


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What an algorithm asks of a trainer; one without an attribute `demands` asks for these."""

    steps: int | None = None
    """How many it takes; `None`: the user says."""
    runs_agent: bool = True
    """False: it learns from what is stored, and needs neither agent nor tasks."""
    trains: bool = True
    """False: no weights change, so no policy need be trainable, and none need be there."""
    prompts: bool = False
    """It improves the prompts named in `Trainer(prompts=...)`."""
    synchronous: bool = False
    """Nothing may be sampled ahead of the step under way."""


def demands_of(algorithm: object) -> Demands:
    """Return what an algorithm asks of a trainer."""
    found = getattr(algorithm, "demands", None)
    return found if isinstance(found, Demands) else Demands()


class Algorithm(Protocol):
    """Improves policies or prompts from rollouts. One that asks for the unusual has an attribute `demands`."""

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
