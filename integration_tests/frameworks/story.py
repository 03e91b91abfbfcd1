"""What a framework's script is asked and says: the words between the contract suite and `scripts/<framework>.py`.

One idea: a script answers from the conversation alone, so that the same app can run in fifty episodes at once.
One trap: who speaks, and in which rollout, is read from tags that the app's user wrote into the prompts, never from
a header: it is the truth that Leyden's own records are compared with.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ROLE_TAG = re.compile(r"\[\[role=([\w-]+)\]\]")
ROLLOUT_TAG = re.compile(r"\[\[rollout=([\w-]+)\]\]")
INSTRUCTIONS = ("system", "developer")
"""Roles of the messages that an agent's own prompt arrives in."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One model call, as it reached the engine."""

    role: str
    """The agent's name by its own system prompt."""
    rollout: str
    """The episode's name by the task's text."""
    messages: Sequence[Mapping[str, object]]
    """OpenAI chat messages."""
    tools: Sequence[str] = ()
    """Names of the tools offered."""
    format: Mapping[str, object] | None = None
    """The response format asked for."""


@dataclass(frozen=True, kw_only=True)
class Say:
    """One answer."""

    text: str = ""
    tool_calls: tuple[tuple[str, dict[str, object]], ...] = ()
    """Name and arguments of each; their ids are the engine's."""


Script = Callable[[Ask], Say]


def script_of(framework: str) -> Script:
    """Return `answer` of `scripts/<framework>.py`."""
    script: Script = importlib.import_module(f"integration_tests.frameworks.scripts.{framework}").answer
    return script


def ask_of(
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] = (),
    response_format: Mapping[str, object] | None = None,
) -> Ask:
    """Read who speaks, and in which rollout, from the prompt.

    Raises:
        ValueError: a tag is missing, or two roles are named.
    """
    instructions = " ".join(text_of(each) for each in messages if each.get("role") in INSTRUCTIONS)
    roles = set(ROLE_TAG.findall(instructions))
    rollouts = ROLLOUT_TAG.findall(" ".join(map(text_of, messages)))
    if len(roles) != 1 or not rollouts:
        raise ValueError(
            f"a prompt must name one role in its instructions and a rollout anywhere; it names roles {sorted(roles)!r} "
            f"and rollouts {sorted(set(rollouts))!r}: {str(messages)[:500]!r}"
        )
    names = tuple(name_of(tool) for tool in tools)
    return Ask(role=roles.pop(), rollout=rollouts[-1], messages=messages, tools=names, format=response_format)


def text_of(message: Mapping[str, object]) -> str:
    """Return the text of a chat message, whatever form its content has."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return ""


def name_of(tool: Mapping[str, object]) -> str:
    """Return the name of an offered tool."""
    function = tool.get("function")
    return str(function["name"] if isinstance(function, Mapping) else tool.get("name"))
