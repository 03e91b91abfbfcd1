"""Measure what Leyden costs a framework's process for each model call.

    python -m integration_tests.frameworks.overhead langchain --control http://127.0.0.1:PORT --out FILE

One idea: the same episodes run again and again in one process, without Leyden and with it, so that each difference
is between neighbours in time; the median of them is the cost. Only the CPU time of this process counts: the server,
which answers without a model, is another one.
One trap: switching Leyden on makes its HTTP clients anew, so each batch begins with an episode that is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import leyden
from integration_tests.frameworks.drive import DISTRIBUTIONS, TRAINED, Episode, ask, attach, build, modes_of
from leyden.context import RolloutContext, rollout_scope
from leyden.roles import Route, Routing
from leyden.spans import Mode

TOKEN_CHARACTERS = 4
"""The server's engine gives out so many characters at once, as an engine with a real tokenizer would give a token."""

ANSWER_TOKENS = 50
PAIRS = 16
EPISODES = 2
"""In each batch."""

USER_MODEL, USER_KEY = "user-model", "user-key"


def main() -> None:
    """Write one JSON object: mode -> milliseconds of CPU a call. Frameworks print things of their own."""
    parser = argparse.ArgumentParser(description="Measure what Leyden costs a framework's process.")
    parser.add_argument("framework", choices=sorted(DISTRIBUTIONS))
    parser.add_argument("--control", required=True, help="where the server listens")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--modes", nargs="*", help="all that the framework has, without")
    parser.add_argument("--tokens", type=int, default=ANSWER_TOKENS, help="length of every answer")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how often both ways are measured")
    options = parser.parse_args()
    app = importlib.import_module(f"integration_tests.frameworks.apps.{options.framework}")
    asked = {"framework": options.framework, "width": options.tokens * TOKEN_CHARACTERS}
    url = ask(options.control, "begin", asked)["user"]
    found = {}
    for mode in options.modes or modes_of(app):
        # A thread and loop of its own for each mode: that is the mode `threads`, and does no other one harm.
        with ThreadPoolExecutor(1) as pool:
            bench = Bench(options.framework, app, mode, url)
            found[mode] = pool.submit(bench.measure, options.pairs).result()
    options.out.write_text(json.dumps(found))


class Bench:
    """One mode of one framework."""

    def __init__(self, framework: str, app: Any, mode: str, url: str) -> None:
        self.framework = framework
        self.app = app
        self.url = url
        self.mode = mode
        self.calls: int = sum(app.CALLS.values())
        self.shared: Episode | None = None

    def measure(self, pairs: int) -> dict[str, float]:
        """Return milliseconds of CPU a call: without Leyden, and what it adds."""
        plain, recorded = [], []
        gc.freeze()  # the modules of a framework would make each collection below slow
        with asyncio.Runner() as runner:
            self.shared = build(self.app, self.url, self.mode) if self.app.SHARED else None
            for _ in range(pairs):
                plain.append(self.batch(runner, in_rollout=False))
                attach(self.framework)
                recorded.append(self.batch(runner, in_rollout=True))
                leyden.uninstrument()
        # The first pair is left out: it warms caches up.
        added = [one - other for one, other in zip(recorded[1:], plain[1:], strict=True)]
        return {"plain_ms": statistics.median(plain[1:]), "added_ms": statistics.median(added)}

    def batch(self, runner: asyncio.Runner, *, in_rollout: bool) -> float:
        """Return the milliseconds of CPU a call of a few episodes, one after the other."""
        self.episode(runner, in_rollout=in_rollout)
        gc.collect()
        started = time.process_time()
        for _ in range(EPISODES):
            self.episode(runner, in_rollout=in_rollout)
        return 1000.0 * (time.process_time() - started) / (EPISODES * self.calls)

    def episode(self, runner: asyncio.Runner, *, in_rollout: bool) -> None:
        """Run one episode."""
        task = "[[rollout=measured]] How many rooms has the house?"
        if self.mode.startswith("sync"):
            with self.scope(in_rollout):
                (self.shared or build(self.app, self.url, self.mode))(task)
            return

        async def run() -> None:
            with self.scope(in_rollout):
                await (self.shared or build(self.app, self.url, self.mode))(task)

        runner.run(run())

    @contextlib.contextmanager
    def scope(self, in_rollout: bool) -> Iterator[None]:
        """Hold a rollout that routes the trained roles to the same server, or none."""
        if not in_rollout:
            yield
            return
        records: list[object] = []
        routes = (Route(model=USER_MODEL, roles=TRAINED),)
        context = RolloutContext(
            rollout_id="measured",
            attempt=1,
            mode=Mode.TRAIN,
            sink=records.append,
            routing=Routing(base_url=self.url, token=USER_KEY, routes=routes),
        )
        with rollout_scope(context):
            yield


if __name__ == "__main__":
    main()
