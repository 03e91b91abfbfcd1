from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import leyden
from tests.capture.conftest import gateway, servers, user_server

__all__ = ["gateway", "servers", "user_server"]  # fixtures of the tests here too

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Run coroutines on one loop: langchain-openai caches an async client that breaks on a second one."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def instrumented() -> Iterator[None]:
    """The automatic form, for one test."""
    leyden.instrument(["langchain"])
    yield
    leyden.uninstrument()
