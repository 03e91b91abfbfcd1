from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration_tests.frameworks.contract_runs import serving

collect_ignore = ["suites"]
"""They need the packages of a lane: `test_suites.py` runs them there."""


@pytest.fixture(scope="session")
def control() -> Iterator[str]:
    """Where the server is controlled that plays gateway and user's endpoint for every framework."""
    with serving() as address:
        yield address
