"""Replace functions of other packages reversibly, and wait for a package that is not imported yet.

One trap: somebody else may patch the same function after us. Restoring ours would drop theirs, so a replaced
function that is no longer on top stays where it is; every replacement therefore asks its owner whether it is
still wanted, and calls the original when it is not.
"""

from __future__ import annotations

import importlib.abc
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)


class Patches:
    """Replaced attributes, newest last."""

    def __init__(self) -> None:
        self.replaced: list[tuple[object, str, object, object]] = []
        """Owner, attribute, original, replacement."""

    def replace(self, owner: object, name: str, replacement: object) -> None:
        """Set an attribute of a class or module and remember what was there."""
        self.replaced.append((owner, name, vars(owner)[name], replacement))
        setattr(owner, name, replacement)

    def restore(self) -> None:
        """Put every original back, newest first."""
        while self.replaced:
            owner, name, original, replacement = self.replaced.pop()
            if vars(owner).get(name) is replacement:
                setattr(owner, name, original)
            else:
                logger.info("%s.%s was patched again by someone else and keeps that patch", owner, name)


class ImportWatch(importlib.abc.MetaPathFinder):
    """Calls back once a module has been imported. One instance serves the process."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}
        self.unfinished: dict[str, ModuleType] = {}
        """Modules whose import had begun before anybody waited for them; the next import of any module asks again."""
        self.lock = threading.Lock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, with our call after its execution."""
        for module in [module for module in self.unfinished.values() if not is_being_imported(module)]:
            self.imported(module)
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                self.call_after(spec)
                return spec  # type: ignore[no-any-return]  # `find` is any finder's
        return None

    def call_after(self, spec: ModuleSpec) -> None:
        """Make the module's loader call those who wait."""
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.imported(module)

        loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]

    def imported(self, module: ModuleType) -> None:
        """Call those who wait for `module`; what they raise is logged, because the import is not theirs."""
        with self.lock:
            self.unfinished.pop(module.__name__, None)
            callbacks = self.waiting.pop(module.__name__, [])
        for callback in callbacks:
            try:
                callback(module)
            except Exception:
                logger.exception("Leyden could not attach to %s", module.__name__)


def is_being_imported(module: ModuleType) -> bool:
    """Say whether the module's own code is still running."""
    return bool(getattr(module.__spec__, "_initializing", False))


WATCH = ImportWatch()


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback` with module `name`: now if it is imported, else right after it is.

    Raises:
        Exception: what `callback` raises, when the module is imported already.
    """
    module = sys.modules.get(name)
    if module is not None and not is_being_imported(module):
        callback(module)
        return
    with WATCH.lock:
        if module is not None:
            WATCH.unfinished[name] = module
        WATCH.waiting.setdefault(name, []).append(callback)
        if WATCH not in sys.meta_path:
            sys.meta_path.insert(0, WATCH)


def forget_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Stop waiting for module `name`."""
    with WATCH.lock:
        callbacks = WATCH.waiting.get(name, [])
        if callback in callbacks:
            callbacks.remove(callback)
        if not callbacks:
            WATCH.waiting.pop(name, None)
            WATCH.unfinished.pop(name, None)
        if not WATCH.waiting and WATCH in sys.meta_path:
            sys.meta_path.remove(WATCH)
