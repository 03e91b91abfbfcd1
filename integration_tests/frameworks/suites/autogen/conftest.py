from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration_tests.frameworks.suites.autogen.server import Endpoint, serving
from leyden import wire
from leyden_plugins.frameworks.autogen import AutoGenAdapter, observe

Observe = Callable[[Any], Any]

FORMS = ("automatic", "explicit")


@pytest.fixture(scope="session")
def endpoints() -> Iterator[tuple[Endpoint, Endpoint]]:
    # AutoGen logs the traceback of every exception that a test makes an agent raise.
    logging.getLogger("autogen_core").setLevel(logging.CRITICAL)
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


@contextlib.contextmanager
def attached() -> Iterator[AutoGenAdapter]:
    """The automatic form, for the length of the block."""
    wire.install()
    adapter = AutoGenAdapter()
    adapter.attach()
    try:
        yield adapter
    finally:
        adapter.detach()
        wire.uninstall()


@pytest.fixture
def automatic() -> Iterator[AutoGenAdapter]:
    """The automatic form, for one test."""
    with attached() as adapter:
        yield adapter


@pytest.fixture(params=FORMS)
def observed(request: pytest.FixtureRequest) -> Iterator[Observe]:
    """What a user writes around a team in each form."""
    if request.param == "explicit":
        yield observe
        wire.uninstall()
        return
    with attached():
        yield lambda team: team
