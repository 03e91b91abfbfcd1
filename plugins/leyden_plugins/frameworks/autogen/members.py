"""What an agent or team is made of: participants, inner teams, wrapped agents, agents that are tools.

One idea: AutoGen has no public way to ask, but its objects hold one another in plain attributes, so all of them are
found by their public types, in the user's own classes too, and no private name is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from autogen_agentchat.base import ChatAgent, Handoff, Team
from autogen_core.tools import BaseTool, Workbench

from leyden import context

HOLDERS = (ChatAgent, Team, Workbench, BaseTool)
"""What is looked into."""

SOUGHT = (*HOLDERS, Handoff)
"""What is found."""


def members(subject: object) -> list[object]:
    """Return `subject` and everything below it, each once."""
    found: dict[int, object] = {}
    left = [subject]
    while left:
        each = left.pop()
        if id(each) not in found:
            found[id(each)] = each
            if isinstance(each, HOLDERS):
                left.extend(parts(each))
    return list(found.values())


def parts(holder: object) -> Iterator[object]:
    """Yield what the attributes of one object hold, alone or in a list, tuple or mapping."""
    for value in vars(holder).values():
        items: Iterable[object] = (value,)
        if isinstance(value, Mapping):
            items = value.values()
        elif isinstance(value, list | tuple):
            items = value
        yield from (item for item in items if isinstance(item, SOUGHT))


def declare(found: Iterable[object]) -> None:
    """Declare the agents among `found`, and those they may hand over to, as roles of the current rollout."""
    frame = context.current()
    if frame is None or frame.rollout is None:
        return
    for each in found:
        if isinstance(each, ChatAgent):
            frame.rollout.declared_roles.add(each.name)
        elif isinstance(each, Handoff):
            frame.rollout.declared_roles.add(each.target)
