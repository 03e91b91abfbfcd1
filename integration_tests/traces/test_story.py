"""A traced AutoGen app is received, rewarded and learnt from, and does better on the result: the documented script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_an_app_that_knows_nothing_of_leyden_gets_better_by_its_traces(autogen_python: Path) -> None:
    command = [sys.executable, "-m", "examples.traces.story", "--app-python", str(autogen_python)]
    done = subprocess.run(
        [*command, "--seeds", "0", "--count", "60", "--held-out", "100"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n60 traces that succeeded\n" in done.stdout
    assert "\n120 spans of model calls and tools that another span records too\n" in done.stdout
    before = re.search(r"untrained: ([\d.]+) of 100", done.stdout)
    after = re.search(r"trained on traces: ([\d.]+)", done.stdout)
    assert before is not None and after is not None
    assert float(after[1]) > float(before[1]) + 0.2, done.stdout[-500:]
