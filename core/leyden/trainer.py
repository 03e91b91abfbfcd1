"""The trainer: wires the parts, and shows, checkpoints, evaluates and reports a run.

It owns one loop on one thread, so `fit`, `evaluate` and `dev` work in scripts, notebooks and running loops alike.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from leyden import runfolder, summary
from leyden.agents import PerRollout, check_agent, describe
from leyden.credit import Credit
from leyden.errors import ConfigurationError, DatasetError
from leyden.evaluation import Evaluation
from leyden.interfaces import (
    Agent,
    Algorithm,
    Engine,
    Learner,
    MetricSink,
    RewardFunction,
    RolloutRecords,
    Store,
)
from leyden.looping import LoopThread
from leyden.measuring import Timing
from leyden.parts import Blueprint, Parts, opened
from leyden.plugins import load_plugins
from leyden.preflight import preflight
from leyden.rewards import DEFAULT_REWARD, check_weights
from leyden.roles import Policy, check_roles, routes_for
from leyden.rollouts import RolloutRules
from leyden.session import Schedule, TrainingSession
from leyden.show import span_tree
from leyden.sinks import Sinks
from leyden.spans import FINISHED, Checkpoint, Mode, Rollout
from leyden.sqlite import SQLiteStore
from leyden.tasks import checked_tasks
from leyden.worker import is_worker
from leyden.workers import GUARD_HINT

Result = TypeVar("Result")


class Trainer:
    """Trains chosen roles of an agent.

    Example:
        `leyden.Trainer(solve, tasks=train, policies=[Policy("sql", roles=["writer"])], engine=engine,
        algorithm=GRPO(group_size=8)).fit(steps=100)`
    """

    def __init__(
        self,
        agent: Agent | PerRollout,
        *,
        tasks: Sequence[object],
        policies: Sequence[Policy],
        engine: Engine,
        algorithm: Algorithm,
        val_tasks: Sequence[object] = (),
        reward: RewardFunction | None = None,
        reward_weights: Mapping[str, float] | None = None,
        tasks_per_step: int = 16,
        run: str | os.PathLike[str] | None = None,
        workers: int = 1,
        concurrency: int = 64,
        timeout_seconds: float | None = 300.0,
        max_attempts: int = 3,
        failure_reward: float | None = 0.0,
        on_lost_context: str = "error",
        credit: str | Credit = "broadcast",
        mask_overlong: bool = False,
        evaluate_every: int | None = None,
        checkpoint_every: int = 10,
        keep_checkpoints: int = 2,
        learner: str | Learner = "torch",
        sinks: Sequence[str | MetricSink] = ("terminal", "jsonl", "report"),
        seed: int = 0,
    ) -> None:
        """Check everything that can be checked before anything is loaded.

        Args:
            agent: an async function, a sync function or `leyden.per_rollout(factory)`, called with a task.
            tasks: what to train on; JSON values.
            policies: trainable weights and their roles; the first that matches a role takes it.
            engine: samples; it is not stopped by the trainer.
            algorithm: for example `GRPO(group_size=8)`.
            val_tasks: held out; evaluated before and after, and `evaluate_every` steps.
            reward: (task, output, rollout) -> float or named floats, when the agent does not return its reward.
            reward_weights: name -> weight in the total; default: the reward named `reward` alone.
            tasks_per_step: tasks a step, each run `group_size` times.
            run: folder of this run; default `runs/<time>`.
            workers: processes that run the agent; 0 runs it in this process.
            concurrency: rollouts at a time, in each process.
            timeout_seconds: of one attempt.
            max_attempts: after infrastructure failures.
            failure_reward: of a rollout whose agent raised or timed out; `None` drops it.
            on_lost_context: `error` or `pass`, for calls whose rollout is unknown.
            credit: a name from `leyden plugins`, or a function.
            mask_overlong: drop samples that ended for length.
            evaluate_every: steps; `None` evaluates before and after only.
            checkpoint_every: steps.
            keep_checkpoints: newest ones kept.
            learner: a name from `leyden plugins`, or an object.
            sinks: names from `leyden plugins`, or objects.
            seed: of task order, sampling and mini-batches.

        Raises:
            ConfigurationError: an option, or a combination of options, that cannot work.
            DatasetError: tasks that are empty or not JSON values.
        """
        check_agent(agent)
        routes_for(policies)
        if not any(policy.trainable for policy in policies):
            raise ConfigurationError("no policy is trainable; give at least one Policy(name, roles=[...])")
        if tasks_per_step < 1 or checkpoint_every < 1 or keep_checkpoints < 1 or workers < 0 or concurrency < 1:
            raise ConfigurationError(
                f"tasks_per_step={tasks_per_step!r}, checkpoint_every={checkpoint_every!r}, "
                f"keep_checkpoints={keep_checkpoints!r} and concurrency={concurrency!r} must be at least 1, "
                f"workers={workers!r} at least 0"
            )
        weights = dict(reward_weights or {DEFAULT_REWARD: 1.0})
        check_weights(weights)
        algorithm.check(policies)
        self.run_folder = Path(run) if run else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        self._tasks = checked_tasks(tasks, name="tasks")
        self._val_tasks = checked_tasks(val_tasks, name="val_tasks", may_be_empty=True)
        if tasks_per_step > len(self._tasks):
            raise DatasetError(f"tasks_per_step={tasks_per_step!r} exceeds the {len(self._tasks)} tasks")
        plugins = load_plugins()
        self._policies, self._engine, self._algorithm, self._seed = tuple(policies), engine, algorithm, seed
        self._credit: Credit = plugins.get("credit", credit) if isinstance(credit, str) else credit
        self._learner: Learner = plugins.get("learner", learner)() if isinstance(learner, str) else learner
        self._sinks = Sinks(sinks, plugins)
        self._blueprint = Blueprint(
            agent=agent,
            reward=reward,
            policies=self._policies,
            engine=engine,
            learner=self._learner,
            plugins=plugins,
            rules=RolloutRules(
                timeout_seconds=timeout_seconds,
                max_attempts=max_attempts,
                failure_reward=failure_reward,
                reward_weights=weights,
                on_lost_context=on_lost_context,
            ),
            workers=workers,
            concurrency=concurrency,
            seed=seed,
        )
        self._schedule = Schedule(
            total_steps=0,
            tasks_per_step=tasks_per_step,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            seed=seed,
            mask_overlong=mask_overlong,
        )
        self._loop: LoopThread | None = None
        self._session: TrainingSession | None = None

    def fit(self, steps: int, *, resume: bool = False) -> dict[str, object]:
        """Train for `steps` steps in all; return the summary that is also in `summary.json`.

        Args:
            steps: total number of steps of the run, those before a resume included.
            resume: go on from the run folder's latest checkpoint.

        Raises:
            LeydenError: the program, configuration or machine must change; the message says how.
        """
        return self._block(self._fit(steps, resume))

    async def afit(self, steps: int, *, resume: bool = False) -> dict[str, object]:
        """Do what `fit` does, for awaiting in a running loop."""
        return await asyncio.wrap_future(self._loop_thread().submit(self._fit(steps, resume)))

    def evaluate(self, tasks: Sequence[object] | None = None) -> Evaluation:
        """Run every held-out task once with the latest checkpoint's weights, or the base's before any training.

        Args:
            tasks: other ones than `val_tasks`.
        """
        return self._block(self._evaluate(tasks))

    async def aevaluate(self, tasks: Sequence[object] | None = None) -> Evaluation:
        """Do what `evaluate` does, for awaiting in a running loop."""
        return await asyncio.wrap_future(self._loop_thread().submit(self._evaluate(tasks)))

    def dev(self, count: int = 2) -> Sequence[RolloutRecords]:
        """Run a few rollouts, print their span trees, keep nothing: the first thing to do with a new agent."""
        records = self._block(self._dev(count))
        for one in records:
            print(span_tree(one))
        return records

    def close(self) -> None:
        """End the trainer's thread. The engine is yours and goes on."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _loop_thread(self) -> LoopThread:
        if is_worker() or is_being_imported_by_worker():
            raise ConfigurationError(f"a Trainer was started while a worker imported this script. {GUARD_HINT}")
        if self._loop is None:
            self._loop = LoopThread("leyden-trainer")
        return self._loop

    def _block(self, work: Coroutine[object, object, Result]) -> Result:
        """Wait for work on the loop; the first Ctrl-C asks a run to stop after its step, the second one cancels."""
        try:
            future = self._loop_thread().submit(work)
        except ConfigurationError:
            work.close()
            raise
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                session = self._session
                if session is None or session.stop_requested:
                    future.cancel()
                    raise
                session.stop_requested = True
                print("\nFinishing this step, then a checkpoint; Ctrl-C again stops at once.", flush=True)

    # ---- the parts -----------------------------------------------------------------------------------------------

    async def _restore(self, parts: Parts, checkpoint: Checkpoint | None) -> dict[str, int]:
        """Load a checkpoint into learner and engine; return the policies' versions."""
        versions = {policy.name: 0 for policy in self._policies}
        if checkpoint is not None:
            folder = self.run_folder / checkpoint.folder / "learner"
            await asyncio.to_thread(self._learner.load, folder)
            versions.update(checkpoint.versions)
        for policy in self._policies:
            if policy.trainable:
                await parts.engine.publish(policy.name, versions[policy.name], self._learner.weights(policy.name))
        return versions

    def _new_session(self, parts: Parts, schedule: Schedule, versions: dict[str, int], first: int) -> TrainingSession:
        return TrainingSession(
            parts=parts,
            policies=self._policies,
            tasks=self._tasks,
            val_tasks=self._val_tasks,
            schedule=schedule,
            credit=self._credit,
            folder=self.run_folder,
            versions=versions,
            first_step=first,
            report_step=lambda step, metrics: self._sinks.step_finished(parts, step, metrics),
            report_progress=lambda info: self._sinks.progress(parts, info),
        )

    # ---- the jobs ----------------------------------------------------------------------------------------------

    async def _fit(self, steps: int, resume: bool) -> dict[str, object]:
        asked = os.environ.get(runfolder.RESUME_VARIABLE)
        if asked:
            self.run_folder, resume = Path(asked), True
            steps = int(os.environ.get(runfolder.RESUME_STEPS_VARIABLE, steps))
        if steps < 1:
            raise ConfigurationError(f"steps must be at least 1, got {steps!r}")
        timing = Timing()
        runfolder.claim(self.run_folder, resume=resume)
        async with opened(self._blueprint, self.run_folder / runfolder.STORE) as parts:
            store = parts.store
            checkpoint = await store.latest_checkpoint() if resume else None
            last = 0 if checkpoint is None else checkpoint.step
            if resume:
                await store.reclaim()
                voided = await store.void_updates_after(last)
                self._sinks.notice(
                    f"resuming after step {last}; {len(voided)} later updates are replayed from the store"
                )
            versions = await self._restore(parts, checkpoint)
            schedule = replace(self._schedule, total_steps=steps)
            session = self._session = self._new_session(parts, schedule, versions, last + 1)
            if not resume:
                record = summary.run_record(self._blueprint, algorithm=self._algorithm)
                runfolder.write_json(self.run_folder / runfolder.RUN, {**self._run_info(steps), **record})
            self._sinks.run_started(self._run_info(steps))
            try:
                await self._train(session, parts, timing, resumed=resume)
                found = await self._finish(session, parts, timing)
            finally:
                self._session = None
        await asyncio.to_thread(self._sinks.run_finished, found)
        return found

    async def _train(self, session: TrainingSession, parts: Parts, timing: Timing, *, resumed: bool) -> None:
        if not resumed:
            await self._preflight(session, parts)
        untrained = session.step == 0
        if self._val_tasks and (untrained or await _is_evaluated(parts.store, 0, len(self._val_tasks))):
            await session.evaluate(0)
        parts.meter.step_fields()  # what came before is not the first step's
        timing.training_begins(parts.executor.usages())
        await self._algorithm.run(session)
        timing.training_ends(parts.executor.usages())
        if session.stop_requested and session.step < session.total_steps:
            self._sinks.notice(f"stopped after step {session.step}; go on with: leyden resume {self.run_folder}")

    async def _preflight(self, session: TrainingSession, parts: Parts) -> None:
        began = time.monotonic()
        groups = await session.sample_tasks(1, session.tasks_of(1)[:1], group_size=self._algorithm.group_size)
        size = self._algorithm.group_size * self._schedule.tasks_per_step
        transitions = [one for policy in self._policies for one in session.transitions(groups, policy)]
        lines = await asyncio.to_thread(
            preflight,
            groups[0],
            policies=self._policies,
            transitions=transitions,
            learner=self._learner,
            tally=parts.runner.tally,
            agent=describe(self._blueprint.agent),
            seconds=time.monotonic() - began,
            rollouts_to_come=session.total_steps * size,
        )
        for line in lines:
            self._sinks.notice(line)

    async def _finish(self, session: TrainingSession, parts: Parts, timing: Timing) -> dict[str, object]:
        if self._val_tasks:
            await session.evaluate(session.step)
        latest = await parts.store.latest_checkpoint()
        found = summary.run_summary(
            folder=self.run_folder,
            checkpoint=latest,
            step=session.step,
            seed=self._seed,
            policies=self._policies,
            evaluations=session.evaluations,
            before=await self._evaluated(parts.store, 0),
            after=await self._evaluated(parts.store, session.step),
            tally=parts.runner.tally,
        )
        found |= parts.meter.fields() | timing.fields(parts.executor.usages())
        runfolder.write_json(self.run_folder / runfolder.SUMMARY, found)
        return found

    async def _evaluated(self, store: Store, step: int) -> Sequence[RolloutRecords]:
        rollouts = await store.rollouts(mode=Mode.EVALUATE, step=step)
        return await store.records([rollout.rollout_id for rollout in rollouts if rollout.state in FINISHED])

    async def _evaluate(self, tasks: Sequence[object] | None) -> Evaluation:
        chosen = self._val_tasks if tasks is None else checked_tasks(tasks, name="tasks")
        checkpoint = await self._latest_checkpoint()
        with tempfile.TemporaryDirectory(prefix="leyden-evaluate-") as folder:
            async with opened(self._blueprint, Path(folder) / runfolder.STORE) as parts:
                versions = await self._restore(parts, checkpoint)
                session = self._new_session(parts, replace(self._schedule, total_steps=1), versions, 1)
                return await session.evaluate(0 if checkpoint is None else checkpoint.step, chosen)

    async def _latest_checkpoint(self) -> Checkpoint | None:
        path = self.run_folder / runfolder.STORE
        if not path.exists():
            return None
        store = await SQLiteStore.open(path, read_only=True)
        try:
            return await store.latest_checkpoint()
        finally:
            await store.close()

    async def _dev(self, count: int) -> Sequence[RolloutRecords]:
        with tempfile.TemporaryDirectory(prefix="leyden-dev-") as folder:
            async with opened(self._blueprint, Path(folder) / runfolder.STORE) as parts:
                versions = await self._restore(parts, None)
                planned = [
                    Rollout(
                        rollout_id=f"dev-{index}",
                        task=task,
                        task_id=f"t{index}",
                        group_id=f"dev-{index}",
                        mode=Mode.DEV,
                        step=0,
                    )
                    for index, task in enumerate(self._tasks[:count])
                ]
                await parts.runner.run(planned, versions=versions)
                tally = parts.runner.tally
                for line in check_roles(self._policies, tally.spoken, tally.declared):
                    self._sinks.notice(line)
                return await parts.store.records([rollout.rollout_id for rollout in planned])

    # ---- telling -----------------------------------------------------------------------------------------------

    def _run_info(self, steps: int) -> dict[str, object]:
        return {
            "run_folder": str(self.run_folder),
            "total_steps": steps,
            "tasks": len(self._tasks),
            "val_tasks": len(self._val_tasks),
            "tasks_per_step": self._schedule.tasks_per_step,
            "group_size": self._algorithm.group_size,
            "policies": {policy.name: list(policy.roles or ["*"]) for policy in self._policies},
        }


async def _is_evaluated(store: Store, step: int, count: int) -> bool:
    """Say whether the evaluation of `step` is complete in the store."""
    rollouts = await store.rollouts(mode=Mode.EVALUATE, step=step)
    return sum(rollout.state in FINISHED for rollout in rollouts) == count


def is_being_imported_by_worker() -> bool:
    """Say whether this is a child process that is still importing the parent's script."""
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))
