"""The demo trained through a real vLLM server; and a trainer that is killed, which leaves no server behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from integration_tests.vllm.figures import Figures

ROOT = Path(__file__).parents[2]
ENDING_SECONDS = 30.0


def train(python: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    """Start the demo on vLLM."""
    command = [sys.executable, "-m", "examples.text_to_sql.train", "--engine", "vllm", "--vllm-python", str(python)]
    return subprocess.Popen(
        [*command, "--run", str(run), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [(), ("--lora", "8")], ids=["whole weights", "adapter"])
def test_the_demo_trains_on_vllm(python: Path, figures: Figures, tmp_path: Path, more: tuple[str, ...]) -> None:
    process = train(python, tmp_path / "run", "--steps", "3", *more)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    figures.servers += 1
    figures.pushes += 3
    assert "The app without a trainer" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert not summary["failures"]


@pytest.mark.timeout(600)
def test_a_trainer_that_is_killed_leaves_no_server(python: Path, figures: Figures, tmp_path: Path) -> None:
    process = train(python, tmp_path / "run", "--steps", "50")
    try:
        servers = wait_for_servers(process)
        figures.servers += 1
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + ENDING_SECONDS
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in servers):
        assert time.monotonic() < deadline, [one.cmdline() for one in servers if one.is_running()]
        time.sleep(0.2)


def wait_for_servers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return all of a vLLM server's processes once its worker runs."""
    while process.poll() is None:
        found = psutil.Process(process.pid).children(recursive=True)
        titles = [" ".join(one.cmdline()) for one in found if one.is_running()]
        if any("VLLM::Worker" in title for title in titles):
            return [one for one in found if "vllm" in " ".join(one.cmdline()).lower()]
        time.sleep(0.5)
    raise AssertionError(process.stdout.read()[-4000:] if process.stdout else "")
