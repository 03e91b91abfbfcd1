"""Install and remove the hook in the HTTP clients, one place below every SDK and framework."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import ModuleType

from leyden.patching import forget_import, when_imported
from leyden.wire import aiohttp_family, httpx_family, requests_family, transports
from leyden.wire.state import WIRE

PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "httpx": httpx_family.patch,
    "httpx2": httpx_family.patch,
    "requests": requests_family.patch,
    "aiohttp": aiohttp_family.patch,
}
"""Library -> what puts the wire into it."""


def install() -> None:
    """Patch the HTTP libraries, now or when they are imported. Idempotent."""
    if WIRE.is_installed:
        return
    WIRE.is_installed = True
    transports.patch()
    for name, patch in PATCHES.items():
        when_imported(name, patch)


def uninstall() -> None:
    """Restore the libraries and close Leyden's clients. Idempotent."""
    WIRE.is_installed = False
    for name, patch in PATCHES.items():
        forget_import(name, patch)
    WIRE.patches.restore()
    libraries, WIRE.libraries = WIRE.libraries, {}
    for library in libraries.values():
        library.close()


def forget_after_fork() -> None:
    """Let a forked child make connections of its own: on its parent's it would read answers meant for the parent."""
    WIRE.lock = threading.Lock()
    for library in WIRE.libraries.values():
        library.forget()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=forget_after_fork)


def is_installed() -> bool:
    """Say whether requests pass through here."""
    return WIRE.is_installed
