from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration_tests.frameworks.suites.server import Endpoint, serving
from leyden import wire
from leyden_plugins.frameworks.agent_framework import AgentFrameworkAdapter


@pytest.fixture(scope="session")
def endpoints() -> Iterator[tuple[Endpoint, Endpoint]]:
    with serving() as user, serving() as gateway:
        yield user, gateway


@pytest.fixture
def user(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    """The endpoint that the user's own client points at."""
    endpoints[0].clear()
    return endpoints[0]


@pytest.fixture
def gateway(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    """Where routed roles go."""
    endpoints[1].clear()
    return endpoints[1]


@pytest.fixture
def instrumented() -> Iterator[AgentFrameworkAdapter]:
    """The automatic form, for one test."""
    wire.install()
    adapter = AgentFrameworkAdapter()
    adapter.attach()
    yield adapter
    adapter.detach()
    wire.uninstall()
