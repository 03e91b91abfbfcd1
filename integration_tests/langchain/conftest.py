from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import leyden
from tests.capture.servers import FakeOpenAI, serving

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Run coroutines on one loop: langchain-openai caches an async client that breaks on a second one."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[FakeOpenAI, FakeOpenAI]]:
    with serving() as user, serving() as gateway:
        yield user, gateway


@pytest.fixture
def user_server(servers: tuple[FakeOpenAI, FakeOpenAI]) -> FakeOpenAI:
    """The endpoint that the user's own client points at."""
    servers[0].clear()
    return servers[0]


@pytest.fixture
def gateway(servers: tuple[FakeOpenAI, FakeOpenAI]) -> FakeOpenAI:
    """Where routed roles go."""
    servers[1].clear()
    return servers[1]


@pytest.fixture
def instrumented() -> Iterator[None]:
    """The automatic form, for one test."""
    leyden.instrument(["langchain"])
    yield
    leyden.uninstrument()
