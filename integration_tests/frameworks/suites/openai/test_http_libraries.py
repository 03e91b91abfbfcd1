"""The wire's own tests of every HTTP library, for the one that only the frameworks' environments hold: aiohttp."""

import pytest

from tests.capture.test_wire_libraries import *  # noqa: F403


@pytest.fixture(params=["aiohttp"])
def kind(request: pytest.FixtureRequest, installed: None) -> str:
    return str(request.param)
