from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture
def installed() -> Iterator[None]:
    """The wire, for one test."""
    wire.install()
    yield
    wire.uninstall()
