"""What all algorithms that search for prompts have in common: their options, and the step they take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from leyden.errors import ConfigurationError
from leyden.interfaces import Demands, Session
from leyden.roles import Policy
from leyden_plugins.algorithms.prompt.over import SearchOver
from leyden_plugins.algorithms.prompt.record import note_of
from leyden_plugins.algorithms.prompt.reflection import Ask, Reflector
from leyden_plugins.algorithms.prompt.search import Search, split_tasks


@dataclass(frozen=True, kw_only=True)
class PromptSearch(ABC):
    """Searches for better prompts of the roles in `Trainer(prompts=...)`, in one step.

    Raises:
        ConfigurationError: an option outside its range.
    """

    reflection: Ask
    """The model that rewrites prompts: `Reflection("gpt-5")`, or a function of chat messages, sync or async."""
    budget: int = 600
    """Rollouts at most. Each runs one task once under one candidate; what repeats is found in the store."""
    selection: float = 0.5
    """Share of the tasks on which candidates are compared, drawn by `seed`; the others give feedback."""
    minibatch: int = 3
    """Feedback tasks that a proposal is made from."""
    hints: str = ""
    """What the reflection model should know beside what it sees: what the app is for, what a prompt must keep."""
    max_reflection_calls: int | None = None
    """Calls of the reflection model at most."""
    perfect: float | None = 1.0
    """The reward at which a rollout leaves nothing to improve; `None`: there is none."""
    tasks_from: Literal["all", "unsolved"] = "all"
    """`unsolved`: only tasks of which every training rollout of this run so far has failed (in a `Chain`, after RL)."""
    unsolved_reward: float = 0.0
    """The highest reward of a failure, for `tasks_from="unsolved"`."""
    seed: int = 0

    demands: ClassVar[Demands] = Demands(steps=1, trains=False, prompts=True, synchronous=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not callable(self.reflection):
            raise ConfigurationError(
                f"{name}: reflection={self.reflection!r} must be Reflection(model, base_url=...), or a function of "
                "chat messages that returns a text"
            )
        for option in ("budget", "minibatch"):
            if getattr(self, option) < 1:
                raise ConfigurationError(f"{name}: {option}={getattr(self, option)!r} must be at least 1")
        if self.max_reflection_calls is not None and self.max_reflection_calls < 1:
            raise ConfigurationError(
                f"{name}: max_reflection_calls={self.max_reflection_calls!r} must be at least 1, or None"
            )
        if not 0 < self.selection < 1:
            raise ConfigurationError(f"{name}: selection={self.selection!r} must be between 0 and 1")
        if self.tasks_from not in ("all", "unsolved"):
            raise ConfigurationError(f"{name}: tasks_from={self.tasks_from!r} must be 'all' or 'unsolved'")

    @property
    def group_size(self) -> int:
        """One rollout a candidate and task."""
        return 1

    def check(self, policies: Sequence[Policy]) -> None:
        """Find nothing to refuse: weights stay as they are."""
        return

    @abstractmethod
    async def improve(self, search: Search) -> None:
        """Propose candidates, as `Method` says."""

    async def run(self, session: Session) -> None:
        """Search, put the winner in force, finish the step."""
        async for step in session.steps():
            tasks = await self._tasks(session, step)
            metrics = {}
            if tasks:
                search = await self._open(session, step, tasks)
                try:
                    await self.improve(search)
                    ended = "there was nothing left to try"
                except SearchOver as over:
                    ended = str(over)
                await search.finish(ended)
                metrics = search.metrics()
            await session.finish_step(step, [], metrics)

    async def _open(self, session: Session, step: int, tasks: Sequence[int]) -> Search:
        split = split_tasks(tasks, selection=self.selection, seed=self.seed)
        search = Search(
            session,
            step=step,
            method=type(self).__name__,
            seeds=await session.seed_prompts(),
            split=split,
            budget=self.budget,
            reflector=Reflector(
                self.reflection,
                session,
                prefix=f"{note_of(step)}/reflection",
                most_calls=self.max_reflection_calls,
            ),
        )
        await search.open(minibatch=min(self.minibatch, len(split.feedback)))
        return search

    async def _tasks(self, session: Session, step: int) -> Sequence[int]:
        """Return the indices of the tasks to search on; none where there is nothing to do.

        Raises:
            ConfigurationError: there is a single task.
        """
        if self.tasks_from == "all":
            if len(session.tasks) < 2:
                raise ConfigurationError(
                    f"a search needs at least 2 tasks, one to improve prompts on and one to compare them on, got "
                    f"{len(session.tasks)}"
                )
            return range(len(session.tasks))
        solved: dict[int, bool] = {}
        for group in await session.replay(step, count=step * len(session.tasks), max_age=step):
            for one in group.rollouts:
                task = int(one.rollout.task_id.removeprefix("t"))
                reward = one.rollout.reward
                solved[task] = solved.get(task, False) or (reward is not None and reward > self.unsolved_reward)
        unsolved = sorted(task for task, is_solved in solved.items() if not is_solved)
        if len(unsolved) < 2:
            session.notice(f"{len(unsolved)} of {len(solved)} sampled tasks are unsolved: too few to search on")
            return ()
        session.notice(f"searching prompts on the {len(unsolved)} unsolved of {len(solved)} sampled tasks")
        return unsolved
