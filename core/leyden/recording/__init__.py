"""Record a production app, without a trainer: `leyden.record("runs/production")`.

One idea: rollouts are recorded by the same wire and adapters as in training, and stored from a thread of their own.
What the app does is never waited for, changed or broken; what cannot be kept is counted.
One trap: this is the user's own process. Nothing here may raise into it once `record` has returned.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import inspect
import logging
import math
import os
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import msgspec

from leyden import wire
from leyden.context import RolloutContext, current, rollout_scope
from leyden.errors import ConfigurationError, RewardError
from leyden.instrumentation import end_use, is_instrumented, is_used, uninstrument, use
from leyden.interfaces import Outcome
from leyden.recording.finished import Finished, Redact
from leyden.recording.writing import Writer
from leyden.rewards import DEFAULT_REWARD, checked
from leyden.running.attempts import jsonable
from leyden.spans import Mode, Record, Reward, Rollout, RolloutState, new_id

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

TOO_LONG = "it had more records than most_records_a_rollout"
FORKED = "its process was forked while it ran"
FAILED = "recording it failed"


class Recording:
    """What an app does, recorded until `close`; a context manager. Made by `leyden.record`. Thread-safe."""

    def __init__(self, writer: Writer, *, sample: float, most_records_a_rollout: int) -> None:
        self._writer = writer
        self._sample = sample
        self._most_records = most_records_a_rollout
        self._is_closed = False
        self._was_instrumented = is_instrumented()
        use(self)
        atexit.register(self.close)

    @property
    def stored(self) -> int:
        """How many rollouts this process has stored."""
        return self._writer.stored

    @property
    def dropped(self) -> Mapping[str, int]:
        """Why rollouts were lost -> how many, in this process."""
        return dict(self._writer.dropped)

    def rollout(self, task: object = None, *, task_id: str | None = None) -> RecordedRollout:
        """Record what happens in a `with` block, sync or async, as one rollout.

        Inside another rollout it records nothing of its own: what happens there belongs to the outer one.

        Args:
            task: what was asked; a JSON value, or its `repr` is kept.
            task_id: rollouts of equal ids form a group; by default those of equal tasks do.
        """
        is_kept = not self._is_closed and self._sample > 0 and random.random() < self._sample
        return RecordedRollout(self._writer, task, task_id, is_kept=is_kept, most_records=self._most_records)

    def wrap(self, function: Function) -> Function:
        """Return a function, sync or async, each of whose calls is a rollout: task its arguments, output its result.

        Raises:
            ConfigurationError: it is a generator, whose rollout would end before its work does.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(
                f"{function!r} is a generator; put `with recording.rollout(task):` around the code that reads it"
            )
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004

            @functools.wraps(function)
            async def recorded_async(*given: Any, **named: Any) -> Any:
                with self.rollout(task_of(function, given, named)) as rollout:
                    rollout.output = await function(*given, **named)
                    return rollout.output

            return cast(Function, recorded_async)

        @functools.wraps(function)
        def recorded(*given: Any, **named: Any) -> Any:
            with self.rollout(task_of(function, given, named)) as rollout:
                rollout.output = function(*given, **named)
                return rollout.output

        return cast(Function, recorded)

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all finished rollouts are stored; say whether they are after `timeout` seconds."""
        return self._writer.flush(timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Store what waits and record nothing more; say whether all is stored after `timeout` seconds. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            atexit.unregister(self.close)
            end_use(self)
            if not self._was_instrumented and not is_used() and wire.default_routing() is None:
                uninstrument()
        return self._writer.close(timeout)

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RecordedRollout:
    """One rollout of a recorded app, while it runs."""

    def __init__(self, writer: Writer, task: object, task_id: str | None, *, is_kept: bool, most_records: int) -> None:
        self.rollout_id = new_id()
        """To attach rewards to later: `leyden.reward(rollout_id, ...)`."""
        self.output: object = None
        """What the app answered; set it for judges and for people."""
        self.is_recorded = is_kept
        """False for one that the share `sample` leaves out, or inside another rollout."""
        self._writer = writer
        self._task = task
        self._task_id = task_id
        self._most_records = most_records
        self._records: list[Record] = []
        self._is_too_long = False
        self._is_over = False
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._scope: AbstractContextManager[object] | None = None

    def reward(self, value: float, name: str = DEFAULT_REWARD, *, role: str | None = None) -> None:
        """Attach a reward while the rollout runs; one that is no finite number is logged and left out.

        Args:
            value: finite.
            name: weighted by `Trainer(reward_weights=...)`.
            role: credit this role's calls only.
        """
        try:
            number = checked(value, where=f"rollout {self.rollout_id!r}")
        except RewardError as error:
            log.warning("%s; it is left out", error)
            return
        if self._is_over:
            log.warning("rollout %r is over; use leyden.reward(rollout_id, value, store=...)", self.rollout_id)
            return
        self._take(Reward(rollout_id=self.rollout_id, attempt=1, name=name, value=number, target_role=role))

    def __enter__(self) -> RecordedRollout:
        frame = current()
        if self.is_recorded and frame is not None and frame.rollout is not None and not frame.rollout.is_closed:
            self.is_recorded = False
        if self.is_recorded:
            context = RolloutContext(rollout_id=self.rollout_id, attempt=1, mode=Mode.RECORDED, sink=self._take)
            self._scope = rollout_scope(context)
            self._scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._scope is None:
            return
        scope, self._scope = self._scope, None
        try:
            scope.__exit__(kind, error, traceback)
        except BaseException as raised:
            if raised is not error:
                self._failed(raised)
        try:
            self._end(error)
        except Exception as failure:
            self._failed(failure)

    def _take(self, record: Record) -> None:
        if self._process != os.getpid():  # in a forked child, where somebody who is not there may hold the lock
            return
        with self._lock:
            if self._is_over or self._is_too_long:
                return
            self._records.append(record)
            if len(self._records) > self._most_records:
                self._is_too_long = True
                self._records.clear()

    def _end(self, error: BaseException | None) -> None:
        if self._process != os.getpid():
            self._writer.drop(FORKED)
            return
        with self._lock:
            self._is_over = True
        if self._is_too_long:
            self._writer.drop(TOO_LONG)
            return
        task = jsonable(self._task)
        group = self._task_id or hashlib.sha256(msgspec.json.encode(task, order="sorted")).hexdigest()[:16]
        self._writer.put(
            Finished(
                rollout=Rollout(
                    rollout_id=self.rollout_id,
                    task=task,
                    task_id=group,
                    group_id=group,
                    mode=Mode.RECORDED,
                    step=0,
                ),
                records=latest_rewards(self._records),
                outcome=Outcome(
                    rollout_id=self.rollout_id,
                    attempt=1,
                    state=RolloutState.SUCCEEDED if error is None else RolloutState.FAILED,
                    output=jsonable(self.output),
                    error=None if error is None else str(error),
                    error_type=None if error is None else type(error).__name__,
                ),
            )
        )

    def _failed(self, error: BaseException) -> None:
        self._writer.drop(FAILED)
        log.warning("recording rollout %r failed: %s: %s", self.rollout_id, type(error).__name__, error)


def record(
    folder: str | Path,
    *,
    queue: int = 10_000,
    sample: float = 1.0,
    redact: Redact | None = None,
    most_records_a_rollout: int = 2_000,
) -> Recording:
    """Record an app's rollouts into a folder, to learn from them later; call it once, when the app starts.

    It never blocks the app, raises into it or changes what it does: finished rollouts wait in a bounded queue for a
    thread that stores them, and what finds no room is counted (`Recording.dropped`). Processes that record into one
    folder, such as a web server's workers, each have a store there. A rollout is stored when it ends; what a kill
    ends before that is lost.

    Args:
        folder: made when the first rollout is stored.
        queue: records (spans and rewards) of finished rollouts that may wait for the store.
        sample: share of the rollouts that are recorded.
        redact: returns a text as it may be stored; called by the storing thread with every text of tasks, messages,
            outputs and errors. A rollout for which it raises is dropped.
        most_records_a_rollout: longer rollouts are dropped.

    Raises:
        ConfigurationError: an option outside its range.
    """
    for name, value in (("queue", queue), ("most_records_a_rollout", most_records_a_rollout)):
        if value < 1:
            raise ConfigurationError(f"{name}={value!r} must be at least 1")
    if not (math.isfinite(sample) and 0 <= sample <= 1):
        raise ConfigurationError(f"sample={sample!r} must be a share between 0 and 1")
    writer = Writer(Path(folder), most_records=queue, redact=redact)
    return Recording(writer, sample=sample, most_records_a_rollout=most_records_a_rollout)


def task_of(function: Callable[..., object], given: tuple[object, ...], named: Mapping[str, object]) -> object:
    """Return what a function is asked: its only argument, or its arguments by name."""
    try:
        arguments = inspect.signature(function).bind(*given, **named).arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong with it
        return list(given)
    return next(iter(arguments.values())) if len(arguments) == 1 else dict(arguments)


def latest_rewards(records: list[Record]) -> list[Record]:
    """Return records with the last of several rewards that mean the same: a user may change their mind."""
    last = {reward_key(one): one for one in records if isinstance(one, Reward)}
    return [one for one in records if not isinstance(one, Reward) or last[reward_key(one)] is one]


def reward_key(reward: Reward) -> tuple[object, ...]:
    """Return what tells rewards of a rollout apart."""
    return reward.name, reward.target_role, reward.target_span, reward.index
