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


@dataclass(frozen=True)
class PerRollout:
    """An agent that is built anew for every rollout."""

    factory: Callable[[], Callable[..., object]]


def per_rollout(factory: Callable[[], Callable[..., object]]) -> PerRollout:
    """Make an agent of a factory or class whose instances are called with the task, one instance a rollout."""
    if not callable(factory):
        raise ConfigurationError(f"per_rollout takes a factory or class, got {factory!r}")
    return PerRollout(factory)


def check_agent(agent: object) -> None:
    """Refuse what cannot be called with a task.

    Raises:
        ConfigurationError: says what an agent is.
    """
    if not isinstance(agent, PerRollout) and not callable(agent):
        raise ConfigurationError(
            f"the agent must be an async function, a sync function or leyden.per_rollout(factory), got {agent!r}"
        )


def describe(target: object) -> str:
    """Return `module:qualname` of a function, or of a factory's."""
    inner = target.factory if isinstance(target, PerRollout) else target
    return f"{getattr(inner, '__module__', '?')}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def import_path(target: object) -> str | None:
    """Return `module:qualname` when another process can import `target` by it, else `None`.

    `None` for lambdas, closures, bound methods and functions of a notebook.
    """
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
    """Import what `import_path` named.

    Raises:
        ConfigurationError: nothing of that name is there.
    """
    module, _, qualname = path.partition(":")
    found: object = importlib.import_module(module)
    try:
        for name in qualname.split("."):
            found = getattr(found, name)
    except AttributeError as error:
        raise ConfigurationError(f"module {module!r} has no {qualname!r}; the agent must be importable") from error
    if is_factory and not isinstance(found, PerRollout):
        return PerRollout(found)  # type: ignore[arg-type]  # describe() unwrapped the factory
    return found  # type: ignore[return-value]  # checked by check_agent


async def call(function: Agent | PerRollout, *arguments: object) -> object:
    """Call the agent: async functions here, sync ones in a thread with a copy of this context."""
    target = function.factory() if isinstance(function, PerRollout) else function
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None)):  # noqa: B004
        return await target(*arguments)  # type: ignore[misc]  # just found to be a coroutine function
    context = contextvars.copy_context()
    result = await asyncio.get_running_loop().run_in_executor(None, lambda: context.run(target, *arguments))
    return await result if inspect.isawaitable(result) else result
