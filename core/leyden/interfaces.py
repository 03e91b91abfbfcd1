"""What plugins implement: engine, learner, store, executor, framework adapter, algorithm, sink.

Each protocol states its duties: order, lengths, what may be mutated, what failure looks like.
`leyden.testing` holds one contract suite a kind, which every implementation passes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from leyden.roles import Policy, Route, Routing, Sampling
from leyden.spans import (
    Checkpoint,
    Completion,
    Mode,
    Record,
    Resource,
    Reward,
    Rollout,
    RolloutState,
    Span,
    Update,
)
from leyden.usage import Usage

# ---- engine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """What one request asks for, after the policy's own sampling replaced the agent's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    """`None`: up to the context length."""
    n: int = 1

    @property
    def is_off_distribution(self) -> bool:
        """True when log-softmax(logits / temperature) is not the distribution sampled from."""
        return (
            self.temperature == 0
            or self.top_p < 1
            or self.top_k > 0
            or self.min_p > 0
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One model call, in no dialect: the gateway translates every dialect into this."""

    model: str
    """A policy's name, or `base`."""
    messages: Sequence[Mapping[str, object]]
    """OpenAI chat messages; empty when `prompt_token_ids` is given."""
    tools: Sequence[Mapping[str, object]] = ()
    """OpenAI function tools."""
    tool_choice: str | Mapping[str, object] = "auto"
    prompt_token_ids: Sequence[int] | None = None
    """The exact prompt, in place of `messages`."""
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stream: bool = True
    """False: the caller waits for whole answers, so an engine may give each choice as one delta."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of one choice. The token ids of a choice's deltas, joined, are exactly what was sampled."""

    index: int
    """Which choice, 0 to n - 1."""
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """Aligned with `token_ids`: log-softmax(logits / temperature) before masks and penalties."""
    tool_calls: Sequence[Mapping[str, object]] = ()
    """Complete OpenAI tool calls (id, type, function{name, arguments}), given once they are parsed."""
    finish_reason: Literal["stop", "length", "tool_calls", "abort"] | None = None
    """Set on the last delta of a choice."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A running generation. Closing `deltas` early aborts it and frees its place in the batch."""

    prompt_token_ids: Sequence[int]
    version: int
    """The policy version that samples every token of this generation; 0 for `base`."""
    deltas: AsyncIterator[Delta]


@runtime_checkable
class Engine(Protocol):
    """Samples tokens for several policies by name.

    Duties: a request keeps the version it started with; a version number is never reused; log-probabilities follow
    DESIGN's convention; caches are keyed by version; aborted requests free their place.
    """

    @property
    def context_length(self) -> int:
        """The most tokens a prompt and its answer may have together."""
        ...

    @property
    def model(self) -> str:
        """The base weights' folder or hub name; the learner starts from the same."""
        ...

    def sha256(self, model: str) -> str:
        """Return a digest over the tensors served under a name now."""
        ...

    def models(self) -> Sequence[str]:
        """Return the names served now."""
        ...

    async def start(self, policies: Sequence[Policy]) -> None:
        """Load the base weights and serve them as `base` and, as version 0, under each policy's name. Idempotent."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin a generation.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            ConfigurationError: an unknown model, or an option this engine cannot honour.
            EngineError: the engine cannot serve now; the call may be retried.
        """
        ...

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        """Serve `weights` as `version` of `policy` for requests that begin after this returns.

        Waits for requests in flight of that policy where the weights cannot be kept side by side.
        """
        ...

    async def stop(self) -> None:
        """Free everything; requests in flight end with `EngineError`. Idempotent."""
        ...


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A policy's weights on their way to an engine: in memory, in a folder, or both."""

    tensors: Mapping[str, object] | None = None
    """Parameter name -> tensor, in the Hugging Face names; the engine copies what it keeps."""
    folder: Path | None = None
    """A Hugging Face checkpoint folder."""


# ---- learner ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One row of a batch. Every sequence but `token_ids` is aligned with it and of the same length T.

    Position t holds the values of *token t itself* (its log-probability given tokens before it).
    """

    token_ids: Sequence[int]
    mask: Sequence[bool]
    """True where the token was sampled by the policy and is trained here."""
    weights: Sequence[float]
    """1 / (Z * N) of DESIGN's "loss weights before layout"; 0 where not trained."""
    advantages: Sequence[float]
    logprobs: Sequence[float]
    """As recorded when sampled; 0 where not trained."""
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A named loss with its parameters; the learner knows the name, the algorithm chose it."""

    name: str
    """`policy_gradient_clip` (PPO/GRPO surrogate) or `cross_entropy` (weighted negative log-likelihood)."""
    options: Mapping[str, float] = field(default_factory=dict)


class Learner(Protocol):
    """Turns rows into gradients and gradients into weights, for several policies. Blocking; called off the loop."""

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        """Load the base weights once a trainable policy; refuse options that cannot be honoured.

        Raises:
            ConfigurationError: names the option.
        """
        ...

    def forward_backward(self, policy: str, rows: Sequence[TrainingRow], loss: Loss) -> Mapping[str, float]:
        """Add the gradient of the summed loss over `rows` to the policy's gradients; return summed metrics.

        Rows may be cut into micro-batches in any way: their weights already hold every normalisation.
        """
        ...

    def logprobs(self, policy: str, rows: Sequence[TrainingRow]) -> Sequence[Sequence[float]]:
        """Return log-softmax(logits / temperature) of every masked token, row by row in order; no gradient."""
        ...

    def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
        """Clip the gradient, step the optimizer, clear the gradient; return `gradient_norm` and `learning_rate`."""
        ...

    def weights(self, policy: str) -> Weights:
        """Return the current weights, for `Engine.publish`."""
        ...

    def export(self, policy: str, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (weights, config, tokenizer)."""
        ...

    def save(self, folder: Path) -> None:
        """Write every policy's weights, optimizer and RNG state, enough for a bit-equal `load`."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ConfigurationError: the folder's policies differ from the open ones.
        """
        ...

    def close(self) -> None: ...


# ---- store -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lease: a dead local owner is told apart from a reused pid."""

    pid: int
    process_start: str
    boot_id: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, for `Store.finish`."""

    rollout_id: str
    attempt: int
    state: RolloutState
    """A finished state, or `LOST`."""
    reward: float | None = None
    output: object = None
    error: str | None = None
    error_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutRecords:
    """All records of one rollout's surviving attempt, in store order."""

    rollout: Rollout
    spans: Sequence[Span]
    completions: Sequence[Completion]
    rewards: Sequence[Reward]


class Store(Protocol):
    """Tasks, rollouts, attempts, records, resources, ledger. Every write is idempotent and returns once it is safe."""

    async def add_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts; one that exists already is left as it is."""
        ...

    async def start(
        self, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float, versions: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Take the queued ones of these rollouts: rollout id -> its new attempt number. Others are left out."""
        ...

    async def renew(self, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float) -> None:
        """Extend leases still held by `owner`."""
        ...

    async def reclaim(self) -> Sequence[str]:
        """Mark rollouts whose lease ran out or whose local owner died `lost`, queue them again, return their ids."""
        ...

    async def finish(self, outcomes: Sequence[Outcome]) -> None:
        """End attempts. An outcome of another attempt than the latest is kept as a record and changes no state.

        Raises:
            StoreError: a move that `STATE_MOVES` does not allow.
        """
        ...

    async def requeue(self, rollout_ids: Sequence[str]) -> None:
        """Queue `lost` rollouts for another attempt."""
        ...

    async def add_records(self, records: Sequence[Record]) -> None:
        """Store spans, completions and rewards; a key seen before is ignored, unless its reward value differs.

        Raises:
            RewardError: the same (name, target, index) of a rollout with another value.
        """
        ...

    async def rollouts(
        self, *, mode: Mode | None = None, step: int | None = None, state: RolloutState | None = None
    ) -> Sequence[Rollout]:
        """Return rollouts in the order they were added."""
        ...

    async def records(self, rollout_ids: Sequence[str]) -> Sequence[RolloutRecords]:
        """Return the records of the latest attempt of each rollout, in the order asked; unknown ids are an error."""
        ...

    async def late_records(self, rollout_id: str) -> Sequence[Record]:
        """Return records of attempts that are not the latest: kept, never trained."""
        ...

    def stream(self, cursor: int = 0) -> AsyncIterator[tuple[int, Record]]:
        """Yield records with sequence above `cursor` as they arrive; the number resumes a broken stream."""
        ...

    async def put_resources(self, resources: Sequence[Resource]) -> None:
        """Publish resources.

        Raises:
            StoreError: a (kind, name, version) used before with another content.
        """
        ...

    async def resources(self, kind: str | None = None, name: str | None = None) -> Sequence[Resource]: ...

    async def add_updates(self, updates: Sequence[Update]) -> None:
        """Enter updates into the ledger.

        Raises:
            StoreError: a rollout would count twice for one policy among the updates that are not voided.
        """
        ...

    async def updates(self, *, include_voided: bool = False) -> Sequence[Update]: ...

    async def commit_checkpoint(self, checkpoint: Checkpoint) -> None: ...

    async def latest_checkpoint(self) -> Checkpoint | None: ...

    async def void_updates_after(self, step: int) -> Sequence[Update]:
        """Void the ledger's updates with a later step; return them."""
        ...

    async def next_version(self, policy: str) -> int:
        """Issue a version number of `policy` that was never issued before, also after a resume. The first is 1."""
        ...

    async def get_meta(self, key: str) -> str | None: ...

    async def put_meta(self, key: str, value: str) -> None: ...

    async def close(self) -> None: ...


# ---- running agents --------------------------------------------------------------------------------------------

Agent = Callable[..., object]
"""An async function, a sync function, or `leyden.per_rollout(factory)`, called with the task."""

RewardFunction = Callable[..., object]
"""(task, output, rollout) -> float | dict[str, float] | None; sync or async."""


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """One attempt to run; crosses process borders as JSON."""

    rollout_id: str
    attempt: int
    task: object
    mode: Mode
    timeout_seconds: float | None
    routing: Routing | None


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """What came of an attempt, before the reward policy is applied."""

    rollout_id: str
    attempt: int
    rewards: Mapping[str, float] | None
    """Named rewards from the return value or reward function; `None` when there was none."""
    no_reward: bool = False
    """The agent returned `NO_REWARD`: drop this rollout on purpose."""
    output: object = None
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None
    timed_out: bool = False
    infrastructure: bool = False
    """The failure is ours (worker lost, engine or gateway down, context lost), so another attempt may be made."""
    spoken_roles: Mapping[str, int] = field(default_factory=dict)
    declared_roles: Sequence[str] = ()
    finished_ns: int = 0


class Executor(Protocol):
    """Runs attempts of the user's agent somewhere, up to its concurrency limit."""

    async def start(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Get ready; `sink` takes the records of every attempt. Records of an attempt precede its result."""
        ...

    async def run(self, spec: RolloutSpec) -> AttemptResult:
        """Run one attempt. Never raises for what the agent does: that is in the result."""
        ...

    def usages(self) -> Sequence[Usage]:
        """Return what other processes used so far, one each."""
        ...

    async def stop(self) -> None: ...


class FrameworkAdapter(Protocol):
    """Hooks one framework's own callbacks. Recording never breaks the user's agent: adapters log and go on."""

    name: str
    module: str
    """The top-level package whose import makes this adapter attach."""

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version; names it and the versions that work.
        """
        ...

    def detach(self) -> None:
        """Restore every patched function."""
        ...


# ---- gateway ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Access:
    """What one attempt at a rollout may do at the gateway."""

    rollout_id: str
    attempt: int
    models: Mapping[str, Sampling]
    """Policy name -> the sampling that replaces the agent's own values."""
    routes: Sequence[Route] = ()
    """Role -> policy for callers that name a role in the URL instead of a model."""
    timeout_seconds: float | None = None


class Gateway(Protocol):
    """The OpenAI-compatible door of the engine; records a `Completion` for every call of an admitted rollout."""

    base_url: str
    """`http://127.0.0.1:PORT/v1`, known after `start`."""

    async def start(self, engine: Engine, record: Callable[[Sequence[Record]], Awaitable[None]]) -> None: ...

    def admit(self, access: Access) -> str:
        """Let a rollout in; return its bearer token."""
        ...

    async def revoke(self, rollout_id: str) -> None:
        """End a rollout's access; returns once every completion of it has been handed to `record`."""
        ...

    async def hold(self) -> None:
        """Keep new requests waiting; returns when none is in flight."""
        ...

    def release(self) -> None:
        """Let held requests go on."""
        ...

    async def stop(self) -> None: ...


# ---- algorithm -------------------------------------------------------------------------------------------------


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


# ---- watching --------------------------------------------------------------------------------------------------


class MetricSink(Protocol):
    """Shows or keeps a run's progress. What it raises is logged, never passed on."""

    def run_started(self, info: Mapping[str, object]) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def progress(self, info: Mapping[str, object]) -> None:
        """Called often during a step: rollouts done, of how many, tokens/s."""
        ...

    def notice(self, text: str) -> None:
        """Called with a line that the user should read: the preflight, a resume, a warning."""
        ...

    def run_finished(self, summary: Mapping[str, object]) -> None: ...
