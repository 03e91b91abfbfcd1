"""What a running algorithm sees of the trainer: sampling, transitions, updates, and the end of a step."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leyden import mdp
from leyden.credit import Credit
from leyden.errors import RolloutError
from leyden.interfaces import (
    AttemptResult,
    Group,
    Loss,
    RolloutRecords,
    TrainingRow,
    Transition,
)
from leyden.roles import Policy
from leyden.running.rollouts import refuse_all_failed
from leyden.spans import Checkpoint, Mode, Resource, Rollout, Update, new_id, now_ns
from leyden.training.evaluation import Evaluation, evaluation_of
from leyden.training.parts import Parts
from leyden.training.runfolder import PARTIAL, checkpoint_folder, drop_old_checkpoints


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, how much, how often."""

    total_steps: int
    tasks_per_step: int
    evaluate_every: int | None
    """Held-out evaluation every so many steps; `None`: only before and after."""
    checkpoint_every: int
    keep_checkpoints: int
    seed: int
    mask_overlong: bool = False


@dataclass
class Clock:
    """Seconds by phase of the step under way."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class TrainingSession:
    """Implements `leyden.interfaces.Session`."""

    def __init__(
        self,
        *,
        parts: Parts,
        policies: Sequence[Policy],
        tasks: Sequence[object],
        val_tasks: Sequence[object],
        schedule: Schedule,
        credit: Credit,
        folder: Path,
        versions: dict[str, int],
        first_step: int,
        report_step: Callable[[int, Mapping[str, float]], None],
        report_progress: Callable[[Mapping[str, object]], None],
    ) -> None:
        self.policies = policies
        self.total_steps = schedule.total_steps
        self.step = first_step - 1
        """The step under way; after `finish_step`, the last finished one."""
        self.versions = versions
        """Policy -> the version that samples now."""
        self.stop_requested = False
        self.evaluations: dict[int, Evaluation] = {}
        self._parts = parts
        self._tasks = tasks
        self._val_tasks = val_tasks
        self._schedule = schedule
        self._credit = credit
        self._folder = folder
        self._first_step = first_step
        self._report_step = report_step
        self._report_progress = report_progress
        self._saved_step = first_step - 1
        self._updated: dict[str, None] = {}
        """Policies with an optimizer step since the last publish, in order."""
        self._clock = Clock()

    @property
    def is_stopped_early(self) -> bool:
        """True when a stop was requested before the last step."""
        return self.stop_requested and self.step < self.total_steps

    async def steps(self) -> AsyncIterator[int]:
        """Yield the steps still to do; ends early, with a checkpoint, when a stop was requested."""
        for step in range(self._first_step, self.total_steps + 1):
            if self.stop_requested:
                break
            self.step = step
            yield step
        if self.step > self._saved_step:  # the stop came while the last step was being reported
            await self.checkpoint(self.step)

    async def sample(self, step: int, *, group_size: int) -> Sequence[Group]:
        """Run `group_size` rollouts of each of the step's tasks; stored ones are reused.

        Raises:
            RolloutError: every one of them failed.
        """
        groups = await self.sample_tasks(step, self.tasks_of(step), group_size=group_size)
        try:
            refuse_all_failed([one.rollout for group in groups for one in group.rollouts], self._parts.runner.tally)
        except RolloutError:
            await self.discard(step)
            raise
        return groups

    async def discard(self, step: int) -> None:
        """Leave the step's rollouts so far out: a resume samples it anew. They stay in the store, to be looked at."""
        times = await self._discarded(step)
        await self._parts.store.put_meta(_discarded_key(step), str(times + 1))

    async def _discarded(self, step: int) -> int:
        return int(await self._parts.store.get_meta(_discarded_key(step)) or 0)

    async def sample_tasks(self, step: int, indices: Sequence[int], *, group_size: int) -> Sequence[Group]:
        """Run `group_size` rollouts of each of these tasks as part of `step`."""
        started = time.monotonic()
        times = await self._discarded(step)
        prefix = f"s{step}.{times}" if times else f"s{step}"
        planned = [
            Rollout(
                rollout_id=f"{prefix}-t{index}-{sample}",
                task=self._tasks[index],
                task_id=f"t{index}",
                group_id=f"{prefix}-t{index}",
                mode=Mode.TRAIN,
                step=step,
            )
            for index in indices
            for sample in range(group_size)
        ]
        records = await self._run(planned, phase="rollouts")
        groups: dict[str, list[RolloutRecords]] = {}
        for one in records:
            groups.setdefault(one.rollout.group_id, []).append(one)
        self._clock.add("sample", time.monotonic() - started)
        return [Group(group_id=key, task=some[0].rollout.task, rollouts=some) for key, some in groups.items()]

    def tasks_of(self, step: int) -> Sequence[int]:
        """Return the indices of a step's tasks: a seeded shuffle of each pass, so that a step number is the cursor."""
        chosen: list[int] = []
        position = (step - 1) * self._schedule.tasks_per_step
        while len(chosen) < self._schedule.tasks_per_step:
            epoch, offset = divmod(position, len(self._tasks))
            order = list(range(len(self._tasks)))
            random.Random(f"{self._schedule.seed}/{epoch}").shuffle(order)
            taken = order[offset : offset + self._schedule.tasks_per_step - len(chosen)]
            chosen += taken
            position += len(taken)
        return list(dict.fromkeys(chosen))

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the policy's admitted transitions with their credit."""
        return [
            transition
            for group in groups
            for records in group.rollouts
            for transition in mdp.transitions(
                records, self.policies, credit=self._credit, mask_overlong=self._schedule.mask_overlong
            )
            if transition.policy == policy.name
        ]

    async def update(self, policy: Policy, batches: Sequence[Sequence[TrainingRow]], loss: Loss) -> Mapping[str, float]:
        """Take one optimizer step a batch, off the loop."""
        if not batches:
            return {}
        started = time.monotonic()
        metrics = await asyncio.to_thread(self._update, policy, batches, loss)
        self._clock.add("learn", time.monotonic() - started)
        return metrics

    def _update(self, policy: Policy, batches: Sequence[Sequence[TrainingRow]], loss: Loss) -> dict[str, float]:
        sums: dict[str, float] = {}
        rate = learning_rate(policy, self.step, self.total_steps)
        for rows in batches:
            found = dict(self._parts.learner.forward_backward(policy.name, rows, loss))
            found.update(self._parts.learner.optim_step(policy.name, rate))
            self._updated[policy.name] = None
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: value / len(batches) for name, value in sums.items()}

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Publish the new versions, enter the ledger, evaluate and checkpoint when due, report."""
        started = time.monotonic()
        updates = await self._publish(step, groups)
        self._clock.add("publish", time.monotonic() - started)
        found = dict(metrics)
        found["policy/updates"] = float(len(updates))
        if self._is_evaluation_due(step):
            started = time.monotonic()
            found.update(_flat(await self.evaluate(step)))
            self._clock.add("evaluate", time.monotonic() - started)
        if step % self._schedule.checkpoint_every == 0 or step == self.total_steps or self.stop_requested:
            started = time.monotonic()
            await self.checkpoint(step)
            self._clock.add("checkpoint", time.monotonic() - started)
        found.update({f"time/{phase}_seconds": seconds for phase, seconds in self._clock.seconds.items()})
        self._clock = Clock()
        self._report_step(step, found)

    def _is_evaluation_due(self, step: int) -> bool:
        """Say whether to evaluate between two steps; the last step's evaluation is the run's end."""
        every = self._schedule.evaluate_every
        return (
            bool(every and step % every == 0 and self._val_tasks)
            and step < self.total_steps
            and not self.stop_requested
        )

    async def _publish(self, step: int, groups: Sequence[Group]) -> Sequence[Update]:
        """Serve the updated policies' weights under new versions and write the ledger."""
        trained = [
            one.rollout.rollout_id for group in groups for one in group.rollouts if one.rollout.reward is not None
        ]
        updates: list[Update] = []
        for name in self._updated:
            version = await self._parts.store.next_version(name)
            await self._parts.gateway.hold()
            try:
                await self._parts.engine.publish(name, version, self._parts.learner.weights(name))
            finally:
                self._parts.gateway.release()
            self.versions[name] = version
            updates.append(
                Update(
                    update_id=new_id(),
                    policy=name,
                    step=step,
                    version=version,
                    rollout_ids=trained,
                    created_ns=now_ns(),
                )
            )
        self._updated.clear()
        await self._parts.store.add_updates(updates)
        await self._parts.store.put_resources(
            [Resource(kind="policy", name=u.policy, version=u.version, created_ns=u.created_ns) for u in updates]
        )
        return updates

    async def evaluate(self, step: int, tasks: Sequence[object] | None = None) -> Evaluation:
        """Run every held-out task once with the agent's own sampling."""
        chosen = self._val_tasks if tasks is None else tasks
        planned = [
            Rollout(
                rollout_id=f"e{step}-t{index}",
                task=task,
                task_id=f"v{index}",
                group_id=f"e{step}-t{index}",
                mode=Mode.EVALUATE,
                step=step,
            )
            for index, task in enumerate(chosen)
        ]
        evaluation = evaluation_of(step, await self._run(planned, phase="evaluation"))
        if tasks is None:
            self.evaluations[step] = evaluation
        return evaluation

    async def checkpoint(self, step: int) -> None:
        """Write weights, optimizer and RNG, then commit: a kill before the commit leaves the earlier one valid."""
        relative = checkpoint_folder(step)
        final = self._folder / relative
        partial = final.with_name(final.name + PARTIAL)
        await asyncio.to_thread(self._write_checkpoint, partial, final)
        await self._parts.store.commit_checkpoint(
            Checkpoint(
                checkpoint_id=new_id(),
                step=step,
                folder=relative,
                versions=dict(self.versions),
                created_ns=now_ns(),
            )
        )
        self._saved_step = step
        drop_old_checkpoints(self._folder, step, keep=self._schedule.keep_checkpoints)

    def _write_checkpoint(self, partial: Path, final: Path) -> None:
        for left in (partial, final):  # of a run that was killed before its commit
            if left.exists():
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        self._parts.learner.save(partial / "learner")
        for policy in self.policies:
            if policy.trainable:
                self._parts.learner.export(policy.name, partial / "policies" / policy.name)
        os.replace(partial, final)

    async def _run(self, planned: Sequence[Rollout], *, phase: str) -> Sequence[RolloutRecords]:
        done = 0
        started = time.monotonic()

        def finished(rollout: Rollout, result: AttemptResult) -> None:
            nonlocal done
            done += 1
            self._report_progress(
                {
                    "phase": phase,
                    "step": self.step,
                    "total_steps": self.total_steps,
                    "done": done,
                    "of": len(planned),
                    "phase_seconds": time.monotonic() - started,
                }
            )

        await self._parts.runner.run(planned, versions=self.versions, finished=finished)
        return await self._parts.store.records([rollout.rollout_id for rollout in planned])


def _discarded_key(step: int) -> str:
    return f"discarded/{step}"


def learning_rate(policy: Policy, step: int, total_steps: int) -> float:
    """Return the policy's learning rate at `step`: linear from its start value to its final fraction."""
    progress = (step - 1) / max(1, total_steps - 1)
    return policy.learning_rate * (1 - progress * (1 - policy.final_learning_rate_fraction))


def _flat(evaluation: Evaluation) -> dict[str, float]:
    return {f"evaluation/{name}": estimate.mean for name, estimate in evaluation.estimates().items()}
