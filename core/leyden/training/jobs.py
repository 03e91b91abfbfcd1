"""What a trainer does: fit, evaluate, dev. Each opens the parts, does its work on them and closes them.

One trap: a run folder holds a run from the moment its `run.json` is written. From then on it is resumed, also when it
has no checkpoint yet: its stored rollouts are used again.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leyden.credit import Credit
from leyden.errors import ConfigurationError, LeydenError
from leyden.interfaces import Algorithm, Announces, RolloutRecords, Store, demands_of
from leyden.roles import check_roles
from leyden.running.agents import describe
from leyden.spans import FINISHED, Checkpoint, Mode, Rollout
from leyden.sqlite import SQLiteStore
from leyden.training import runfolder, summary
from leyden.training.evaluation import Evaluation
from leyden.training.measuring import Timing
from leyden.training.parts import Blueprint, Parts, opened
from leyden.training.preflight import preflight
from leyden.training.schedule import Schedule
from leyden.training.session import TrainingSession
from leyden.training.sinks import Sinks
from leyden.training.tasks import checked_tasks
from leyden.training.versions import Versions, checkable_weights


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the user asked for, checked."""

    blueprint: Blueprint
    algorithm: Algorithm
    tasks: Sequence[object]
    val_tasks: Sequence[object]
    schedule: Schedule
    credit: Credit
    sinks: Sinks


class Jobs:
    """The coroutines behind the trainer's methods."""

    def __init__(self, plan: Plan) -> None:
        self.session: TrainingSession | None = None
        """Of the fit under way; set its `stop_requested` to end it after its step."""
        self._plan = plan
        self._sinks = plan.sinks

    async def fit(self, folder: Path, steps: int, *, resume: bool) -> dict[str, object]:
        """Train until `steps` steps are done in all; return the summary.

        Raises:
            LeydenError: the program, configuration or machine must change; the message says how.
        """
        if steps < 1:
            raise ConfigurationError(f"steps must be at least 1, got {steps!r}")
        timing = Timing()
        runfolder.claim(folder, resume=resume)
        if resume and (found := _summary_of_finished(folder, steps)) is not None:
            self._sinks.notice(f"{folder} has all its {found['steps']} steps; ask for more to go on")
            return found
        async with opened(self._plan.blueprint, folder / runfolder.STORE) as parts:
            checkpoint = await parts.store.latest_checkpoint() if resume else None
            last = 0 if checkpoint is None else checkpoint.step
            if resume:
                await parts.store.reclaim()
                voided = await parts.store.void_updates_after(last)
                self._sinks.notice(
                    f"resuming after step {last}; {len(voided)} later updates are replayed from the store"
                )
            session = await self._new_session(parts, folder, checkpoint, total_steps=steps)
            if not resume:
                record = summary.run_record(self._plan.blueprint, algorithm=self._plan.algorithm)
                runfolder.write_json(folder / runfolder.RUN, {**self._info(folder, steps), **record})
            self._sinks.run_started(self._info(folder, steps))
            self.session = session
            try:
                await self._train(session, parts, timing, folder)
                result = await self._finish(session, parts, timing, folder, resumed_after=last if resume else None)
            finally:
                self.session = None
                await session.close()
        await asyncio.to_thread(self._sinks.run_finished, result)
        return result

    async def evaluate(self, folder: Path, tasks: Sequence[object] | None) -> Evaluation:
        """Run tasks, by default the held-out ones, with the latest checkpoint's weights; keep no records.

        Raises:
            ConfigurationError: there are no tasks.
        """
        if tasks is None and not self._plan.val_tasks:
            raise ConfigurationError("there is nothing to evaluate on: give Trainer(val_tasks=...) or evaluate(tasks)")
        chosen = self._plan.val_tasks if tasks is None else checked_tasks(tasks, name="tasks")
        checkpoint = await _latest_checkpoint(folder)
        with tempfile.TemporaryDirectory(prefix="leyden-evaluate-") as temporary:
            async with opened(self._plan.blueprint, Path(temporary) / runfolder.STORE) as parts:
                session = await self._new_session(parts, folder, checkpoint, total_steps=1)
                return await session.evaluate(session.step, chosen)

    async def dev(self, folder: Path, count: int) -> Sequence[RolloutRecords]:
        """Run the first `count` tasks with the base weights; keep no records."""
        with tempfile.TemporaryDirectory(prefix="leyden-dev-") as temporary:
            async with opened(self._plan.blueprint, Path(temporary) / runfolder.STORE) as parts:
                session = await self._new_session(parts, folder, None, total_steps=1)
                planned = [
                    Rollout(
                        rollout_id=f"dev-{index}",
                        task=task,
                        task_id=f"t{index}",
                        group_id=f"dev-{index}",
                        mode=Mode.DEV,
                        step=0,
                    )
                    for index, task in enumerate(self._plan.tasks[:count])
                ]
                await parts.runner.run(planned, versions=session.versions)
                tally = parts.runner.tally
                for line in check_roles(self._plan.blueprint.policies, tally.spoken, tally.declared):
                    self._sinks.notice(line)
                return await parts.store.records([rollout.rollout_id for rollout in planned])

    # ---- beginning ---------------------------------------------------------------------------------------------

    async def _new_session(
        self, parts: Parts, folder: Path, checkpoint: Checkpoint | None, *, total_steps: int
    ) -> TrainingSession:
        """Load the checkpoint, or the base, into learner and engine and go on from there."""
        plan, policies = self._plan, self._plan.blueprint.policies
        versions = {policy.name: 0 for policy in policies}
        if checkpoint is not None:
            await asyncio.to_thread(parts.learner.load, folder / checkpoint.folder / "learner")
            versions.update(checkpoint.versions)
        for policy in policies:
            if policy.trainable:
                weights = checkable_weights(parts.learner, policy.name)
                await parts.engine.publish(policy.name, versions[policy.name], weights)
        return TrainingSession(
            parts=parts,
            policies=policies,
            tasks=plan.tasks,
            val_tasks=plan.val_tasks,
            schedule=replace(plan.schedule, total_steps=total_steps),
            credit=plan.credit,
            folder=folder,
            versions=versions,
            published=Versions(await parts.store.updates(include_voided=True)),
            first_step=1 if checkpoint is None else checkpoint.step + 1,
            report_step=lambda step, metrics: self._sinks.step_finished(parts, step, metrics),
            report_progress=lambda info: self._sinks.progress(parts, info),
            notice=self._sinks.notice,
            prompts=plan.blueprint.prompts,
            checkpoint_folder=None if checkpoint is None else folder / checkpoint.folder,
        )

    def _info(self, folder: Path, steps: int) -> dict[str, object]:
        return {
            "run_folder": str(folder),
            "total_steps": steps,
            "tasks": len(self._plan.tasks),
            "val_tasks": len(self._plan.val_tasks),
            "tasks_per_step": self._plan.schedule.tasks_per_step,
            "max_staleness": self._plan.schedule.max_staleness,
            "group_size": self._plan.algorithm.group_size,
            "policies": {policy.name: list(policy.roles or ["*"]) for policy in self._plan.blueprint.policies},
        }

    # ---- the phases of a fit -----------------------------------------------------------------------------------

    async def _train(self, session: TrainingSession, parts: Parts, timing: Timing, folder: Path) -> None:
        for policy in session.policies:
            if policy.trainable and policy.freeze_after is not None and policy.freeze_after < session.total_steps:
                self._sinks.notice(
                    f"policy {policy.name!r} is trained up to step {policy.freeze_after} and goes on unchanged after it"
                )
        if isinstance(parts.learner, Announces):
            for line in parts.learner.notes():
                self._sinks.notice(line)
        is_untrained = session.step == 0
        demands = demands_of(self._plan.algorithm)
        if is_untrained and demands.trains and demands.runs_agent:
            await self._preflight(session, parts)
        count = len(self._plan.val_tasks)
        is_due = is_untrained or await _is_evaluated(parts.store, 0, count)  # a stored one is only read again
        if count and is_due and not session.stop_requested:
            await session.evaluate(0)
        parts.meter.step_fields()  # what came before is not the first step's
        timing.training_begins(parts.executor.usages())
        await self._plan.algorithm.run(session)
        timing.training_ends(parts.executor.usages())
        if session.is_stopped_early:
            self._sinks.notice(f"stopped after step {session.step}; go on with: leyden resume {folder}")

    async def _preflight(self, session: TrainingSession, parts: Parts) -> None:
        began = time.monotonic()
        plan = self._plan
        group = await session.first_group(plan.algorithm.group_size)
        transitions = [one for policy in session.policies for one in session.transitions([group], policy)]
        try:
            seconds = time.monotonic() - began
            lines = await session.with_learner(
                lambda: preflight(
                    group,
                    policies=session.policies,
                    transitions=transitions,
                    learner=parts.learner,
                    tally=parts.runner.tally,
                    agent=describe(plan.blueprint.agent),
                    seconds=seconds,
                    rollouts_to_come=session.total_steps * plan.algorithm.group_size * plan.schedule.tasks_per_step,
                )
            )
        except LeydenError:
            await session.discard(1, [group])
            raise
        for line in lines:
            self._sinks.notice(line)

    async def _finish(
        self, session: TrainingSession, parts: Parts, timing: Timing, folder: Path, *, resumed_after: int | None
    ) -> dict[str, object]:
        if self._plan.val_tasks and not session.is_stopped_early:
            await session.evaluate(session.step)
        store = parts.store
        result = summary.run_summary(
            folder=folder,
            checkpoint=await store.latest_checkpoint(),
            step=session.step,
            total_steps=session.total_steps,
            resumed_after=resumed_after,
            seed=self._plan.blueprint.seed,
            policies=session.policies,
            evaluations=session.evaluations,
            before=await _evaluated(store, 0),
            after=await _evaluated(store, session.step),
            rollouts=await store.rollouts(),
            updates=await store.updates(),
        )
        result |= parts.meter.fields() | timing.fields(parts.executor.usages())
        if parts.runner.group_rewards is not None:
            result["unscored_groups"] = len(parts.runner.group_rewards.unscored)
        runfolder.write_json(folder / runfolder.SUMMARY, result)
        return result


async def _evaluated(store: Store, step: int) -> Sequence[RolloutRecords]:
    rollouts = await store.rollouts(mode=Mode.EVALUATE, step=step)
    return await store.records([rollout.rollout_id for rollout in rollouts if rollout.state in FINISHED])


async def _is_evaluated(store: Store, step: int, count: int) -> bool:
    """Say whether the evaluation of `step` is complete in the store."""
    rollouts = await store.rollouts(mode=Mode.EVALUATE, step=step)
    return sum(rollout.state in FINISHED for rollout in rollouts) == count


async def _latest_checkpoint(folder: Path) -> Checkpoint | None:
    path = folder / runfolder.STORE
    if not path.exists():
        return None
    async with await SQLiteStore.open(path, read_only=True) as store:
        return await store.latest_checkpoint()


def _summary_of_finished(folder: Path, steps: int) -> dict[str, object] | None:
    """Return the summary of a run that came to its end with at least `steps` steps."""
    path = folder / runfolder.SUMMARY
    found = runfolder.read_json(path) if path.exists() else {}
    done = found.get("steps")
    return found if isinstance(done, int) and done >= steps and done == found.get("total_steps") else None
