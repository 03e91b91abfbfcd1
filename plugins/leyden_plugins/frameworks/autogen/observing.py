"""The explicit form: the same hooks on the objects of one team, none on a class."""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any, TypeVar

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import ChatAgent, Team
from autogen_agentchat.teams import BaseGroupChat
from autogen_core.tools import FunctionTool

from leyden import wire
from leyden.errors import ConfigurationError
from leyden_plugins.frameworks.autogen.agents import observed_tool_call
from leyden_plugins.frameworks.autogen.hooks import (
    AGENT_METHODS,
    TEAM_METHODS,
    TOOL_METHODS,
    check_hook_points,
)
from leyden_plugins.frameworks.autogen.members import members
from leyden_plugins.frameworks.autogen.work import is_watched

logger = logging.getLogger(__name__)

Subject = TypeVar("Subject", bound=ChatAgent | Team)

METHODS: dict[type, dict[str, Any]] = {
    ChatAgent: AGENT_METHODS,
    BaseGroupChat: TEAM_METHODS,
    FunctionTool: TOOL_METHODS,
}

OBSERVED = "leyden_observed"
"""Attribute of an object that is hooked."""


def observe(subject: Subject) -> Subject:
    """Record what an agent or a team does, with all that belongs to it, and return it.

    It patches no class of AutoGen. It does install Leyden's hook into the HTTP clients, because only there can a
    trained role be sent to the gateway.

    Raises:
        ConfigurationError: `subject` is neither, or a hook point is missing in this version.
    """
    if not isinstance(subject, ChatAgent | Team):
        raise ConfigurationError(f"observe takes an agent or a team of AutoGen, got {subject!r}")
    check_hook_points()
    if not wire.is_installed():
        logger.info("observe installs Leyden's hook into the HTTP clients; leyden.uninstrument() undoes it")
        wire.install()
    for each in members(subject):
        if OBSERVED not in vars(each):
            hook(each)
    return subject


def hook(subject: Any) -> None:
    """Hook the methods of one object; bound methods, so that a deep copy is hooked as itself."""
    for owner, methods in METHODS.items():
        if isinstance(subject, owner):
            for name, observed in methods.items():
                setattr(subject, name, MethodType(observed(getattr(type(subject), name), is_watched), subject))
            setattr(subject, OBSERVED, True)
    if isinstance(subject, AssistantAgent):
        process: Any = type(subject)._process_model_result
        setattr(subject, process.__name__, MethodType(process.__func__, ToolCalls(type(subject))))


class ToolCalls:
    """Stands for an agent's class where AutoGen looks up how to run a tool call."""

    def __init__(self, agents: type[AssistantAgent]) -> None:
        self._agents = agents
        self._execute_tool_call = observed_tool_call(agents._execute_tool_call, is_watched)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agents, name)
