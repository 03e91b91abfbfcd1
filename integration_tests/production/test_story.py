"""An app records, a later process trains from the record alone, the app deploys the result: the documented commands."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "text_to_sql" / "model"
LEYDEN = Path(sys.executable).with_name("leyden")
CUSTOMERS, HELD_OUT = "300", "100"


@contextmanager
def server(*command: str | Path) -> Iterator[str]:
    """Run a server until the block ends; yields the address that it prints."""
    with subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            process.terminate()


def run(*command: str | Path, **environment: str) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_what_production_recorded_makes_a_small_model_better_on_new_questions(tmp_path: Path) -> None:
    recorded, out, before = tmp_path / "production", tmp_path / "out", tmp_path / "before"
    app = [sys.executable, "-m", "examples.production.app"]
    with server(sys.executable, "-m", "examples.production.closed_model", "0") as url:
        own = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "the-apps-own-key"}
        told = run(*app, "record", recorded, "--customers", CUSTOMERS, **own)
        assert f"recorded {CUSTOMERS} rollouts" in told and "dropped: none" in told
    shown = run(LEYDEN, "rewards", "show", recorded)
    rewards = re.search(r"reward: (\d+) rewards, mean ([\d.]+)", shown)
    assert rewards is not None and 140 < int(rewards[1]) < 220 and 0.8 < float(rewards[2]) < 1.0

    # The closed model is gone: what was recorded is all that is needed.
    trained = run(sys.executable, "-m", "examples.production.train", recorded, out, "--run", tmp_path / "run")
    assert f"wrote {out}" in trained

    shutil.copytree(out, before)
    for weights in MODEL.glob("*.safetensors"):
        shutil.copy(weights, before / "policies" / "sql")
    shares = []
    with server(sys.executable, "-m", "examples.production.closed_model", "0") as url:
        own = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "the-apps-own-key"}
        for folder in (before, out):
            with server(LEYDEN, "serve", folder, "--port", "0") as served:
                told = run(*app, "deploy", folder, served, "--customers", HELD_OUT, **own)
            found = re.search(r"served right: ([\d.]+)", told)
            assert found is not None
            shares.append(float(found[1]))
    assert shares[1] > shares[0] + 0.3, shares
