"""The automatic form: hooks on AutoGen's classes, and on the user's agents once there is one of a class."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from autogen_agentchat.agents import AssistantAgent, BaseChatAgent
from autogen_agentchat.base import ChatAgent
from autogen_agentchat.teams import BaseGroupChat
from autogen_core import SingleThreadedAgentRuntime
from autogen_core.tools import FunctionTool

from leyden.errors import ConfigurationError
from leyden.patching import Patches
from leyden_plugins.frameworks.autogen.agents import (
    observed_function,
    observed_messages,
    observed_stream,
    observed_tool_call,
)
from leyden_plugins.frameworks.autogen.teams import observed_run_stream
from leyden_plugins.frameworks.autogen.work import is_watched

WORKING_VERSIONS = "autogen-agentchat and autogen-core 0.7.5"

AGENT_METHODS = {"on_messages": observed_messages, "on_messages_stream": observed_stream}
TEAM_METHODS = {"run_stream": observed_run_stream}
TOOL_METHODS = {"run": observed_function}

HOOK_POINTS: tuple[tuple[type, str, str], ...] = (
    (BaseChatAgent, "on_messages_stream", "messages cancellation_token"),
    (
        AssistantAgent,
        "_execute_tool_call",
        "tool_call workbench handoff_tools agent_name cancellation_token stream",
    ),
    (AssistantAgent, "_process_model_result", "model_result workbench handoff_tools"),
    (BaseGroupChat, "run_stream", "task cancellation_token"),
    (BaseGroupChat, "__init__", "group_chat_manager_name"),
    (FunctionTool, "run", "args cancellation_token"),
    (FunctionTool, "__init__", "func"),
    (SingleThreadedAgentRuntime, "send_message", "message_id"),
    (SingleThreadedAgentRuntime, "publish_message", "message_id"),
    (SingleThreadedAgentRuntime, "_process_send", "message_envelope"),
    (SingleThreadedAgentRuntime, "_process_publish", "message_envelope"),
)
"""Class, method, and the parameters that the hooks rely on."""

ATTRIBUTES = (
    (BaseGroupChat, "_group_chat_manager_name"),
    (BaseGroupChat, "_runtime"),
    (BaseGroupChat, "_embedded_runtime"),
    (FunctionTool, "_func"),
)
"""Attributes that the hooks rely on; `__init__` sets them."""


def check_hook_points() -> None:
    """See that everything is where this adapter looks.

    Raises:
        ConfigurationError: something is missing; names it and the versions that work.
    """
    missing = []
    for owner, name, needed in HOOK_POINTS:
        method = vars(owner).get(name)
        function = getattr(method, "__func__", method)
        if not callable(function) or not set(needed.split()) <= set(inspect.signature(function).parameters):
            missing.append(f"{owner.__name__}.{name}({needed.replace(' ', ', ')})")
    for owner, name in ATTRIBUTES:
        code = inspect.unwrap(vars(owner)["__init__"]).__code__
        if name not in code.co_names:
            missing.append(f"{owner.__name__}.{name}")
    if missing:
        raise ConfigurationError(
            f"AutoGen has no {', '.join(missing)} where Leyden attaches; versions known to work: {WORKING_VERSIONS}"
        )


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.is_on = False
        self.patches = Patches()
        self.seen: weakref.WeakSet[type] = weakref.WeakSet()
        """Agent classes whose methods are hooked."""

    def install(self) -> None:
        """Install all of it.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        check_hook_points()
        self.is_on = True
        self.hook_agents([ChatAgent, *subclasses(ChatAgent)])
        self.hook_later_agents()
        self.replace(BaseGroupChat, TEAM_METHODS)
        self.replace(FunctionTool, TOOL_METHODS)
        execute = vars(AssistantAgent)["_execute_tool_call"].__func__
        observed = staticmethod(observed_tool_call(execute, self.is_active))
        self.patches.replace(AssistantAgent, "_execute_tool_call", observed)

    def remove(self) -> None:
        """Undo `install`."""
        self.is_on = False
        self.patches.restore()
        self.seen.clear()

    def is_active(self) -> bool:
        """Say whether there is anything to do."""
        return self.is_on and is_watched()

    def replace(self, owner: type, methods: Mapping[str, Callable[..., Any]]) -> None:
        """Hook those of `methods` that a class defines itself and that can be called."""
        for name, observed in methods.items():
            original = vars(owner).get(name)
            if inspect.isfunction(original) and not getattr(original, "__isabstractmethod__", False):
                self.patches.replace(owner, name, observed(original, self.is_active))

    def hook_agents(self, classes: Iterable[type]) -> None:
        """Hook the agents among `classes` that are not hooked yet."""
        for each in classes:
            if issubclass(each, ChatAgent) and each not in self.seen:
                self.seen.add(each)
                self.replace(each, AGENT_METHODS)

    def hook_later_agents(self) -> None:
        """Hook a class that is defined later when its first agent is made."""
        init = vars(BaseChatAgent)["__init__"]

        @functools.wraps(init)
        def __init__(agent: Any, *args: Any, **options: Any) -> None:
            if self.is_on and type(agent) not in self.seen:
                self.hook_agents(type(agent).__mro__)
            init(agent, *args, **options)

        self.patches.replace(BaseChatAgent, "__init__", __init__)


def subclasses(owner: type) -> Iterator[type]:
    """Yield every class below `owner`."""
    each: type
    for each in type.__subclasses__(owner):
        yield each
        yield from subclasses(each)
