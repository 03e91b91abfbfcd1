"""What a dialect makes of a span, and the small tools that dialects share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from leyden.conversations import asked_messages, chat_messages
from leyden.errors import DatasetError
from leyden.spans import Kind

INPUT = "gen_ai.input.messages"
OUTPUT = "gen_ai.output.messages"
INSTRUCTIONS = "gen_ai.system_instructions"
TOOLS = "gen_ai.tool.definitions"
FINISH_REASONS = "gen_ai.response.finish_reasons"


@dataclass
class Reading:
    """What is understood of a span; empty where nothing is."""

    kind: Kind | None = None
    agent: str | None = None
    """Who speaks, where the span itself says so."""
    told: dict[str, object] = field(default_factory=dict)
    """Attributes under their names in the GenAI conventions."""
    consumed: set[str] = field(default_factory=set)
    """The span's own attributes that `told` says in other words."""
    asked: object = None
    """What the operation was given; of a trace's root, the task."""
    answered: object = None
    """What it gave back."""
    response: Mapping[str, object] | None = None
    """The model server's answer as it came, if it was recorded: may hold token ids."""

    def add(self, other: Reading) -> None:
        """Hear what another dialect says beside this."""
        self.kind = self.kind or other.kind
        self.agent = self.agent or other.agent
        self.told = {**other.told, **self.told}
        self.consumed |= other.consumed
        self.asked = other.asked if self.asked is None else self.asked
        self.answered = other.answered if self.answered is None else self.answered
        self.response = self.response or other.response


def parsed(value: object) -> object:
    """Return the JSON value that a string holds, or the value itself."""
    if isinstance(value, str) and value[:1] in ("{", "[", '"'):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def text(value: object) -> str | None:
    """Return a string that says something, else `None`."""
    return value if isinstance(value, str) and value else None


def whole(value: object) -> int | None:
    """Return a whole number, else `None`; some exporters send numbers as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def given(found: Mapping[str, object]) -> dict[str, object]:
    """Leave out what nobody said."""
    return {name: value for name, value in found.items() if value not in (None, [], {}, "")}


def asked_chat(messages: object, instructions: object = None) -> object:
    """Return what a model was asked as chat messages; as it is where it is more than text, which readers refuse."""
    with contextlib.suppress(DatasetError):
        return asked_messages({INPUT: messages, INSTRUCTIONS: instructions} if instructions else {INPUT: messages})
    if not instructions or not isinstance(messages, list):
        return messages
    return [{"role": "system", "content": instructions}, *messages]


def answered_chat(messages: object) -> object:
    """Return answers as chat messages, as `asked_chat`."""
    with contextlib.suppress(DatasetError):
        return chat_messages(messages)
    return messages


def nested(attributes: Mapping[str, object], prefix: str) -> object:
    """Put flattened attributes together: `p.0.a`, `p.1.a` become `[{"a": ...}, {"a": ...}]`. `None`: there are none."""
    tree: dict[str, object] = {}
    for name, value in attributes.items():
        if not name.startswith(prefix + "."):
            continue
        *path, last = name[len(prefix) + 1 :].split(".")
        at: dict[str, object] | None = tree
        for step in path:
            below = at.setdefault(step, {}) if at is not None else None
            at = below if isinstance(below, dict) else None
        if at is not None:
            at[last] = value
    return _listed(tree) if tree else None


def names_below(attributes: Iterable[str], prefix: str) -> set[str]:
    """Return the names of flattened attributes."""
    return {name for name in attributes if name.startswith(prefix + ".")}


def _listed(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if value and all(key.isascii() and key.isdigit() for key in value):
        return [_listed(value[key]) for key in sorted(value, key=int)]
    return {key: _listed(item) for key, item in value.items()}


def items(value: object) -> list[Mapping[str, object]]:
    """Return the objects of a list."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
