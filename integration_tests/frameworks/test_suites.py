"""What an adapter does beside the contract (errors, explicit form, detach, cancellation): tested inside each lane."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration_tests.frameworks.contract_runs import FRAMEWORKS, ROOT, run_in
from scripts.environments import lane

SUITES = Path(__file__).parent / "suites"
TESTED = sorted({path.parent.name for path in SUITES.glob("*/test_*.py")})
LANES = FRAMEWORKS | {"gateway_clients": ("together", "newest"), "litellm": ("together",)}
CASES = [(suite, name) for suite in TESTED for name in LANES[suite]]


@pytest.mark.parametrize(("suite", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_the_adapter_s_own_suite_passes_in_its_environment(suite: str, name: str) -> None:
    python = lane(name)
    folder = str((SUITES / suite).relative_to(ROOT))
    printed = run_in([str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", folder])
    assert re.search(r"\b[1-9]\d* passed", printed), printed
