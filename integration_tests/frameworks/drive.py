"""Run a framework's app in many episodes at once, in that framework's environment, and write down what Leyden recorded.

    python -m integration_tests.frameworks.drive langchain --control http://127.0.0.1:PORT --out FOLDER

One process does one framework in all its modes, because some take ten seconds to import. Each mode leaves one JSON
file: the spans of every episode beside the server's own log. `contract` compares the two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import importlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

import leyden
from integration_tests.frameworks.mutations import CLIENT, apply
from leyden.context import RolloutContext, rollout_scope
from leyden.plugins import load_plugins
from leyden.roles import Route, Routing
from leyden.spans import Mode, Record

DISTRIBUTIONS = {
    "agent_framework": "agent-framework-core",
    "agentscope": "agentscope",
    "autogen": "autogen-agentchat",
    "crewai": "crewai",
    "langchain": "langchain",
    "openai": "openai",
    "openai_agents": "openai-agents",
}
"""Framework -> the package whose version counts."""

EPISODES = 50
TRAINED = ("worker", "critic")
POLICY = "contract"
THREADS = 5
"""Of the mode `threads`: each runs its share of the episodes on a loop of its own."""
TIMEOUT_SECONDS = 150.0
"""After it an episode that hangs is given up; the spans it left open say where it hung."""

Episode = Callable[[str], Any]
KEPT: list[Episode] = []


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    framework: str
    app: Any
    mode: str
    control: str
    episodes: int


@dataclass
class Run:
    """One mode of one framework."""

    app: Any
    mode: str
    user_url: str
    gateway_url: str
    tokens: dict[str, str]
    episodes: list[Ended] = field(default_factory=list)

    def build(self) -> Episode:
        """Make the app, as its user would."""
        return build(self.app, self.user_url, self.mode)


def build(app: Any, url: str, mode: str) -> Episode:
    """Make an app and keep it as long as the process lives.

    A client that is collected unclosed takes its sockets with it, and asyncio never hears from the next ones that
    get their numbers: apps that are dropped while their loop runs on would hang each other.
    """
    episode: Episode = app.build(url, stream=mode.endswith("-stream"), sync=mode.startswith("sync"))
    KEPT.append(episode)
    return episode


@dataclass
class Ended:
    """One episode and what was recorded of it."""

    rollout: str
    answer: str | None = None
    error: str | None = None
    """What the app raised."""
    unheard: str | None = None
    """Why a call of a trained role did not get its whole answer, as the wire says."""
    spans: list[Record] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Run a framework's app in many episodes at once.")
    parser.add_argument("framework", choices=sorted(DISTRIBUTIONS))
    parser.add_argument("--control", required=True, help="where the server listens")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, one JSON file a mode")
    parser.add_argument("--modes", nargs="*", help="all that the framework has, without")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="at once, in each mode")
    parser.add_argument("--mutation", choices=sorted(CLIENT), help="break the client's side in a known way")
    options = parser.parse_args()
    if options.mutation:
        apply(options.mutation)
    attach(options.framework)
    app = importlib.import_module(f"integration_tests.frameworks.apps.{options.framework}")
    options.out.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner() as runner:  # one loop for all modes, as in a worker: clients may be cached for it
        for mode in options.modes or modes_of(app):
            plan = Plan(options.framework, app, mode, options.control, options.episodes)
            (options.out / f"{mode}.json").write_bytes(msgspec.json.encode(run_mode(plan, runner), enc_hook=repr))


def attach(framework: str) -> None:
    """Instrument this process for one framework; plain `openai` has no adapter and needs the wire alone."""
    adapter = framework.replace("_", "-")
    leyden.instrument([adapter] if adapter in load_plugins().names("framework") else [])


def modes_of(app: Any) -> list[str]:
    """Return the app's modes and, where it has an async one, that of many loops."""
    return [*app.MODES, "threads"] if "async" in app.MODES else list(app.MODES)


def run_mode(plan: Plan, runner: asyncio.Runner) -> dict[str, object]:
    """Run a mode's episodes at once; return everything that was recorded."""
    app, mode = plan.app, plan.mode
    rollouts = [f"{mode}-{index}" for index in range(plan.episodes)]
    urls = ask(plan.control, "begin", {"framework": plan.framework})
    run = Run(app, mode, urls["user"], urls["gateway"], ask(plan.control, "admit", rollouts))
    started, cpu = time.monotonic(), time.process_time()
    if mode == "threads":
        run_on_many_loops(run, rollouts)
    else:
        runner.run(run_on_one_loop(run, rollouts))
    return {
        "framework": plan.framework,
        "version": metadata.version(DISTRIBUTIONS[plan.framework]),
        "mode": mode,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "expected": {"calls": app.CALLS, "tools": app.TOOLS, "handoffs": app.HANDOFFS},
        "trained": TRAINED,
        "episodes": run.episodes,
        "server": ask(plan.control, "end", None),
    }


def ask(control: str, what: str, body: object) -> Any:
    """Tell the server something, by a library that the wire does not watch; return its answer."""
    request = urllib.request.Request(f"{control}/{what}", json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def run_on_many_loops(run: Run, rollouts: Sequence[str]) -> None:
    """Give each thread its share of the episodes and a loop of its own."""
    shares = [rollouts[index::THREADS] for index in range(THREADS)]
    threads = [
        threading.Thread(target=lambda share=share: asyncio.run(run_on_one_loop(run, share))) for share in shares
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def run_on_one_loop(run: Run, rollouts: Sequence[str]) -> None:
    """Run episodes at once; sync ones in threads with a copy of their context, as the trainer runs them."""
    pool = ThreadPoolExecutor(len(rollouts)) if run.mode.startswith("sync") else None
    shared = run.build() if run.app.SHARED else None

    async def one(rollout_id: str) -> None:
        ended = Ended(rollout_id)
        run.episodes.append(ended)
        context = RolloutContext(
            rollout_id=rollout_id,
            attempt=1,
            mode=Mode.TRAIN,
            sink=ended.spans.append,
            routing=Routing(
                base_url=run.gateway_url,
                token=run.tokens[rollout_id],
                routes=(Route(model=POLICY, roles=TRAINED),),
            ),
            timeout_seconds=TIMEOUT_SECONDS,
        )
        task = f"[[rollout={rollout_id}]] How many rooms has the house of {rollout_id}?"
        try:
            with rollout_scope(context):
                episode = shared or run.build()
                if pool is None:
                    async with asyncio.timeout(TIMEOUT_SECONDS):
                        ended.answer = str(await episode(task))
                else:
                    copied = contextvars.copy_context()
                    loop = asyncio.get_running_loop()
                    ended.answer = str(await loop.run_in_executor(pool, copied.run, episode, task))
        except BaseException as error:
            ended.error = f"{type(error).__name__}: {error}"
            if not isinstance(error, Exception):
                raise
        if context.infrastructure_error is not None:
            ended.unheard = repr(context.infrastructure_error)
        ended.declared = sorted(context.declared_roles)

    await asyncio.gather(*map(one, rollouts))
    if pool is not None:
        pool.shutdown()


if __name__ == "__main__":
    main()
