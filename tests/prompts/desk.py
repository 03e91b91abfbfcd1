"""A session without agent, store or server: tasks are letters, the roles' model and its editor are the example's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from examples.prompts import letters, model
from leyden.interfaces import Group, RolloutRecords
from leyden.spans import Kind, Mode, RolloutState, Span
from leyden.testing.records import a_reward, a_rollout, a_span
from leyden_plugins.algorithms.prompt import Candidate, PromptSearch, SearchRecord
from leyden_plugins.algorithms.prompt.record import note_of
from leyden_plugins.algorithms.prompt.reflection import Message

SEEDS = {"sorter": "You sort letters.", "writer": "You answer letters.", "checker": "You look at replies."}


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@dataclass
class Desk:
    """What `leyden.interfaces.Session` gives to a search."""

    tasks: Sequence[Any] = field(default_factory=lambda: letters.draw(16, seed=0))
    seeds: Mapping[str, str] = field(default_factory=lambda: dict(SEEDS))
    dies_at: int | None = None
    """The paid rollout at which the process is killed."""
    reward: Callable[[Mapping[str, str], int, float], float | None] = lambda prompts, task, score: score
    """Given prompts, task and score, the reward."""
    error: str | None = None
    """Of every rollout."""
    silent: Sequence[str] = ()
    """Roles that do not speak."""
    history: Sequence[Group] = ()
    """What earlier steps have sampled."""
    stop_after: int | None = None
    """Rollouts after which the user asks to stop."""

    def __post_init__(self) -> None:
        self.policies: Sequence[Any] = ()
        self.step, self.total_steps, self.max_staleness = 0, 1, 0
        self.stop_requested = False
        self.notes: dict[str, str] = {}
        self.store: dict[tuple[str, int], RolloutRecords] = {}
        self.paid: list[tuple[str, int]] = []
        """(candidate, task), in order."""
        self.published: list[dict[str, str]] = []
        self.finished: list[Mapping[str, float]] = []
        self.told: list[str] = []
        self.shown: list[tuple[str, int, int]] = []

    async def steps(self, until: int | None = None) -> AsyncIterator[int]:
        self.step = 1
        yield 1

    async def seed_prompts(self) -> Mapping[str, str]:
        return dict(self.seeds)

    async def try_prompts(self, prompts: Mapping[str, str], tasks: Sequence[int]) -> Sequence[RolloutRecords]:
        await asyncio.sleep(0)
        found = []
        for task in tasks:
            key = (msgspec.json.encode(dict(prompts), order="sorted").decode(), task)
            if key not in self.store:
                if self.dies_at is not None and len(self.paid) >= self.dies_at:
                    raise Killed
                self.paid.append(key)
                self.store[key] = self._run(prompts, task)
            found.append(self.store[key])
        self.stop_requested = self.stop_after is not None and len(self.paid) >= self.stop_after
        return found

    async def is_tried(self, prompts: Mapping[str, str], tasks: Sequence[int]) -> Sequence[bool]:
        name = msgspec.json.encode(dict(prompts), order="sorted").decode()
        return [(name, task) in self.store for task in tasks]

    async def publish_prompts(self, prompts: Mapping[str, str]) -> None:
        self.published.append(dict(prompts))

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        return self.history

    async def get_note(self, key: str) -> str | None:
        return self.notes.get(key)

    async def put_note(self, key: str, value: str) -> None:
        self.notes[key] = value

    def progress(self, phase: str, done: int, of: int) -> None:
        self.shown.append((phase, done, of))

    def notice(self, line: str) -> None:
        self.told.append(line)

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        self.finished.append(dict(metrics))

    @property
    def record(self) -> SearchRecord:
        """Return what the store keeps of the search."""
        return msgspec.json.decode(self.notes[note_of(1)], type=SearchRecord)

    def _run(self, prompts: Mapping[str, str], task: int) -> RolloutRecords:
        letter = self.tasks[task]
        name = f"r{len(self.paid)}"
        clock = itertools.count(1_000, 1_000)
        spans: list[Span] = []

        def ask(role: str, question: str) -> str:
            answer = model.desk(prompts[role], question)
            if role not in self.silent:
                spans.append(a_call(role, prompts[role], question, answer, rollout_id=name, start_ns=next(clock)))
            return answer

        state = {"queue": ask("sorter", f"Letter: {letter['letter']}")}
        state["reply"] = ask(
            "writer", f"Ticket: {letter['ticket']}\nQueue: {state['queue']}\nLetter: {letter['letter']}"
        )
        state["verdict"] = ask("checker", f"Letter: {letter['letter']}\nReply: {state['reply']}")
        scores = letters.score(letter, state, None)
        rollout = a_rollout(
            name,
            task=letter,
            task_id=f"t{task}",
            mode=Mode.SEARCH,
            state=RolloutState.FAILED if self.error else RolloutState.SUCCEEDED,
            reward=self.reward(prompts, task, scores["reward"]),
            output=state,
            error=self.error,
            error_type="AppError" if self.error else None,
        )
        rewards = [a_reward(name, name=part, value=value) for part, value in scores.items()]
        return RolloutRecords(rollout=rollout, spans=spans, completions=[], rewards=rewards)


def a_call(role: str, system: str, question: str, answer: str, **changes: object) -> Span:
    """Return the span of a model call."""
    attributes = {
        "gen_ai.input.messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "gen_ai.output.messages": [{"role": "assistant", "content": answer}],
    }
    fields = {"kind": Kind.MODEL_CALL, "role": role, "name": "chat", "attributes": attributes, **changes}
    return a_span(**fields)  # type: ignore[arg-type]  # the caller's fields


@dataclass
class Editor:
    """The example's editor as a function, for all three forms of question; it keeps what it was asked."""

    fails: Callable[[int], BaseException | None] = lambda number: None
    """Given the number of a question from 1, what is raised in place of an answer."""
    asked: list[str] = field(default_factory=list)

    async def __call__(self, messages: Sequence[Message]) -> str:
        question = messages[-1]["content"]
        self.asked.append(question)
        error = self.fails(len(self.asked))
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return answer_to(question)


def answer_to(question: str) -> str:
    """Return a prompt with one more rule, a critique that names one, or the prompt with the critique's."""
    if "Write a critique" in question:
        before, after = question.split("\n```\n", 1)[1].split("\n```", 1)[0], model.editor(question)
        return "\n".join(line for line in after.splitlines()[2:-1] if line not in before) or "Nothing is wrong."
    if "This is a critique of it" in question:
        prompt = question.partition("```\n")[2].partition("\n```")[0]
        critique = question.partition("on some tasks:\n\n")[2].partition("\n\nWrite the prompt")[0]
        return "\n".join(["```", prompt, critique, "```"])
    return model.editor(question)


def run(search: PromptSearch, desk: Desk) -> list[Candidate]:
    """Run a search; return its candidates."""
    asyncio.run(search.run(desk))  # type: ignore[arg-type]  # what a search needs of a session
    return desk.record.candidates
