"""What a running algorithm sees of the trainer: sampling, transitions, updates, and the end of a step."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from leyden import mdp
from leyden.credit import Credit
from leyden.demonstrations import Source, demonstrations
from leyden.errors import RolloutError
from leyden.interfaces import AttemptResult, Batch, Group, RolloutRecords, Tokenises, Transition
from leyden.metrics import over_batches
from leyden.roles import Policy
from leyden.running.rollouts import refuse_all_failed
from leyden.spans import Mode, Resource, Rollout, Update, new_id, now_ns
from leyden.training import checkpoints
from leyden.training.asynchronous import AsynchronousSampler, Rules
from leyden.training.evaluation import Evaluation, evaluation_of
from leyden.training.parts import Parts
from leyden.training.prompts import Prompts
from leyden.training.sampling import (
    Accept,
    Drawn,
    Sampler,
    Speakers,
    SynchronousSampler,
    drawn_before,
    names_of,
    stored_groups,
    write_names,
)
from leyden.training.schedule import Clock, Schedule, learning_rate
from leyden.training.sharing import Turns
from leyden.training.stored import groups_of
from leyden.training.uses import Uses
from leyden.training.versions import Versions, serve

Result = TypeVar("Result")


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
        published: Versions,
        first_step: int,
        report_step: Callable[[int, Mapping[str, float]], None],
        report_progress: Callable[[Mapping[str, object]], None],
        notice: Callable[[str], None],
        prompts: Mapping[str, str | None],
        checkpoint_folder: Path | None = None,
    ) -> None:
        """Go on from where the learner's weights, `versions` and `checkpoint_folder` stand; `notice` tells the user."""
        self.policies = policies
        self.tasks = tasks
        self.notice = notice
        self.total_steps = schedule.total_steps
        self.max_staleness = schedule.max_staleness
        self.step = first_step - 1
        """The step under way; after `finish_step`, the last finished one."""
        self.versions = versions
        """Policy -> the version that samples now."""
        self.stop_requested = False
        self.evaluations: dict[int, Evaluation] = {}
        self._parts = parts
        self._val_tasks = val_tasks
        self._schedule = schedule
        self._credit = credit
        self._folder = folder
        self._report_step = report_step
        self._report_progress = report_progress
        self._saved_step = first_step - 1
        self._updated: dict[str, None] = {}
        """Policies with an optimizer step since the last publish, in order."""
        self._published = published
        self._drawn = Drawn(groups=())
        """By the step under way."""
        self._uses = Uses(published)
        self._told: set[str] = set()
        """Why calls were left out of the demonstrations, as far as the user knows."""
        self._step_began = time.monotonic()
        self._turns = Turns(parts.engine, parts.learner)
        self._prompts = Prompts(
            prompts, store=parts.store, tasks=tasks, run=self._run_candidates, folder=checkpoint_folder
        )
        parts.runner.prompts = self._prompts.texts
        self._clock = Clock()
        self._sampler = self._new_sampler(tasks)

    def _new_sampler(self, tasks: Sequence[object]) -> Sampler:
        parts, schedule = self._parts, self._schedule
        if schedule.max_staleness == 0:
            return SynchronousSampler(
                parts.store,
                tasks=tasks,
                tasks_per_step=schedule.tasks_per_step,
                seed=schedule.seed,
                run=lambda rollouts, speakers: self._run(rollouts, phase="rollouts", speakers=speakers),
            )
        return AsynchronousSampler(
            parts.store,
            parts.runner,
            tasks=tasks,
            seed=schedule.seed,
            rules=Rules(
                tasks_per_step=schedule.tasks_per_step,
                total_steps=schedule.total_steps,
                max_staleness=schedule.max_staleness,
                most_rollouts=parts.most_rollouts,
            ),
            versions=self._published,
            serving=self.versions,
            is_stopping=lambda: self.stop_requested,
            finished=lambda done, of: self._report("rollouts", done, of, time.monotonic() - self._step_began),
        )

    @property
    def is_stopped_early(self) -> bool:
        """True when a stop was requested before the last step."""
        return self.stop_requested and self.step < self.total_steps

    async def steps(self, until: int | None = None) -> AsyncIterator[int]:
        """Yield the steps still to do; ends early, with a checkpoint, when a stop was requested."""
        for step in range(self.step + 1, (self.total_steps if until is None else until) + 1):
            if self.stop_requested:
                break
            self.step, self._step_began = step, time.monotonic()
            self._drawn = Drawn(groups=())
            self._uses.clear()
            yield step
        if self.step > self._saved_step:  # the stop came while the last step was being reported
            await self.checkpoint(self.step)

    async def sample(
        self,
        step: int,
        *,
        group_size: int,
        accept: Accept | None = None,
        most_batches: int = 1,
        speakers: Speakers | None = None,
    ) -> Sequence[Group]:
        """Return the step's groups, and record that it takes them; a step that was recorded takes the same again.

        Raises:
            RolloutError: every rollout failed.
        """
        started = time.monotonic()
        drawn = await drawn_before(self._parts.store, step)
        if drawn is None:
            drawn = await self._sampler.draw(
                step, group_size=group_size, accept=accept, most_batches=most_batches, speakers=speakers or {}
            )
            every = [*drawn.groups, *drawn.rejected]
            try:
                refuse_all_failed([one.rollout for group in every for one in group.rollouts], self._parts.runner.tally)
            except RolloutError:
                await self.discard(step, every)
                raise
            await write_names(self._parts.store, step, drawn)
        self._drawn = drawn
        self._clock.add("sample", time.monotonic() - started)
        return drawn.groups

    async def first_group(self, group_size: int) -> Group:
        """Return one group of the first step, sampled before any training."""
        return await self._sampler.first(group_size)

    async def discard(self, step: int, groups: Sequence[Group]) -> None:
        """Leave these groups of the step out: a resume samples others. They stay in the store, to be looked at."""
        await self._sampler.discard(step, groups)

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        """Return up to `count` groups that the last `max_age` steps have taken, drawn with the run's seed."""
        store = self._parts.store
        found: dict[str, Sequence[str]] = {}
        for earlier in range(max(1, step - max_age), step):
            if (names := await names_of(store, earlier)) is not None:
                found |= names.groups
        rng = random.Random(f"{self._schedule.seed}/replay/{step}")
        chosen = rng.sample(sorted(found), min(count, len(found)))
        groups = await stored_groups(store, {group_id: found[group_id] for group_id in chosen})
        self._uses.replay(groups)
        return groups

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the policy's admitted transitions with their credit."""
        found: list[Transition] = []
        for group in groups:
            own = [
                transition
                for records in group.rollouts
                for transition in mdp.transitions(
                    records,
                    self.policies,
                    credit=self._credit,
                    mask_overlong=self._schedule.mask_overlong,
                    reward_weights=self._parts.runner.reward_weights,
                )
                if transition.policy == policy.name
            ]
            self._uses.transitions(policy.name, group.group_id, own)
            found += own
        return found

    async def stored(self, source: str | Path) -> Sequence[Group]:
        """Return the finished rollouts of another run folder or store, which is only read.

        Raises:
            ConfigurationError: there is no store.
            StoreError: a file is none of Leyden's, or of a newer version.
        """
        return await groups_of(source, reward_weights=self._parts.runner.reward_weights)

    async def demonstrations(
        self, groups: Sequence[Group], policy: Policy, *, exact: bool = True
    ) -> Sequence[Transition]:
        """Return the calls of the policy's roles, whoever answered them; say once of each kind why calls are left out.

        Raises:
            ConfigurationError: calls must be tokenised anew and the engine cannot.
        """
        engine = self._parts.engine
        source = Source(
            policy=policy,
            policies=self.policies,
            tokenise=engine.tokenised if isinstance(engine, Tokenises) else None,
            exact=exact,
            most_tokens=engine.context_length,
        )
        found, unusable = await asyncio.to_thread(self._demonstrations, groups, source)
        for group in groups:
            self._uses.transitions(policy.name, group.group_id, ())
        for reason in unusable.keys() - self._told:
            self._told.add(reason)
            self.notice(
                f"{unusable[reason]} calls of policy {policy.name!r} cannot be imitated and are left out: {reason}"
            )
        return found

    def _demonstrations(self, groups: Sequence[Group], source: Source) -> tuple[list[Transition], Counter[str]]:
        found: list[Transition] = []
        unusable: Counter[str] = Counter()
        for records in (one for group in groups for one in group.rollouts):
            shown = demonstrations(
                records,
                source,
                credit=self._credit,
                mask_overlong=self._schedule.mask_overlong,
                reward_weights=self._parts.runner.reward_weights,
            )
            found += shown.transitions
            unusable += shown.unusable
        return found, unusable

    # ---- prompts -----------------------------------------------------------------------------------------------

    async def seed_prompts(self) -> Mapping[str, str]:
        """Return the prompts to improve as they are now; those that nobody told are read from rollouts."""
        return await self._prompts.seeds(self.versions)

    async def try_prompts(self, prompts: Mapping[str, str], tasks: Sequence[int]) -> Sequence[RolloutRecords]:
        """Run training tasks under these prompts, or take what the store has of it."""
        return await self._prompts.attempt(prompts, tasks, self.versions)

    async def is_tried(self, prompts: Mapping[str, str], tasks: Sequence[int]) -> Sequence[bool]:
        """Say of which of these tasks the store has the rollout."""
        return await self._prompts.is_tried(prompts, tasks, self.versions)

    async def publish_prompts(self, prompts: Mapping[str, str]) -> None:
        """Put prompts in force for every later rollout."""
        await self._prompts.publish(prompts)
        self._parts.runner.prompts = self._prompts.texts

    async def _run_candidates(self, planned: Sequence[Rollout], prompts: Mapping[str, str]) -> Sequence[RolloutRecords]:
        """Run candidates' rollouts; the algorithm itself shows how far its search is."""
        await self._turns.engine()
        await self._parts.runner.run(planned, versions=self.versions, prompts=prompts)
        return await self._parts.store.records([rollout.rollout_id for rollout in planned])

    async def get_note(self, key: str) -> str | None:
        """Return what `put_note` kept in the run's store."""
        return await self._parts.store.get_meta(f"note/{key}")

    async def put_note(self, key: str, value: str) -> None:
        """Keep a text in the run's store."""
        await self._parts.store.put_meta(f"note/{key}", value)

    def progress(self, phase: str, done: int, of: int) -> None:
        """Show how far the step under way is."""
        self._report(phase, done, of, time.monotonic() - self._step_began)

    # ---- transitions and updates -------------------------------------------------------------------------------

    def staleness(self, transition: Transition) -> int:
        """Return how many updates its policy has had since the transition was sampled."""
        return self._published.staleness(transition.policy, transition.version)

    async def logprobs(
        self, policy: Policy, transitions: Sequence[Transition], *, reference: bool = False
    ) -> Sequence[Sequence[float]]:
        """Return the answers' log-probabilities under the learner's weights now, or the base's."""
        learner = self._parts.learner
        return await self._learn(lambda: learner.logprobs(policy.name, mdp.samples(transitions), reference=reference))

    async def values(self, policy: Policy, transitions: Sequence[Transition]) -> Sequence[Sequence[float]]:
        """Return the value head's prediction before each answer token."""
        return await self._learn(lambda: self._parts.learner.values(policy.name, mdp.samples(transitions)))

    async def update(self, policy: Policy, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Take one optimizer step a batch; a policy that is frozen by now is left as it is."""
        if not batches or not policy.is_trained_at(self.step):
            return {}
        return await self._learn(lambda: self._update(policy, batches))

    async def _learn(self, work: Callable[[], Result]) -> Result:
        """Do work of the learner's on the clock."""
        started = time.monotonic()
        result = await self.with_learner(work)
        self._clock.add("learn", time.monotonic() - started)
        return result

    async def with_learner(self, work: Callable[[], Result]) -> Result:
        """Do work of the learner's off the loop, in its turn on the device."""
        await self._turns.learner()
        return await asyncio.to_thread(work)

    def _update(self, policy: Policy, batches: Sequence[Batch]) -> dict[str, float]:
        measured: list[Mapping[str, float]] = []
        rate = learning_rate(policy, self.step, self.total_steps)
        for batch in batches:
            found = dict(self._parts.learner.forward_backward(policy.name, batch))
            found.update(self._parts.learner.optim_step(policy.name, rate))
            self._updated[policy.name] = None
            measured.append(found)
        return over_batches(measured)

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Publish the new versions, enter the ledger, evaluate and checkpoint when due, report."""
        started = time.monotonic()
        updates = await self._publish(step, groups)
        self._clock.add("publish", time.monotonic() - started)
        self._sampler.step_finished(step)
        found = dict(metrics) | self._uses.metrics(self.policies)
        found["policy/updates"] = float(len(updates))
        found["groups/rejected"] = float(len(self._drawn.rejected))
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
        """Write the ledger, and serve the updated policies' weights under new versions."""
        updates = [
            Update(
                update_id=new_id(),
                policy=name,
                step=step,
                version=await self._parts.store.next_version(name),
                rollout_ids=self._uses.fresh_ids(groups),
                replayed_ids=self._uses.replayed_ids(name),
                created_ns=now_ns(),
            )
            for name in self._updated
        ]
        self._updated.clear()
        # First the ledger: rollouts that go on meanwhile may use a version the moment it is served, and no record may
        # name a version that the ledger does not know.
        await self._parts.store.add_updates(updates)
        await self._turns.engine()
        for update in updates:
            self._published.add(update)
            await serve(self._parts, update.policy, update.version)
            self.versions[update.policy] = update.version
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
        await checkpoints.write(
            self._parts,
            self._folder,
            step=step,
            policies=self.policies,
            versions=self.versions,
            prompts=self._prompts.in_force,
            keep=self._schedule.keep_checkpoints,
        )
        self._saved_step = step

    async def close(self) -> None:
        """End the rollouts that are still under way, which a resume goes on with; leave the engine awake."""
        await self._sampler.close()
        await self._turns.engine()

    async def _run(
        self, planned: Sequence[Rollout], *, phase: str, speakers: Speakers | None = None
    ) -> Sequence[RolloutRecords]:
        done = 0
        started = time.monotonic()

        def finished(rollout: Rollout, result: AttemptResult) -> None:
            nonlocal done
            done += 1
            self._report(phase, done, len(planned), time.monotonic() - started)

        await self._turns.engine()
        await self._parts.runner.run(planned, versions=self.versions, finished=finished, speakers=speakers)
        return await self._parts.store.records([rollout.rollout_id for rollout in planned])

    def _report(self, phase: str, done: int, of: int, seconds: float) -> None:
        self._report_progress(
            {
                "phase": phase,
                "step": self.step,
                "total_steps": self.total_steps,
                "done": done,
                "of": of,
                "phase_seconds": seconds,
            }
        )


def _flat(evaluation: Evaluation) -> dict[str, float]:
    return {f"evaluation/{name}": estimate.mean for name, estimate in evaluation.estimates().items()}
