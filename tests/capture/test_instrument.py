"""Adapters attach when their framework is imported, before or after `instrument`, and let go again."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pluggy
import pytest

import leyden
from leyden import context
from leyden.errors import ConfigurationError, MissingExtraError
from leyden.hookspecs import Component
from leyden.instrumentation import attachments
from leyden.plugins import Plugins
from tests.capture.rollouts import rollout


class Adapter:
    """Counts; its framework is the module `toy_framework`."""

    name = "toy"
    module = "toy_framework"
    log: ClassVar[list[str]] = []
    error: Exception | None = None

    def attach(self) -> None:
        if self.error:
            raise self.error
        self.log.append(f"attached with {sys.modules[self.module].VALUE}")

    def detach(self) -> None:
        self.log.append("detached")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    (tmp_path / "toy_framework.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Adapter, "log", [])
    monkeypatch.setattr(Adapter, "error", None)
    component = Component("framework", "toy", lambda: Adapter, "", "test")
    yield Plugins({("framework", "toy"): component}, manager=pluggy.PluginManager("leyden"))
    leyden.uninstrument()
    sys.modules.pop("toy_framework", None)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_adapter_attaches_in_either_order_once(plugins: Plugins, is_first: bool) -> None:
    if is_first:
        importlib.import_module("toy_framework")
    leyden.instrument(plugins=plugins)
    leyden.instrument(plugins=plugins)
    importlib.import_module("toy_framework")
    assert Adapter.log == ["attached with 7"]
    leyden.uninstrument()
    assert Adapter.log == ["attached with 7", "detached"]


def test_a_framework_imported_after_uninstrument_is_left_alone(plugins: Plugins) -> None:
    finders = list(sys.meta_path)
    leyden.instrument(plugins=plugins)
    leyden.uninstrument()
    importlib.import_module("toy_framework")
    assert Adapter.log == []
    assert sys.meta_path == finders


def test_a_framework_still_being_imported_attaches_once_it_is_whole(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_framework.py").write_text("import toy_instrumenting\nVALUE = 8\n")
    (tmp_path / "toy_instrumenting.py").write_text("import tests.capture.test_instrument as t\nt.instrument_now()\n")
    (tmp_path / "toy_later.py").write_text("")
    monkeypatch.setattr(sys.modules[__name__], "instrument_now", lambda: leyden.instrument(plugins=plugins), False)
    monkeypatch.setitem(sys.modules, "tests.capture.test_instrument", sys.modules[__name__])
    importlib.import_module("toy_framework")
    importlib.import_module("toy_later")
    assert Adapter.log == ["attached with 8"]


def test_a_missing_hook_point_raises_only_for_a_framework_that_was_named(
    plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    importlib.import_module("toy_framework")
    Adapter.error = ConfigurationError("no hook here")
    leyden.instrument(plugins=plugins)
    assert "the adapter for toy is off: no hook here" in caplog.text
    assert [str(each.error) for each in attachments()] == ["no hook here"]
    leyden.uninstrument()
    with pytest.raises(ConfigurationError, match="no hook here"):
        leyden.instrument(["toy"], plugins=plugins)


def test_a_named_framework_must_exist(plugins: Plugins, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no framework is named 'tois'"):
        leyden.instrument(["tois"], plugins=plugins)
    (tmp_path / "toy_framework.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError, match=r"pip install 'leyden\[toy\]'"):
        leyden.instrument(["toy"], plugins=plugins)


def role_here() -> str | None:
    frame = context.current()
    return frame.role if frame else None


def roles_in_threads() -> list[str | None]:
    """Return the role seen by a new thread, a pool made before, and `run_in_executor`."""
    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(role_here()))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        seen.append(pool.submit(role_here).result())

    async def in_loop() -> None:
        seen.append(await asyncio.get_running_loop().run_in_executor(None, role_here))

    asyncio.run(in_loop())
    return seen


def test_threads_copy_the_context_when_asked_to(plugins: Plugins) -> None:
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    with rollout(), leyden.role("speaker"):
        assert roles_in_threads() == [None, None, None]
        leyden.instrument(plugins=plugins, threads=True)
        assert roles_in_threads() == ["speaker"] * 3
        leyden.uninstrument()
        assert roles_in_threads() == [None, None, None]
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == (start, submit)


def test_a_pools_thread_does_not_keep_the_context_it_was_made_in(plugins: Plugins) -> None:
    leyden.instrument(plugins=plugins, threads=True)
    with ThreadPoolExecutor(1) as pool:
        with rollout(), leyden.role("speaker"):
            assert pool.submit(role_here).result() == "speaker"
        assert pool.submit(role_here).result() is None
