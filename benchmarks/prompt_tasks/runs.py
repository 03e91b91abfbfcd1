"""Starts the programs of the benchmark: a model server for each search, the search itself, and a kill in its middle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.prompt_tasks.problems import PROBLEMS
from benchmarks.prompt_tasks.server import REFLECTION
from leyden.spans import FINISHED, Mode
from leyden.sqlite import SQLiteStore

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 900.0
"""A search that takes longer has failed."""

Options = Mapping[str, object]
Report = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A model server that runs."""

    address: str

    def log(self) -> list[dict[str, Any]]:
        """Return every answered request, in order."""
        with urllib.request.urlopen(f"{self.address}/log", timeout=30) as answer:
            found: list[dict[str, Any]] = json.loads(answer.read())
        return found


@contextmanager
def serving(seed: int) -> Iterator[Server]:
    """Run a model server of its own for the length of the block."""
    command = [sys.executable, "-m", "benchmarks.prompt_tasks.server", "--seed", str(seed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(process.stdout.readline().strip())
        finally:
            process.terminate()


@contextmanager
def program(python: str, module: str, options: Options, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run an arm; what is left of it and of its own processes is killed at the end."""
    command = [python, "-m", f"benchmarks.prompt_tasks.{module}", json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as written:  # in the log's folder, for Agent Lightning leaves a file where it is started
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=written, stderr=written, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def search(python: str, module: str, options: Options, *, seed: int) -> Report:
    """Run one search against a server of its own; return its report, and what it cost by the server's count.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote last.
    """
    with serving(seed) as server, tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log.txt"
        told = {**options, "seed": seed, "server": server.address, "report": str(report), "run": f"{folder}/run"}
        began = time.monotonic()
        with program(python, module, told, log) as process:
            status = process.wait(timeout=LONGEST_SECONDS)
        seconds = time.monotonic() - began
        if status or not report.exists():
            raise RuntimeError(f"{module} ended with {status}: {log.read_text(errors='replace')[-2000:]}")
        asked = server.log()
        found: Report = json.loads(report.read_text())
    reflections = sum(is_reflection(one) for one in asked)
    return found | {
        "seed": seed,
        "requests": len(asked) - reflections,
        "reflection_calls": reflections,
        "process_seconds": round(seconds, 1),
        "search_seconds": round(asked[-1]["at"] - asked[0]["at"], 1),
    }


def is_reflection(entry: Mapping[str, Any]) -> bool:
    """Say whether a request asked for a better prompt or a critique."""
    return str(entry["model"]).endswith(f"/{REFLECTION}")


def finished(run: Path) -> dict[str, object]:
    """Return the finished rollouts of a search by id, with when they ended."""

    async def read() -> dict[str, object]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            found = await store.rollouts(mode=Mode.SEARCH)
        return {one.rollout_id: one.ended_ns for one in found if one.state in FINISHED}

    return asyncio.run(read())


def killed(problem: str, search_options: Options, *, seed: int, concurrency: int) -> Report:
    """Kill a search when half of its requests were answered, resume it, and compare with one that was left alone."""
    options = {"problem": problem, "method": "GEPA", "concurrency": concurrency, "search": search_options, "seed": seed}
    whole = search(sys.executable, "leyden_arm", options, seed=seed)
    half = (whole["requests"] + whole["reflection_calls"]) // 2
    with serving(seed) as server, tempfile.TemporaryDirectory() as folder:
        run, report, log = Path(folder) / "run", Path(folder) / "report.json", Path(folder) / "log.txt"
        told = {**options, "server": server.address, "report": str(report), "run": str(run)}
        with program(sys.executable, "leyden_arm", told, log) as process:
            while len(server.log()) < half:
                if process.poll() is not None:
                    raise RuntimeError(f"the search ended before its kill: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(1.0)  # what the server still works on
        answered = len(server.log())
        before = finished(run)
        with program(sys.executable, "leyden_arm", told, log) as process:
            status = process.wait(timeout=LONGEST_SECONDS)
        if status:
            raise RuntimeError(f"the resumed search ended with {status}: {log.read_text(errors='replace')[-2000:]}")
        after = finished(run)
        asked = server.log()
        ended_alike = json.loads(report.read_text())["history"] == whole["history"]
    resumed = asked[answered:]
    return {
        "problem": PROBLEMS[problem].title,
        "rollouts": whole["rollouts"],
        "requests_left_alone": whole["requests"],
        "reflection_calls_left_alone": whole["reflection_calls"],
        "finished_at_the_kill": len(before),
        "of_these_run_again": sum(after.get(name) != ended for name, ended in before.items()),
        "requests_before_the_kill": sum(not is_reflection(one) for one in asked[:answered]),
        "requests_after_it": sum(not is_reflection(one) for one in resumed),
        "requests_more_than_left_alone": sum(not is_reflection(one) for one in asked) - whole["requests"],
        "reflection_calls_in_all": sum(map(is_reflection, asked)),
        "ends_as_if_left_alone": ended_alike,
    }
