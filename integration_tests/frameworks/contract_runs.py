"""Run the contract of one framework in one environment, and judge it.

    python -m integration_tests.frameworks.contract_runs langchain --lane newest

Server and framework run in processes of their own: the server in this environment, the app in the lane's.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import certifi

from integration_tests.frameworks.contract import Verdict, judge
from scripts.environments import lane

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 280

FRAMEWORKS: dict[str, tuple[str, ...]] = {
    "agent_framework": ("together", "newest"),
    "agentscope": ("together", "newest"),
    "autogen": ("together", "newest"),
    "crewai": ("together",),
    "langchain": ("together", "newest"),
    "openai": ("together", "newest", "openai1"),
    "openai_agents": ("together", "newest"),
}
"""Framework -> the lanes that hold it."""

OFFLINE = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OMP_NUM_THREADS": "1",
}
"""Frameworks would otherwise report and fetch things, and wait where there is no network."""


@contextlib.contextmanager
def serving(mutation: str | None = None) -> Iterator[str]:
    """Run the server for the length of the block; give the address of its control."""
    command = [sys.executable, "-m", "integration_tests.frameworks.server"]
    command += ["--mutation", mutation] if mutation else []
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | OFFLINE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None  # because of PIPE
    try:
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the contract server ended with {server.wait()} before it listened")
        yield json.loads(line)["control"]
    finally:
        server.stdin.close()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


def run_contract(
    framework: str,
    python: Path,
    control: str,
    *,
    modes: Sequence[str] = (),
    episodes: int | None = None,
    mutation: str | None = None,
) -> list[Verdict]:
    """Run a framework's app in the environment of `python`; return what came of each mode.

    Raises:
        RuntimeError: the process failed; ends with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-m", "integration_tests.frameworks.drive", framework, "--control", control]
        command += ["--out", folder]
        command += ["--modes", *modes] if modes else []
        command += ["--episodes", str(episodes)] if episodes else []
        command += ["--mutation", mutation] if mutation else []
        printed = run_in(command)
        files = sorted(Path(folder).glob("*.json"))
        if not files:
            raise RuntimeError(f"{' '.join(command)} left no result:\n{printed[-4000:]}")
        return [judge(json.loads(file.read_text())) for file in files]


def run_in(command: Sequence[str], *, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Run a command of a lane's environment from the repository's root; return what it printed.

    Raises:
        RuntimeError: it failed or took too long; ends with what it printed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": path, "SSL_CERT_FILE": str(one_authority())}
    try:
        # CrewAI's database would be one for all processes of a user, and each waits for its lock.
        with tempfile.TemporaryDirectory() as storage:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                env=environment | {"CREWAI_STORAGE_DIR": storage},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
            )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if error.stdout else ""
        raise RuntimeError(f"{' '.join(command)} took over {timeout_seconds:g} s:\n{printed[-4000:]}") from error
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout[-4000:]}")
    return ended.stdout


@functools.cache
def one_authority() -> Path:
    """Return a file with one certificate authority: every client reads them all, in 25 ms, and none is asked here."""
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----")
    with tempfile.NamedTemporaryFile("w", suffix=".pem", delete=False) as file:
        file.write(first + end + "\n")
    atexit.register(os.unlink, file.name)
    return Path(file.name)


def main() -> int:
    """Run what the command line asks for; return 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description="Run the contract of one framework.")
    parser.add_argument("framework", choices=sorted(FRAMEWORKS))
    parser.add_argument("--lane", default="together")
    parser.add_argument("--python", type=Path, help="an interpreter in place of the lane's")
    parser.add_argument("--modes", nargs="*", default=())
    parser.add_argument("--episodes", type=int)
    options = parser.parse_args()
    python = options.python or lane(options.lane)
    with serving() as control:
        verdicts = run_contract(options.framework, python, control, modes=options.modes, episodes=options.episodes)
    for verdict in verdicts:
        print(json.dumps(verdict.row()))
        for fault in verdict.faults[:20]:
            print(f"    {fault}")
    return int(any(verdict.faults for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
