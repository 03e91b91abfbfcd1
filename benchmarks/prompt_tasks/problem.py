"""What a task of the benchmark is: roles with prompts, the rules that make their model good, tasks, and a score.

A role's prompt is its opening line and then rules, one a line. Requests and answers carry a record such as
`(answer h17: queue=BILLING tone=sorry)`, which can be found again however a method writes down what happened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]
Task = dict[str, Any]

NOISE = 20
"""One answer in so many is wrong whatever the prompt says."""


class Ask(Protocol):
    """Asks a role's model; returns its message."""

    def __call__(self, role: str, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Awaitable[Message]: ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task of the benchmark."""

    name: str
    title: str
    openings: Mapping[str, str]
    """Role -> the first line of its prompt, which is all of the prompt to begin with."""
    rules: Mapping[str, Sequence[str]]
    """Role -> the lines that make its model good."""
    tasks: Callable[[int, str, int], list[Task]]
    """(seed, set's name, count) -> tasks; two sets have no task in common."""
    solve: Callable[[Task, Ask], Awaitable[float]]
    """The app: run its roles on a task and return the score, 0 to 1."""
    answer: Callable[[str, str, Sequence[Message], bool], Message]
    """(role, system prompt, the other messages, has tools) -> what its model says."""
    missing: Callable[[str, str], list[str]]
    """(role, a text with its requests and answers) -> the rules for want of which answers are wrong, one a fault."""
    search_tasks: int
    """How many tasks a search has; half of them for feedback, half for selection."""

    @property
    def full(self) -> dict[str, str]:
        """Return the best prompts."""
        return {role: "\n".join([opening, *self.rules[role]]) for role, opening in self.openings.items()}


def digest(*parts: object) -> int:
    """Return a number from what is given, the same everywhere and always."""
    return int(hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:12], 16)


def is_noisy(system: str, task: str) -> bool:
    """Say whether the model fails here although its prompt is right."""
    return digest("noise", system, task) % NOISE == 0


def record(label: str, task: str, **fields: str) -> str:
    """Return a record, to be found in any text."""
    return f"({label} {task}: {' '.join(f'{name}={value}' for name, value in fields.items())})"


def records(label: str, text: str) -> dict[str, dict[str, str]]:
    """Return task -> fields of the records with this label in a text."""
    found = re.findall(rf"\({label} (\w+): ([^()]*)\)", text)
    return {task: dict(field.partition("=")[::2] for field in fields.split()) for task, fields in found}


def text_of(message: Message) -> str:
    """Return a message's text; its content may come in parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")
