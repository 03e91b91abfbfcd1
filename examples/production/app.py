"""The text-to-SQL app in production: it serves customers, and is recorded, or runs on what was learnt.

    export OPENAI_BASE_URL=http://127.0.0.1:8001/v1 OPENAI_API_KEY=any     # the closed model
    python -m examples.production.app record runs/production               # 600 customers; some say if they are pleased
    python -m examples.production.app deploy OUT http://127.0.0.1:8000/v1  # 200 others, on the trained model

Recording is two lines of it: `leyden.record`, and `with recording.rollout(task)` around a request. A customer's thumb
comes when the rollout is long over, with its id.
"""

import argparse
import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import leyden
from examples.text_to_sql import questions
from examples.text_to_sql.agent import graph
from examples.text_to_sql.databases import path
from examples.text_to_sql.reward import reward

CUSTOMERS = 600
TELL = 0.6
"""Share of the customers that say whether they are pleased."""
HELD_OUT = 200
AT_ONCE = 16

Task = dict[str, str]


async def solve(task: Task) -> str:
    """Answer one question; this is the app."""
    state = await graph.ainvoke({"question": task["question"], "database": str(path(task["database"]))})
    return state["sql"]


async def serve_all(tasks: Sequence[Task], serve: Callable[[Task], Awaitable[float]]) -> float:
    """Serve customers, some at a time; return the share that is served right."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(task: Task) -> float:
        async with room:
            return await serve(task)

    return sum(await asyncio.gather(*map(one, tasks))) / len(tasks)


def record(folder: Path, count: int) -> float:
    """Serve customers and record it; return the share that is served right."""
    draw = random.Random(0)
    with leyden.record(folder) as recording:

        async def serve(task: Task) -> float:
            with recording.rollout(task) as rollout:
                rollout.output = await solve(task)
            pleased = reward(task, str(rollout.output))
            if draw.random() < TELL:  # hours later, from another process, as it may be
                leyden.reward(rollout.rollout_id, pleased, store=folder)
            return pleased

        share = asyncio.run(serve_all([one.task for one in questions.load("train", count=count)], serve))
        recording.flush()
        print(f"recorded {recording.stored} rollouts into {folder}; dropped: {dict(recording.dropped) or 'none'}")
    return share


def deployed(export: Path | None, base_url: str | None, count: int) -> float:
    """Serve customers with questions that nobody has asked before; return the share that is served right."""

    async def serve(task: Task) -> float:
        return reward(task, await solve(task))

    with contextlib.nullcontext() if export is None else leyden.deploy(export, base_url):
        return asyncio.run(serve_all([one.task for one in questions.load("tuning", count=count)], serve))


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("record")
    one.add_argument("folder", type=Path)
    one.add_argument("--customers", type=int, default=CUSTOMERS)
    one = modes.add_parser("deploy", help="without a folder: as the app is, on whatever OPENAI_BASE_URL points at")
    one.add_argument("export", type=Path, nargs="?")
    one.add_argument("base_url", nargs="?")
    one.add_argument("--customers", type=int, default=HELD_OUT)
    options = parser.parse_args()
    if options.mode == "record":
        share = record(options.folder, options.customers)
    else:
        share = deployed(options.export, options.base_url, options.customers)
    print(f"served right: {share:.3f} of {options.customers}")


if __name__ == "__main__":
    main()
