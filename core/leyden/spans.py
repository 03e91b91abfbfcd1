"""The records of a run: spans, completions, rewards, rollouts, resources.

One idea: a record is a frozen value that is written once and never merged. The adapter writes the span of a
model call, the gateway writes its completions, and the MDP builder joins them by `span_id`.
One trap: a `Completion` belongs to one *HTTP attempt*; a client that retries leaves several, of which only the
last delivered one is trained.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum

import msgspec

SCHEMA_VERSION = 1
"""Stands in every stored record; a reader refuses a newer one with a clear error."""


class Kind(StrEnum):
    """What a span records."""

    ROLLOUT = "rollout"
    AGENT = "agent"
    MODEL_CALL = "model_call"
    TOOL = "tool"
    HANDOFF = "handoff"
    REWARD = "reward"
    MESSAGE = "message"
    EVENT = "event"


class Status(StrEnum):
    """How a span or a completion ended."""

    OK = "ok"
    ERROR = "error"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The stream was cut, the client went away, or the deadline passed: not a complete sample."""
    ABANDONED = "abandoned"
    """Still open when its rollout ended."""


class RolloutState(StrEnum):
    """Where a rollout stands; the moves between states are `STATE_MOVES`."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LOST = "lost"


STATE_MOVES: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.QUEUED: frozenset({RolloutState.RUNNING}),
    RolloutState.RUNNING: frozenset(
        {RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.TIMED_OUT, RolloutState.LOST}
    ),
    RolloutState.LOST: frozenset({RolloutState.QUEUED, RolloutState.FAILED}),
    RolloutState.SUCCEEDED: frozenset(),
    RolloutState.FAILED: frozenset(),
    RolloutState.TIMED_OUT: frozenset(),
}
"""The rollout life cycle: from each state, the states that may follow."""

FINISHED = frozenset({RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.TIMED_OUT})
"""States that nothing follows."""


class Mode(StrEnum):
    """What a rollout is for; only `TRAIN` rollouts use a policy's training sampling."""

    TRAIN = "train"
    SEARCH = "search"
    """Tries candidate prompts."""
    EVALUATE = "evaluate"
    DEV = "dev"
    RECORDED = "recorded"
    """Ran without a trainer: recorded in production, or imported."""


class Span(msgspec.Struct, frozen=True, kw_only=True, tag="span"):
    """One recorded operation, written when it ends."""

    span_id: str
    parent_id: str | None
    """`None` for the rollout's root span."""
    rollout_id: str
    attempt: int
    """Which try at the rollout, from 1."""
    kind: Kind
    name: str
    role: str
    """The agent or graph node on whose behalf this happened; `main` outside any named one."""
    start_ns: int
    """Wall clock, nanoseconds since the epoch."""
    end_ns: int
    status: Status = Status.OK
    error: str | None = None
    attributes: dict[str, object] = {}
    """Named by the OpenTelemetry GenAI conventions where one exists; JSON values only."""
    sequence: int = 0
    """Issued by the store: the order of arrival, whatever the clocks said."""
    schema: int = SCHEMA_VERSION


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled answer of a completion."""

    index: int
    token_ids: list[int]
    """Exactly what was sampled, the end token included when it was."""
    logprobs: list[float]
    """Aligned with `token_ids`: log-softmax(logits / temperature), before any mask or penalty."""
    finish_reason: str
    """`stop`, `length`, `tool_calls`, `interrupted` or `error`."""
    text: str = ""


class ForkCause(StrEnum):
    """Why a prompt does not begin with exactly the tokens of the conversation that it goes on from."""

    TEMPLATE = "template"
    """The messages are the same, their text rendered anew is not: reasoning dropped, tool calls reformatted."""
    TOKENISATION = "tokenisation"
    """The text is the same, its tokens are not."""
    EDIT = "edit"
    """The agent changed messages or tools: a shortened history, an answer in other words."""


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prompt leaves the tokens of the earlier call that its messages go on from or repeat."""

    span_id: str
    """Of that earlier call: of the same rollout, role and policy."""
    position: int
    """How many leading tokens this prompt shares with that call's prompt and answer."""
    cause: ForkCause
    before: str
    """The end of the shared text."""
    expected: str
    """How that call goes on behind it, shortened; for `tokenisation`, its tokens with `|` between them."""
    found: str
    """How this prompt goes on, shortened alike."""


class Completion(msgspec.Struct, frozen=True, kw_only=True, tag="completion"):
    """What the engine answered to one HTTP attempt of a model call; key (span_id, http_attempt)."""

    span_id: str
    http_attempt: int
    """From 0; a client's retries count up."""
    rollout_id: str
    attempt: int
    role: str
    policy: str
    version: int
    """The policy version that sampled every token of this completion."""
    prompt_token_ids: list[int]
    choices: list[Choice]
    sampling: dict[str, object]
    """The parameters that were really used (temperature, top_p, top_k, seed, stop, max_tokens, ...)."""
    off_distribution: bool
    """True when the recorded log-probabilities are not those of the distribution sampled from (masks, T = 0)."""
    status: Status
    delivered: bool
    """The whole answer was handed to the client's socket."""
    start_ns: int
    first_token_ns: int
    end_ns: int
    error: str | None = None
    fork: Fork | None = None
    """Set where the prompt should begin with an earlier call's tokens and does not."""
    spliced: int = 0
    """Leading prompt tokens that exact continuation took from the record instead of rendering messages; 0: none."""
    sequence: int = 0
    schema: int = SCHEMA_VERSION


class Reward(msgspec.Struct, frozen=True, kw_only=True, tag="reward"):
    """One reward of a rollout; key (rollout_id, attempt, name, target_role, target_span, index)."""

    rollout_id: str
    attempt: int
    name: str
    value: float
    target_role: str | None = None
    """Credits one role only; `None` credits the whole rollout."""
    target_span: str | None = None
    """Credits one span only, usually a model call."""
    index: int = 0
    """Tells apart several rewards of one name and target, for example one a turn."""
    schema: int = SCHEMA_VERSION


class Rollout(msgspec.Struct, frozen=True, kw_only=True, tag="rollout"):
    """One run of the agent on a task, with where it stands."""

    rollout_id: str
    task: object
    """The user's task, a JSON value."""
    task_id: str
    """Names the task; the samples of one task in one step form a group."""
    group_id: str
    mode: Mode
    step: int
    """The training step that asked for it; for evaluation the step it evaluates."""
    state: RolloutState = RolloutState.QUEUED
    attempt: int = 0
    """The latest attempt; 0 before the first."""
    reward: float | None = None
    """The weighted total; `None` until finished, or when the rollout has no reward (it then has no baseline share)."""
    output: object = None
    """What the agent returned when a separate reward function scores it; a JSON value or its `repr`."""
    error: str | None = None
    error_type: str | None = None
    versions: dict[str, int] = {}
    """Policy name -> version at the start of the attempt."""
    started_ns: int = 0
    ended_ns: int = 0
    schema: int = SCHEMA_VERSION


class Resource(msgspec.Struct, frozen=True, kw_only=True, tag="resource"):
    """What training publishes and rollouts use; key (kind, name, version), never reused."""

    kind: str
    """`policy`; `prompt`, whose name is a role; or `candidate`, prompts that were tried together."""
    name: str
    version: int
    created_ns: int
    location: str | None = None
    """Where the weights lie, relative to the run folder; `None` when only the engine holds them."""
    content: str | None = None
    """The prompt's text; of a candidate, JSON."""


class Update(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    """One entry of the update ledger: the rollouts that made a policy version."""

    update_id: str
    policy: str
    step: int
    version: int
    """The version this update produced."""
    rollout_ids: list[str]
    replayed_ids: list[str] = []
    """Rollouts of earlier steps that the algorithm used again; no rule keeps them from counting more than once."""
    voided: bool = False
    """Undone by a resume from an earlier checkpoint; its rollouts count again only where they are used again."""
    created_ns: int = 0


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """A commit point: everything needed to go on from `step`."""

    checkpoint_id: str
    step: int
    folder: str
    """Relative to the run folder; written whole before this record is."""
    versions: dict[str, int]
    created_ns: int


Record = Span | Completion | Reward
"""What rollouts produce."""


def new_id() -> str:
    """Return 16 random hex digits."""
    return os.urandom(8).hex()


def now_ns() -> int:
    """Return wall-clock nanoseconds since the epoch."""
    return time.time_ns()
