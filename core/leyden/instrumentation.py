"""Attach Leyden to whatever agent frameworks this process uses, now or when they are imported.

The automatic form: the trainer and `leyden.deploy` call it. Adapters come from the plugin registry.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextvars
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

from leyden import context, wire
from leyden.errors import ConfigurationError, LeydenError, MissingExtraError
from leyden.interfaces import FrameworkAdapter
from leyden.patching import Patches, forget_import, when_imported
from leyden.plugins import Plugins, load_plugins

logger = logging.getLogger(__name__)


class Attachment:
    """An adapter, attached or waiting for its framework to be imported."""

    def __init__(self, adapter: FrameworkAdapter, *, is_named: bool) -> None:
        self.adapter = adapter
        self.is_named = is_named
        self.is_attached = False
        self.error: Exception | None = None
        """Why it could not attach."""

    def start(self) -> None:
        """Attach now or later.

        Raises:
            ConfigurationError: a hook point is missing, and the user named this framework.
        """
        when_imported(self.adapter.module, self.attach)

    def attach(self, module: ModuleType) -> None:
        """Install the adapter's hooks into its imported framework."""
        try:
            self.adapter.attach()
            self.is_attached = True
        except Exception as error:
            self.error = error
            if self.is_named:
                raise
            logger.warning("the adapter for %s is off: %s", self.adapter.name, error)

    def stop(self) -> None:
        """Undo `start`."""
        forget_import(self.adapter.module, self.attach)
        if self.is_attached:
            self.adapter.detach()
            self.is_attached = False


class Instrumentation:
    """What `instrument` has done in this process; there is one."""

    def __init__(self) -> None:
        self.attachments: dict[str, Attachment] = {}
        self.threads = Patches()
        self.users: set[object] = set()
        """Who needs it until they say otherwise: recordings, which outlive a deployment."""


_installed = Instrumentation()


def instrument(
    frameworks: Sequence[str] | None = None, *, threads: bool = False, plugins: Plugins | None = None
) -> None:
    """Install the wire, and an adapter for each framework as soon as it is imported. Idempotent.

    Args:
        frameworks: names of adapters that must work here; `None` attaches every one that can.
        threads: also make new threads and thread pools copy the context, which plain Python does not.
        plugins: where adapters come from, instead of the installed plugins.

    Raises:
        ConfigurationError: a named framework is unknown, or has no hook point where its adapter looks.
        MissingExtraError: a named framework is not installed.
    """
    wire.install()
    plugins = plugins or load_plugins()
    for name in frameworks if frameworks is not None else plugins.names("framework"):
        if name not in _installed.attachments:
            add_adapter(plugins, name, is_named=frameworks is not None)
    if threads and not _installed.threads.replaced:
        patch_threads(_installed.threads)


def uninstrument() -> None:
    """Restore everything that `instrument` and the wire have patched. Idempotent."""
    while _installed.attachments:
        _, attachment = _installed.attachments.popitem()
        attachment.stop()
    _installed.threads.restore()
    wire.uninstall()


def use(user: object) -> None:
    """Keep `instrument` in force for as long as `user` needs it."""
    _installed.users.add(user)
    instrument()


def end_use(user: object) -> None:
    """Say that `user` needs it no longer."""
    _installed.users.discard(user)


def is_used() -> bool:
    """Say whether somebody needs `instrument` to stay in force."""
    return bool(_installed.users)


def is_instrumented() -> bool:
    """Say whether `instrument` is in force."""
    return bool(_installed.attachments) or bool(_installed.threads.replaced)


def attachments() -> tuple[Attachment, ...]:
    """Return the adapters and how they stand, for `leyden doctor`."""
    return tuple(_installed.attachments.values())


def add_adapter(plugins: Plugins, name: str, *, is_named: bool) -> None:
    """Load one adapter and attach it now or later.

    Raises:
        ConfigurationError: it was named and is unknown or cannot attach.
        MissingExtraError: it was named and its framework is not installed.
    """
    try:
        adapter: FrameworkAdapter = plugins.get("framework", name)()
    except LeydenError as error:
        if is_named:
            raise
        logger.warning("the adapter for %s is off: %s", name, error)
        return
    if is_named and adapter.module not in sys.modules and importlib.util.find_spec(adapter.module) is None:
        raise MissingExtraError(
            f"{adapter.module!r} is not installed, and the adapter {name!r} needs it: pip install 'leyden[{name}]'",
            name=adapter.module,
        )
    attachment = Attachment(adapter, is_named=is_named)
    _installed.attachments[name] = attachment
    try:
        attachment.start()
    except Exception as error:
        del _installed.attachments[name]
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"the adapter {name!r} could not attach: {error}") from error


def patch_threads(patches: Patches) -> None:
    """Make `Thread.start` and `ThreadPoolExecutor.submit` run their function in a copy of the caller's context."""
    start: Callable[[threading.Thread], None] = threading.Thread.start
    submit: Callable[..., Future[Any]] = ThreadPoolExecutor.submit
    pool_worker = vars(concurrent.futures.thread).get("_worker")

    def start_in_context(thread: threading.Thread) -> None:
        # A pool's thread outlives the call that happened to create it; its items bring their own contexts.
        is_pool_thread = pool_worker is not None and vars(thread).get("_target") is pool_worker
        if context.current() is not None and not is_pool_thread:
            caller, run = contextvars.copy_context(), thread.run
            thread.run = lambda: caller.run(run)  # type: ignore[method-assign]
        start(thread)

    def submit_in_context(
        pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **options: Any
    ) -> Future[Any]:
        if context.current() is None:
            return submit(pool, function, *args, **options)
        return submit(pool, contextvars.copy_context().run, function, *args, **options)

    patches.replace(threading.Thread, "start", start_in_context)
    patches.replace(ThreadPoolExecutor, "submit", submit_in_context)
