from __future__ import annotations

from collections.abc import Iterator

import pytest

import leyden
from integration_tests.langchain.conftest import run
from leyden import wire
from leyden_plugins.frameworks.langchain import LangChainAdapter
from tests.capture.conftest import gateway, servers, user_server

__all__ = ["gateway", "run", "servers", "user_server"]  # fixtures of the tests here too


@pytest.fixture
def instrumented() -> Iterator[LangChainAdapter]:
    """The automatic form, for one test: lanes hold no installed Leyden whose plugins could be found."""
    wire.install()
    adapter = LangChainAdapter()
    adapter.attach()
    yield adapter
    adapter.detach()
    leyden.uninstrument()
