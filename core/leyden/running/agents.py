"""The user's agent: what may be one, how it is named for another process, and how it is called."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from leyden.errors import ConfigurationError
from leyden.interfaces import Agent
from leyden.running.command import Command


@dataclass(frozen=True)
class PerRollout:
    """An agent that is built anew for every rollout."""

    factory: Callable[[], Callable[..., object]]


def per_rollout(factory: Callable[[], Callable[..., object]]) -> PerRollout:
    """Make an agent of a factory or class whose instances are called with the task, one instance a rollout."""
    if not callable(factory):
        raise ConfigurationError(f"per_rollout takes a factory or class, got {factory!r}")
    return PerRollout(factory)


def as_agent(agent: object) -> Agent | PerRollout | str:
    """Return the agent that `agent` stands for: a class is built anew for every rollout.

    Raises:
        ConfigurationError: it cannot be called with a task; says what an agent is.
    """
    if isinstance(agent, type):
        if "__call__" not in dir(agent):
            raise ConfigurationError(f"instances of {agent!r} cannot be called; give it a method __call__(self, task)")
        return PerRollout(agent)
    if isinstance(agent, str):
        module, colon, qualname = agent.partition(":")
        if not (module and colon and qualname):
            raise ConfigurationError(f"{agent!r} does not name an agent; write 'package.module:function'")
        return agent
    if isinstance(agent, PerRollout) or callable(agent):
        return agent
    raise ConfigurationError(
        "the agent must be an async function, a sync function, a class, leyden.per_rollout(factory), "
        f"leyden.Command([...]) or the name 'package.module:function' of one, got {agent!r}"
    )


def describe(target: object) -> str:
    """Return `module:qualname` of a function, or of a factory's; `no agent` for none."""
    if target is None:
        return "no agent"
    if isinstance(target, (str, Command)):
        return str(target)
    inner = target.factory if isinstance(target, PerRollout) else target
    return f"{getattr(inner, '__module__', '?')}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def import_path(target: object) -> str | None:
    """Return `module:qualname` when another process can import `target` by it, else `None`.

    `None` for lambdas, closures, bound methods, functions of a notebook and programs.
    """
    if isinstance(target, (str, Command)):
        return target if isinstance(target, str) else None
    path = describe(target)
    module, _, qualname = path.partition(":")
    if "<" in qualname or module == "?":
        return None
    loaded = importlib.import_module(module)
    if module == "__main__" and getattr(loaded, "__file__", None) is None:
        return None
    found: object = loaded
    for name in qualname.split("."):
        found = getattr(found, name, None)
    inner = target.factory if isinstance(target, PerRollout) else target
    return path if found is target or found is inner else None


def load(path: str, *, is_factory: bool = False) -> Agent | PerRollout:
    """Import the agent that `import_path` named.

    Raises:
        ConfigurationError: nothing of that name is there, or it is no agent.
    """
    found = imported(path)
    if is_factory and not isinstance(found, PerRollout):
        return PerRollout(found)  # type: ignore[arg-type]  # describe() unwrapped the factory
    agent = as_agent(found)
    if isinstance(agent, str):
        raise ConfigurationError(f"{path!r} is the string {agent!r}, not an agent")
    return agent


def load_function(path: str) -> Callable[..., object]:
    """Import the reward function that `import_path` named.

    Raises:
        ConfigurationError: nothing of that name is there, or it cannot be called.
    """
    found = imported(path)
    if not callable(found):
        raise ConfigurationError(f"{path!r} is {found!r}, which cannot be called")
    return found


def imported(path: str) -> object:
    """Import `module:qualname`.

    Raises:
        ConfigurationError: nothing of that name is there.
    """
    module, _, qualname = path.partition(":")
    found: object = importlib.import_module(module)
    try:
        for name in qualname.split("."):
            found = getattr(found, name)
    except AttributeError as error:
        raise ConfigurationError(f"module {module!r} has no {qualname!r}; it must be importable") from error
    return found


async def call(function: Agent | PerRollout, *arguments: object) -> object:
    """Call the agent: async functions here, sync ones in a thread with a copy of this context."""
    target = function.factory() if isinstance(function, PerRollout) else function
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None)):  # noqa: B004
        return await target(*arguments)  # type: ignore[misc]  # just found to be a coroutine function
    context = contextvars.copy_context()
    result = await asyncio.get_running_loop().run_in_executor(None, lambda: context.run(target, *arguments))
    return await result if inspect.isawaitable(result) else result
