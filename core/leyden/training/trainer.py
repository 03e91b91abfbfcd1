"""The trainer: wires the parts, and shows, checkpoints, evaluates and reports a run.

It owns one loop on one thread, so `fit`, `evaluate` and `dev` work in scripts, notebooks and running loops alike.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from leyden.credit import Credit
from leyden.credit import check as check_credit
from leyden.errors import ConfigurationError, DatasetError
from leyden.interfaces import (
    Agent,
    Algorithm,
    Engine,
    GroupReward,
    Learner,
    MetricSink,
    RewardFunction,
    RolloutRecords,
    able_to_continue,
    demands_of,
)
from leyden.looping import Job, LoopThread
from leyden.plugins import Plugins, load_plugins
from leyden.rewards import DEFAULT_REWARD, check_weights
from leyden.roles import Policy, routes_for
from leyden.running.agents import PerRollout, as_agent, load_function
from leyden.running.foreign import interpreter
from leyden.running.group_rewards import later
from leyden.running.rollouts import RolloutRules
from leyden.running.worker import is_worker
from leyden.running.workers import GUARD_HINT
from leyden.show import span_tree
from leyden.stepwise import PerPolicy, Stepwise
from leyden.training import runfolder
from leyden.training.absent import NoEngine, NoLearner
from leyden.training.checks import check_demands, wanted_prompts
from leyden.training.evaluation import Evaluation
from leyden.training.jobs import Jobs, Plan
from leyden.training.parts import Blueprint
from leyden.training.schedule import Schedule
from leyden.training.sharing import check_turns
from leyden.training.sinks import Sinks
from leyden.training.tasks import checked_tasks

Result = TypeVar("Result")


class Trainer:
    """Trains chosen roles of an agent.

    Example:
        `leyden.Trainer(solve, tasks=train, policies=[Policy("sql", roles=["writer"])], engine=engine,
        algorithm=GRPO(group_size=8)).fit(steps=100)`
    """

    def __init__(
        self,
        agent: Agent | PerRollout | str | None,
        *,
        algorithm: Algorithm | Mapping[str, Stepwise],
        tasks: Sequence[object] = (),
        policies: Sequence[Policy] = (),
        engine: Engine | None = None,
        prompts: Mapping[str, str] | Sequence[str] = (),
        val_tasks: Sequence[object] = (),
        reward: RewardFunction | str | None = None,
        group_reward: GroupReward | str | None = None,
        reward_weights: Mapping[str, float] | None = None,
        tasks_per_step: int = 16,
        max_staleness: int = 0,
        run: str | os.PathLike[str] | None = None,
        workers: int = 1,
        concurrency: int = 64,
        python: str | os.PathLike[str] | None = None,
        timeout_seconds: float | None = 300.0,
        max_attempts: int = 3,
        failure_reward: float | None = 0.0,
        on_lost_context: str = "error",
        credit: str | Credit = "broadcast",
        mask_overlong: bool = False,
        exact_continuation: bool = False,
        evaluate_every: int | None = None,
        checkpoint_every: int = 10,
        keep_checkpoints: int = 2,
        learner: str | Learner = "torch",
        sinks: Sequence[str | MetricSink] = ("terminal", "jsonl", "report"),
        seed: int = 0,
    ) -> None:
        """Check everything that can be checked before anything is loaded.

        Args:
            agent: an async function, a sync function, or a class or `leyden.per_rollout(factory)` (one instance a
                rollout), called with a task; `leyden.Command([...])`; or the name `module:function` of one; `None`
                for an algorithm that runs nothing.
            algorithm: for example `GRPO(group_size=8)`; or one a policy, by the policies' names.
            tasks: what to train on; JSON values.
            policies: trainable weights and their roles; the first that matches a role takes it.
            engine: samples; it is not stopped by the trainer. Not needed without policies.
            prompts: roles whose system prompts an algorithm may improve, or role -> the prompt to begin with.
            val_tasks: held out; evaluated before and after, and `evaluate_every` steps.
            reward: (task, output, rollout) -> float or named floats, when the agent does not return its reward.
            group_reward: (task, rollouts of one group) -> one float, named floats or None a rollout, called in this
                process once they have ended; what the agent returns is then its output. Or its name `module:function`.
            reward_weights: name -> weight in the total; default: the reward named `reward` alone. Rewards of a role
                or a call are weighted likewise, those of other names count as they are.
            tasks_per_step: tasks a step, each run `group_size` times.
            max_staleness: updates of its policy that a sample may be behind when it is trained. 0 samples between two
                updates; above 0, sampling and learning go on side by side.
            run: folder of this run; default `runs/<time>`.
            workers: processes that run the agent; 0 runs it in this process.
            concurrency: rollouts at a time, in each process.
            python: the interpreter that runs the workers, where the agent's framework lives in an environment of its
                own; the agent is then given by name.
            timeout_seconds: of one attempt.
            max_attempts: after infrastructure failures.
            failure_reward: of a rollout whose agent raised or timed out; `None` drops it.
            on_lost_context: `error` or `pass`, for calls whose rollout is unknown.
            credit: a name from `leyden plugins`, or a function such as `leyden.credit.discounted(0.9)`.
            mask_overlong: drop samples that ended for length.
            exact_continuation: a call that goes on from an earlier one of its rollout and role begins with exactly
                the tokens that were sampled, whatever the chat template makes of an old answer.
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
        runner = None if agent is None else as_agent(agent)
        routes_for(policies)
        chosen = per_policy(algorithm) if isinstance(algorithm, Mapping) else algorithm
        demands = demands_of(chosen)
        wanted = wanted_prompts(prompts)
        if demands.trains and not any(policy.trainable for policy in policies):
            raise ConfigurationError("no policy is trainable; give at least one Policy(name, roles=[...])")
        check_demands(demands, agent=agent, has_engine=engine is not None, policies=policies, prompts=wanted)
        if agent is None and val_tasks:
            raise ConfigurationError("val_tasks are to be run, but there is no agent; give Trainer(agent, ...)")
        if demands.synchronous and max_staleness:
            raise ConfigurationError(
                f"{chosen!r} samples nothing ahead of a step, but max_staleness={max_staleness!r}; use 0"
            )
        if max_staleness < 0 or max_staleness % 1:
            raise ConfigurationError(f"max_staleness must be a whole number, 0 or more, got {max_staleness!r}")
        if tasks_per_step < 1 or checkpoint_every < 1 or keep_checkpoints < 1 or workers < 0 or concurrency < 1:
            raise ConfigurationError(
                f"tasks_per_step={tasks_per_step!r}, checkpoint_every={checkpoint_every!r}, "
                f"keep_checkpoints={keep_checkpoints!r} and concurrency={concurrency!r} must be at least 1, "
                f"workers={workers!r} at least 0"
            )
        engine = NoEngine() if engine is None else engine
        check_turns(engine, max_staleness)
        if exact_continuation:
            able_to_continue(engine)
        weights = dict(reward_weights or {DEFAULT_REWARD: 1.0})
        check_weights(weights)
        chosen.check(policies)
        self.run_folder = Path(run) if run else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        checked = checked_tasks(tasks, name="tasks", may_be_empty=not demands.runs_agent)
        if demands.runs_agent and demands.trains and tasks_per_step > len(checked):
            raise DatasetError(f"tasks_per_step={tasks_per_step!r} exceeds the {len(checked)} tasks")
        plugins = load_plugins()
        blueprint = Blueprint(
            agent=runner,
            reward=later if reward is None and group_reward is not None else reward,
            group_reward=load_function(group_reward) if isinstance(group_reward, str) else group_reward,
            policies=tuple(policies),
            engine=engine,
            learner=NoLearner() if not policies else as_learner(learner, plugins),
            plugins=plugins,
            rules=RolloutRules(
                timeout_seconds=timeout_seconds,
                max_attempts=max_attempts,
                failure_reward=failure_reward,
                reward_weights=weights,
                on_lost_context=on_lost_context,
                rewards_come_later=group_reward is not None,
            ),
            workers=workers,
            concurrency=concurrency,
            python=None if python is None else interpreter(python),
            seed=seed,
            exact_continuation=exact_continuation,
            prompts=wanted,
        )
        schedule = Schedule(
            total_steps=0,
            tasks_per_step=tasks_per_step,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            seed=seed,
            mask_overlong=mask_overlong,
            max_staleness=max_staleness,
        )
        self._jobs = Jobs(
            Plan(
                blueprint=blueprint,
                algorithm=chosen,
                tasks=checked,
                val_tasks=checked_tasks(val_tasks, name="val_tasks", may_be_empty=True),
                schedule=schedule,
                credit=check_credit(plugins.get("credit", credit) if isinstance(credit, str) else credit),
                sinks=Sinks(sinks, plugins),
            )
        )
        self.algorithm = chosen
        self._loop: LoopThread | None = None

    def fit(self, steps: int | None = None, *, resume: bool = False) -> dict[str, object]:
        """Train for `steps` steps in all; return the summary that is also in `summary.json`.

        Args:
            steps: total number of steps of the run, those before a resume included; an algorithm that knows itself how
                many it takes needs none.
            resume: go on from the run folder's latest checkpoint.

        Raises:
            LeydenError: the program, configuration or machine must change; the message says how.
        """
        return self._block(self._fit(steps, resume=resume))

    async def afit(self, steps: int | None = None, *, resume: bool = False) -> dict[str, object]:
        """Do what `fit` does, for awaiting in a running loop."""
        return await self._submit(self._fit(steps, resume=resume)).wait()

    def evaluate(self, tasks: Sequence[object] | None = None) -> Evaluation:
        """Run every held-out task once with the latest checkpoint's weights, or the base's before any training.

        Args:
            tasks: other ones than `val_tasks`.
        """
        return self._block(self._jobs.evaluate(self.run_folder, tasks))

    async def aevaluate(self, tasks: Sequence[object] | None = None) -> Evaluation:
        """Do what `evaluate` does, for awaiting in a running loop."""
        return await self._submit(self._jobs.evaluate(self.run_folder, tasks)).wait()

    def dev(self, count: int = 2) -> Sequence[RolloutRecords]:
        """Run a few rollouts, print their span trees, keep nothing: the first thing to do with a new agent."""
        records = self._block(self._jobs.dev(self.run_folder, count))
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

    async def _fit(self, steps: int | None, *, resume: bool) -> dict[str, object]:
        steps = self._steps(steps)
        asked = os.environ.pop(runfolder.RESUME_VARIABLE, None)  # once: a script may fit a second trainer
        if asked:
            self.run_folder, resume = Path(asked), True
            steps = int(os.environ.pop(runfolder.RESUME_STEPS_VARIABLE, steps))
        return await self._jobs.fit(self.run_folder, steps, resume=resume)

    def _steps(self, asked: int | None) -> int:
        """Return how many steps to take.

        Raises:
            ConfigurationError: neither the user nor the algorithm says, or they differ.
        """
        own = demands_of(self.algorithm).steps
        if own is None and asked is None:
            raise ConfigurationError(f"{self.algorithm!r} goes on for as long as it is told; say fit(steps=...)")
        if own is not None and asked not in (None, own):
            raise ConfigurationError(
                f"{self.algorithm!r} takes {own} steps, but fit was asked for {asked!r}; say fit()"
            )
        return own if asked is None else asked  # type: ignore[return-value]  # one of them is given

    def _submit(self, work: Coroutine[object, object, Result]) -> Job[Result]:
        if is_worker() or is_being_imported_by_worker():
            work.close()
            raise ConfigurationError(f"a Trainer was started while a worker imported this script. {GUARD_HINT}")
        if self._loop is None:
            self._loop = LoopThread("leyden-trainer")
        return self._loop.submit(work)

    def _block(self, work: Coroutine[object, object, Result]) -> Result:
        """Wait for work on the loop; the first Ctrl-C asks a run to stop after its step, the second one cancels."""
        job = self._submit(work)
        while True:
            try:
                return job.result()
            except KeyboardInterrupt:
                session = self._jobs.session
                if session is None or session.stop_requested:
                    job.cancel()
                    raise
                session.stop_requested = True
                print("\nFinishing what is under way, then a checkpoint; Ctrl-C again stops at once.", flush=True)


def as_learner(learner: str | Learner, plugins: Plugins) -> Learner:
    """Return a learner that was given by name or as an object."""
    if not isinstance(learner, str):
        return learner
    found: Learner = plugins.get("learner", learner)()
    return found


def per_policy(algorithms: Mapping[str, object]) -> PerPolicy:
    """Return the algorithm that improves each policy with its own.

    Raises:
        ConfigurationError: none is given, or one that does not go step by step.
    """
    stepwise = {name: one for name, one in algorithms.items() if isinstance(one, Stepwise)}
    if not algorithms or len(stepwise) < len(algorithms):
        raise ConfigurationError(
            f"algorithm={dict(algorithms)!r}: give each trainable policy, by its name, an algorithm that goes step by "
            "step, such as {'sql': GRPO(group_size=8)}"
        )
    return PerPolicy(stepwise)


def is_being_imported_by_worker() -> bool:
    """Say whether this is a child process that is still importing the parent's script."""
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))
