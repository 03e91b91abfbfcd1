"""The ground that every method of prompt search stands on: trying candidates, the budget, the record, the winner.

One idea: a method only proposes. What it may spend, what is found in the store, which candidate wins and what is kept
of it is decided here, the same for all.
One trap: a search holds no state that a kill could lose. It is deterministic, so a resumed one is the same search from
its start, and finds its rollouts and reflections in the store; so nothing here may depend on time or on the order in
which work that is done side by side ends.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from leyden.errors import ConfigurationError, RolloutError
from leyden.interfaces import RolloutRecords, Session
from leyden.looping import together
from leyden.training.prompts import SEED_TASKS
from leyden_plugins.algorithms.prompt.over import SearchOver
from leyden_plugins.algorithms.prompt.record import SEARCHES, Candidate, SearchRecord, note_of
from leyden_plugins.algorithms.prompt.reflection import Message, Reflector
from leyden_plugins.algorithms.prompt.showing import calls_of

Prompts = Mapping[str, str]
"""Role -> system prompt."""
FEW = 4
"""Candidates; a budget for fewer is told to be small."""


class Method(Protocol):
    """Proposes prompts: what a search runs until its budget is spent."""

    async def improve(self, search: Search) -> None:
        """Propose candidates and `compare` those that are promising, from `search.seeds` on.

        Return when there is nothing left to try. `search` ends it from within by raising `SearchOver`; let that pass.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What prompts did on one task."""

    task: int
    score: float
    """Its reward; 0 without one."""
    records: RolloutRecords


@dataclass(frozen=True, kw_only=True)
class Split:
    """Tasks, by index, for two purposes: what improves candidates must not also judge them."""

    feedback: Sequence[int]
    selection: Sequence[int]


def split_tasks(tasks: Sequence[int], *, selection: float, seed: int) -> Split:
    """Draw the selection tasks, at least one, and leave at least one for feedback."""
    count = min(max(1, round(selection * len(tasks))), len(tasks) - 1)
    chosen = sorted(random.Random(f"{seed}/selection").sample(list(tasks), count))
    return Split(feedback=[one for one in tasks if one not in set(chosen)], selection=chosen)


class Search:
    """One search, in one step of a run."""

    def __init__(
        self,
        session: Session,
        *,
        step: int,
        method: str,
        seeds: Prompts,
        split: Split,
        budget: int,
        reflector: Reflector,
    ) -> None:
        """Begin; `open` reads what was spent before."""
        self.seeds = dict(seeds)
        self.split = split
        self.reflector = reflector
        self.record = SearchRecord(
            step=step,
            method=method,
            feedback=list(split.feedback),
            selection=list(split.selection),
            budget=budget,
        )
        self._session = session
        self._spent: set[tuple[str, int]] = set()
        """(candidate, task) of every rollout that was looked at."""
        self._unrewarded: set[tuple[str, int]] = set()
        self._step = step

    async def open(self, *, minibatch: int) -> None:
        """Count the rollouts in which prompts were read, check the budget, compare the seeds.

        Raises:
            ConfigurationError: the budget is too small to compare a single candidate.
            RolloutError: every rollout under the seeds failed.
        """
        self._check_budget(minibatch)
        searches = json.loads(await self._session.get_note(SEARCHES) or "[]")
        if self._step not in searches:
            await self._session.put_note(SEARCHES, json.dumps([*searches, self._step]))
        self._spent |= {(name_of(self.seeds), task) for task in await self._read_tasks()}
        [tried] = await self.evaluate([(self.seeds, self.split.selection)])
        if all(one.records.rollout.error is not None for one in tried):
            last = tried[-1].records.rollout
            raise RolloutError(
                f"all {len(tried)} rollouts under the prompts of now failed; the last with {last.error_type}: "
                f"{last.error}"
            )
        silent = [role for role in self.seeds if not any(calls_of(one.records, role) for one in tried)]
        if silent:
            self._session.notice(
                f"roles {silent!r} have spoken in none of {len(tried)} rollouts; where they stay silent, their prompts "
                "are not improved"
            )
        await self.add(self.seeds, parents=[], scores=[one.score for one in tried])

    def _check_budget(self, minibatch: int) -> None:
        """Refuse a budget that compares no candidate, and tell one that compares few."""
        budget, compared = self.record.budget, len(self.split.selection)
        need = 2 * compared + 2 * minibatch + SEED_TASKS
        if budget < need:
            raise ConfigurationError(
                f"budget={budget!r} is too small: comparing one candidate with the prompts of now takes up to {need} "
                f"rollouts ({compared} selection tasks for each, a minibatch of {minibatch} for each, {SEED_TASKS} to "
                "read the prompts); raise it, or lower selection="
            )
        most = (budget - compared) // (compared + 2 * minibatch)
        if most < FEW:
            self._session.notice(
                f"budget={budget!r} compares at most {most} candidates on {compared} selection tasks; more budget, a "
                "smaller selection= or fewer tasks would try more"
            )

    async def _read_tasks(self) -> list[int]:
        """Return the tasks whose rollouts showed what the roles' prompts are; a resume counts them alike."""
        key = f"{note_of(self._step)}/read"
        known = await self._session.get_note(key)
        if known is None:
            first = range(min(SEED_TASKS, len(self._session.tasks)))
            tried = await self._session.is_tried(self.seeds, first)
            known = json.dumps([task for task, is_there in zip(first, tried, strict=True) if is_there])
            await self._session.put_note(key, known)
        found: list[int] = json.loads(known)
        return found

    @property
    def left(self) -> int:
        """Return how many rollouts may still be looked at."""
        return self.record.budget - len(self._spent)

    def cost(self, prompts: Prompts, tasks: Sequence[int]) -> int:
        """Return how many of these rollouts would be new to this search."""
        return len({(name_of(prompts), task) for task in tasks} - self._spent)

    async def evaluate(self, items: Sequence[tuple[Prompts, Sequence[int]]]) -> list[list[Tried]]:
        """Try candidates on tasks, all at once.

        Raises:
            SearchOver: what is new of it would exceed the budget, or the user wants to stop.
        """
        wanted: dict[str, dict[int, None]] = {}
        prompts: dict[str, Prompts] = {}
        for candidate, tasks in items:
            name = name_of(candidate)
            prompts[name] = candidate
            wanted.setdefault(name, {}).update(dict.fromkeys(tasks))
        new = {(name, task) for name, tasks in wanted.items() for task in tasks} - self._spent
        if new:
            self._end_if_asked()
        if len(new) > self.left:
            raise SearchOver(f"{len(self._spent)} of its {self.record.budget} rollouts are spent")
        self._spent |= new
        found = await together([self._attempt(name, prompts[name], list(tasks)) for name, tasks in wanted.items()])
        by_name = dict(zip(wanted, found, strict=True))
        self.record.rollouts = len(self._spent)
        self._session.progress("search", len(self._spent), self.record.budget)
        return [[by_name[name_of(candidate)][task] for task in tasks] for candidate, tasks in items]

    async def _attempt(self, name: str, prompts: Prompts, tasks: Sequence[int]) -> dict[int, Tried]:
        records = await self._session.try_prompts(prompts, tasks)
        found: dict[int, Tried] = {}
        for task, one in zip(tasks, records, strict=True):
            reward = one.rollout.reward
            if reward is None:
                self._note_unrewarded(name, task, one)
            found[task] = Tried(task=task, score=reward or 0.0, records=one)
        return found

    def _note_unrewarded(self, name: str, task: int, records: RolloutRecords) -> None:
        if not self._unrewarded:
            why = f" ({records.rollout.error})" if records.rollout.error else ""
            self._session.notice(
                f"rollout {records.rollout.rollout_id!r} has no reward{why}; it and others like it count as 0"
            )
        self._unrewarded.add((name, task))
        self.record.unrewarded = len(self._unrewarded)

    async def reflect(self, questions: Sequence[Sequence[Message]]) -> list[str | None]:
        """Ask the reflection model several questions at once; `None` where it failed.

        Raises:
            SearchOver: its calls are spent, or the user wants to stop.
            ReflectionError: it failed several times in a row.
        """
        self._end_if_asked()
        return await self.reflector.answers(questions)

    async def compare(self, items: Sequence[tuple[Prompts, Sequence[int]]]) -> list[Candidate]:
        """Try candidates on all selection tasks and enter them; each comes with the numbers of its parents.

        Raises:
            SearchOver: that would exceed the budget, or the user wants to stop.
        """
        tried = await self.evaluate([(prompts, self.split.selection) for prompts, _ in items])
        return [
            await self.add(prompts, parents=parents, scores=[one.score for one in found])
            for (prompts, parents), found in zip(items, tried, strict=True)
        ]

    async def add(self, prompts: Prompts, *, parents: Sequence[int], scores: Sequence[float]) -> Candidate:
        """Enter a candidate with its scores on the selection tasks; one that is there already stays as it is."""
        record = self.record
        known = next((one for one in record.candidates if one.prompts == prompts), None)
        if known is not None:
            return known
        before = record.candidates[parents[0]].prompts if parents else prompts
        candidate = Candidate(
            number=len(record.candidates),
            parents=list(parents),
            changed=[role for role, text in prompts.items() if before[role] != text],
            prompts=dict(prompts),
            scores=list(scores),
            rollouts=len(self._spent),
        )
        record.candidates.append(candidate)
        await self.save()
        return candidate

    async def save(self) -> None:
        """Write the record."""
        record, spent = self.record, self.reflector.spent
        record.rollouts = len(self._spent)
        record.reflection_calls = spent.calls
        record.reflection_tokens = spent.prompt_tokens + spent.completion_tokens
        record.reflection_errors, record.last_error = spent.errors, spent.last_error
        await self._session.put_note(note_of(self._step), msgspec.json.encode(record).decode())

    async def finish(self, ended: str) -> None:
        """Put the winner's prompts in force if it beats what the roles said before, and write the record."""
        record = self.record
        best, seed = record.best, record.candidates[0]
        record.ended, record.winner = ended, best.number
        if best.number:
            changed = {role: text for role, text in best.prompts.items() if text != seed.prompts[role]}
            await self._session.publish_prompts(changed)
        await self.save()
        self._session.notice(
            f"the search ended: {ended}. "
            + (
                f"Candidate {best.number} is in force: {seed.score:.3f} -> {best.score:.3f}"
                if best.number
                else f"No candidate was better than the prompts of now ({seed.score:.3f})"
            )
            + f" on {len(self.split.selection)} selection tasks, after {record.rollouts} rollouts and "
            f"{record.reflection_calls} reflection calls"
        )

    def metrics(self) -> dict[str, float]:
        """Return what a step reports of its search."""
        record = self.record
        return {
            "prompts/score_before": record.candidates[0].score,
            "prompts/score_after": record.best.score,
            "prompts/candidates": float(len(record.candidates)),
            "prompts/rejected": float(record.rejected),
            "prompts/rollouts": float(record.rollouts),
            "prompts/unrewarded": float(record.unrewarded),
            "prompts/reflection_calls": float(record.reflection_calls),
            "prompts/reflection_tokens": float(record.reflection_tokens),
            "prompts/reflection_errors": float(record.reflection_errors),
        }

    def _end_if_asked(self) -> None:
        if self._session.stop_requested:
            raise SearchOver("you asked to stop")


def name_of(prompts: Prompts) -> str:
    """Return a name for prompts, in whatever order their roles stand."""
    return json.dumps(dict(prompts), sort_keys=True)
