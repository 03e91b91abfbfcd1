"""A support desk: one clerk, or three roles in a row, whose models know an answer only where the prompt has its rule.

The clerk has five rules and each task needs two of them. The three roles have two rules each and know one value
without; the router hears only what the reader has read, so one role's prompt alone can win a third of the score.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.prompt_tasks.problem import Ask, Message, Problem, Task, is_noisy, record, records, text_of

UNSURE = "unsure"


@dataclass(frozen=True)
class Rule:
    """Where a field has this value, that is the right answer."""

    field: str
    value: str
    answer: str
    right: str
    is_known: bool = False
    """The model needs no line in its prompt for it."""

    @property
    def line(self) -> str:
        """Return what a prompt must say."""
        return f"When the {self.field} is {self.value}, answer with the {self.answer} {self.right}."


@dataclass(frozen=True)
class Role:
    """Hears records with one label and answers with records of another."""

    opening: str
    hears: str
    says: str
    rules: Sequence[Rule]

    def answers(self, system: str, heard: str) -> dict[str, str]:
        """Return the fields of the answer to a record."""
        lines = set(system.splitlines())
        said: dict[str, str] = {}
        for task, fields in records(self.hears, heard).items():
            noisy = is_noisy(system, task)
            for rule in self.rules:
                said.setdefault(rule.answer, UNSURE)
                if fields.get(rule.field) == rule.value and (rule.is_known or rule.line in lines) and not noisy:
                    said[rule.answer] = rule.right
        return said

    def missing(self, text: str) -> list[str]:
        """Return the line for every wrong answer in a text."""
        said = records(self.says, text)
        return [
            rule.line
            for task, fields in records(self.hears, text).items()
            for rule in self.rules
            if task in said and fields.get(rule.field) == rule.value and said[task].get(rule.answer) != rule.right
        ]


CLERK = Role(
    "You answer support tickets.",
    "ticket",
    "answer",
    [
        Rule("topic", "refund", "queue", "BILLING"),
        Rule("topic", "password", "queue", "ACCOUNT"),
        Rule("topic", "crash", "queue", "BUGS"),
        Rule("mood", "angry", "tone", "sorry"),
        Rule("mood", "calm", "tone", "brief"),
    ],
)
READER = Role(
    "You read letters and name their topic.",
    "letter",
    "topic",
    [
        Rule("word", "refund", "topic", "refund", is_known=True),
        Rule("word", "kennwort", "topic", "password"),
        Rule("word", "plantage", "topic", "crash"),
    ],
)
ROUTER = Role(
    "You choose the queue for a topic.",
    "case",
    "queue",
    [
        Rule("topic", "refund", "queue", "BILLING", is_known=True),
        Rule("topic", "password", "queue", "ACCOUNT"),
        Rule("topic", "crash", "queue", "BUGS"),
    ],
)
WRITER = Role(
    "You write the first line of a reply.",
    "customer",
    "reply",
    [
        Rule("mood", "calm", "tone", "brief", is_known=True),
        Rule("mood", "angry", "tone", "sorry"),
        Rule("mood", "worried", "tone", "kind"),
    ],
)
QUEUES = {rule.value: rule.right for rule in ROUTER.rules}
TOPICS = {rule.value: rule.right for rule in READER.rules}


async def say(ask: Ask, name: str, role: Role, task: str, **fields: str) -> dict[str, str]:
    """Ask a role about a record; return the fields of its answer."""
    reply = await ask(name, [{"role": "user", "content": record(role.hears, task, **fields)}])
    return records(role.says, text_of(reply)).get(task, {})


def correct(role: Role, heard: Mapping[str, str], said: Mapping[str, str]) -> float:
    """Return the share of the answer's fields that are right."""
    asked = [rule for rule in role.rules if heard.get(rule.field) == rule.value]
    return sum(said.get(rule.answer) == rule.right for rule in asked) / max(1, len(asked))


async def one_clerk(task: Task, ask: Ask) -> float:
    """Answer a ticket."""
    heard = {"topic": task["topic"], "mood": task["mood"]}
    return correct(CLERK, heard, await say(ask, "clerk", CLERK, task["id"], **heard))


async def three_roles(task: Task, ask: Ask) -> float:
    """Read a letter, choose its queue by what was read, and write; a third of the score each."""
    read = (await say(ask, "reader", READER, task["id"], word=task["word"])).get("topic", UNSURE)
    routed = (await say(ask, "router", ROUTER, task["id"], topic=read)).get("queue", UNSURE)
    written = (await say(ask, "writer", WRITER, task["id"], mood=task["mood"])).get("tone", UNSURE)
    topic = TOPICS[task["word"]]
    tones = {rule.value: rule.right for rule in WRITER.rules}
    return ((read == topic) + (routed == QUEUES[topic]) + (written == tones[task["mood"]])) / 3


def problem(name: str, title: str, roles: Mapping[str, Role], fields: Mapping[str, Sequence[str]]) -> Problem:
    """Return a desk of these roles; tasks draw each field's value."""

    def tasks(seed: int, group: str, count: int) -> list[Task]:
        rng = random.Random(f"{name}/{seed}/{group}")
        return [
            {"id": f"{group}{seed}n{index}", **{field: rng.choice(values) for field, values in fields.items()}}
            for index in range(count)
        ]

    def answer(role: str, system: str, messages: Sequence[Message], has_tools: bool) -> Message:
        heard = text_of(messages[-1])
        task = next(iter(records(roles[role].hears, heard)), "none")
        content = record(roles[role].says, task, **roles[role].answers(system, heard))
        return {"role": "assistant", "content": content}

    return Problem(
        name=name,
        title=title,
        openings={role: one.opening for role, one in roles.items()},
        rules={role: [rule.line for rule in one.rules if not rule.is_known] for role, one in roles.items()},
        tasks=tasks,
        solve=one_clerk if len(roles) == 1 else three_roles,
        answer=answer,
        missing=lambda role, text: roles[role].missing(text),
        search_tasks=40,
    )


DESK = problem(
    "desk",
    "Support desk, one role",
    {"clerk": CLERK},
    {field: [rule.value for rule in CLERK.rules if rule.field == field] for field in ("topic", "mood")},
)
THREE_ROLES = problem(
    "three_roles",
    "Support desk, three roles",
    {"reader": READER, "router": ROUTER, "writer": WRITER},
    {"word": list(TOPICS), "mood": [rule.value for rule in WRITER.rules]},
)
