from __future__ import annotations

import logging
from collections.abc import Iterator

import agents
import pytest

from integration_tests.frameworks.suites.server import Endpoint, serving
from leyden import wire
from leyden_plugins.frameworks.openai_agents import OpenAIAgentsAdapter


@pytest.fixture(scope="session")
def endpoints() -> Iterator[tuple[Endpoint, Endpoint]]:
    # Without a key the SDK's own exporter posts nowhere.
    agents.set_trace_processors([])
    logging.getLogger("openai.agents").setLevel(logging.CRITICAL)
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
def instrumented() -> Iterator[OpenAIAgentsAdapter]:
    """The automatic form, for one test."""
    wire.install()
    adapter = OpenAIAgentsAdapter()
    adapter.attach()
    yield adapter
    adapter.detach()
    wire.uninstall()
