from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import httpx
import httpx2
import pytest

from leyden import wire
from tests.capture.servers import FakeOpenAI, serving


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


@pytest.fixture(params=[httpx, httpx2], ids=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> ModuleType:
    return request.param  # type: ignore[no-any-return]  # pytest types it Any


@pytest.fixture
def installed() -> Iterator[None]:
    """The wire, for one test."""
    wire.install()
    yield
    wire.uninstall()
