"""Run one attempt at a rollout in this process: the agent, its deadline, its reward, its failure.

Whatever the agent does ends in an `AttemptResult`; nothing of it is raised.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from leyden.context import RolloutContext, rollout_scope
from leyden.errors import DeadlineExceeded, LostContextError, RewardError, RolloutError
from leyden.interfaces import Agent, AttemptResult, RewardFunction, RolloutSpec
from leyden.rewards import NO_REWARD, named
from leyden.running.agents import PerRollout, call
from leyden.spans import Record, Reward, now_ns

CANCEL_GRACE_SECONDS = 2.0
"""How long a cancelled agent may take to end before it is left behind."""


@dataclass
class _Emitted:
    """Takes the records of one attempt until it is over, and refuses a reward given twice. Thread-safe."""

    sink: Callable[[Record], None]
    keys: dict[tuple[object, ...], float] = field(default_factory=dict)
    names: dict[str, float] = field(default_factory=dict)
    """Sums of the whole rollout's rewards; 0 for a name that only roles or calls were rewarded with."""
    is_over: bool = False
    """What threads and tasks that the agent left behind still record is dropped: the attempt is judged already."""
    is_scoring: bool = False
    """The agent is done, and its reward function is under way."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, record: Record) -> None:
        with self.lock:
            if not self.is_over:
                self._take(record)

    def _take(self, record: Record) -> None:
        if isinstance(record, Reward):
            key = (record.name, record.target_role, record.target_span, record.index)
            if key in self.keys:
                raise RewardError(
                    f"rollout {record.rollout_id!r}: reward {record.name!r} was given twice for the same target and "
                    f"index ({self.keys[key]!r}, then {record.value!r}); use index= to tell several apart"
                )
            self.keys[key] = record.value
            is_of_rollout = record.target_role is None and record.target_span is None
            self.names[record.name] = self.names.get(record.name, 0.0) + (record.value if is_of_rollout else 0.0)
        self.sink(record)


async def run_attempt(
    spec: RolloutSpec,
    agent: Agent | PerRollout,
    *,
    sink: Callable[[Record], None],
    reward: RewardFunction | None = None,
) -> AttemptResult:
    """Run the agent on `spec.task` and score it.

    Returns:
        The named rewards (from the return value, the reward function and `emit_reward`), or what went wrong.
    """
    emitted = _Emitted(sink)
    context = RolloutContext(
        rollout_id=spec.rollout_id,
        attempt=spec.attempt,
        mode=spec.mode,
        sink=emitted,
        routing=spec.routing,
        timeout_seconds=spec.timeout_seconds,
    )
    job = asyncio.ensure_future(_run(spec, agent, reward, context, emitted))
    try:
        done, _ = await asyncio.wait({job}, timeout=spec.timeout_seconds)
        if not done and emitted.is_scoring:  # the agent is done; its reward function has as long again
            done, _ = await asyncio.wait({job}, timeout=spec.timeout_seconds)
        if not done:
            await _cancel(job)
            return _unscored(spec, context) if emitted.is_scoring else _timed_out(spec, context)
        return job.result()
    except asyncio.CancelledError:
        await _cancel(job)
        raise
    finally:
        context.close()
        emitted.is_over = True


async def _run(
    spec: RolloutSpec,
    agent: Agent | PerRollout,
    reward: RewardFunction | None,
    context: RolloutContext,
    emitted: _Emitted,
) -> AttemptResult:
    try:
        with rollout_scope(context) as root:
            output = await call(agent, spec.task)
            emitted.is_scoring = reward is not None
            score = output if reward is None else await _score(reward, spec, output, context)
            found = _record_returned(spec, score, emitted)
            root.attributes["leyden.rewards"] = dict(emitted.names)
            if score is NO_REWARD:
                root.attributes["leyden.no_reward"] = True
    except DeadlineExceeded:
        return _unscored(spec, context) if emitted.is_scoring else _timed_out(spec, context)
    except BaseException as error:  # an agent that calls sys.exit() must not end the loop of all the others
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        return _failed(spec, context, error)
    if context.infrastructure_error is not None:  # the agent went on without an answer that we owed it
        return _failed(spec, context, context.infrastructure_error)
    return _result(
        spec,
        context,
        rewards=found,
        no_reward=score is NO_REWARD,
        output=None if reward is None else jsonable(output),
    )


async def _score(reward: RewardFunction, spec: RolloutSpec, output: object, context: RolloutContext) -> object:
    """Call the reward function; its failure is not the agent's and must not be trained as one.

    Raises:
        RewardError: the function raised.
    """
    try:
        return await call(reward, spec.task, output, context)
    except Exception as error:
        raise RewardError(
            f"rollout {spec.rollout_id!r}: the reward function raised {type(error).__name__}: {error}"
        ) from error


def _record_returned(spec: RolloutSpec, score: object, emitted: _Emitted) -> dict[str, float] | None:
    returned = named(score, where=f"rollout {spec.rollout_id!r}")
    for name, value in (returned or {}).items():
        emitted(Reward(rollout_id=spec.rollout_id, attempt=spec.attempt, name=name, value=value))
    if score is NO_REWARD:
        return None
    return dict(emitted.names) or None


def _failed(spec: RolloutSpec, context: RolloutContext, error: BaseException) -> AttemptResult:
    ours = context.infrastructure_error or _cause(error, (RolloutError, LostContextError))
    shown = ours or error
    return _result(
        spec,
        context,
        error=str(shown),
        error_type=type(shown).__name__,
        traceback="".join(traceback.format_exception(shown, limit=-12)),
        infrastructure=ours is not None,
    )


def _cause(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """Return the first of `kinds` among an error and its causes: clients wrap what their transport raises."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error


def _timed_out(spec: RolloutSpec, context: RolloutContext) -> AttemptResult:
    if context.infrastructure_error is not None:  # it waited for an answer that we owed it
        return _failed(spec, context, context.infrastructure_error)
    text = f"the agent took longer than timeout_seconds={spec.timeout_seconds!r}"
    return _result(spec, context, error=text, error_type="TimeoutError", timed_out=True)


def _unscored(spec: RolloutSpec, context: RolloutContext) -> AttemptResult:
    """Return that a finished agent has no reward: its function's slowness is not the agent's failure."""
    text = f"the reward function took longer than timeout_seconds={spec.timeout_seconds!r}; the agent had finished"
    return _result(spec, context, error=text, error_type=RewardError.__name__)


def _result(
    spec: RolloutSpec,
    context: RolloutContext,
    *,
    rewards: dict[str, float] | None = None,
    no_reward: bool = False,
    output: object = None,
    error: str | None = None,
    error_type: str | None = None,
    traceback: str | None = None,
    timed_out: bool = False,
    infrastructure: bool = False,
) -> AttemptResult:
    return AttemptResult(
        rollout_id=spec.rollout_id,
        attempt=spec.attempt,
        rewards=rewards,
        no_reward=no_reward,
        output=output,
        error=error,
        error_type=error_type,
        traceback=traceback,
        timed_out=timed_out,
        infrastructure=infrastructure,
        spoken_roles=dict(context.spoken_roles),
        declared_roles=sorted(context.declared_roles),
        finished_ns=now_ns(),
    )


async def _cancel(job: asyncio.Future[AttemptResult]) -> None:
    job.cancel()
    await asyncio.wait({job}, timeout=CANCEL_GRACE_SECONDS)
    if job.done() and not job.cancelled():
        job.exception()  # retrieved, so that asyncio does not report it again


def jsonable(value: object) -> object:
    """Return `value` when it is a JSON value, else its `repr`."""
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, msgspec.MsgspecError):
        return repr(value)
    return value
