from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import agentscope.pipeline
import pytest

from integration_tests.frameworks.suites.agentscope.server import Endpoint, serving
from leyden import wire
from leyden_plugins.frameworks.agentscope import AgentScopeAdapter

collect_ignore = [] if hasattr(agentscope.pipeline, "TeamPipeline") else ["test_teams.py"]

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="session")
def endpoints() -> Iterator[tuple[Endpoint, Endpoint]]:
    logging.getLogger("as").setLevel(logging.CRITICAL)
    with serving() as user, serving() as gateway:
        yield user, gateway


@pytest.fixture
def user(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    """The endpoint that the user's own model points at."""
    endpoints[0].clear()
    return endpoints[0]


@pytest.fixture
def gateway(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    """Where routed roles go."""
    endpoints[1].clear()
    return endpoints[1]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Run coroutines on one loop: openai 2 closes a dropped client's connections on whatever loop runs then."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def instrumented() -> Iterator[AgentScopeAdapter]:
    """The automatic form, for one test."""
    wire.install()
    adapter = AgentScopeAdapter()
    adapter.attach()
    yield adapter
    adapter.detach()
    wire.uninstall()
