"""The seven examples: the same little app in each framework, trained for a step with the demo's model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.frameworks.train import FRAMEWORKS
from integration_tests.frameworks.contract_runs import FRAMEWORKS as LANES
from integration_tests.frameworks.contract_runs import OFFLINE, ROOT
from scripts.environments import lane


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_app_is_trained_where_its_framework_lives(framework: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    python = lane(LANES[framework][-1 if framework != "openai" else 1])
    command = [sys.executable, "-m", "examples.frameworks.train", framework, "--steps", "2"]
    command += ["--run", str(run), "--python", str(python)]
    env = os.environ | OFFLINE | {"CREWAI_STORAGE_DIR": str(tmp_path / "crewai")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["train_rollouts"], summary["failures"]) == (2, 32, {})
    assert "roles seen (model calls): checker 4, writer 4" in done.stdout
    assert "engine and learner give the sampled tokens exactly the same probabilities" in done.stdout
