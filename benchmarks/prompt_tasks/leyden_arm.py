"""Leyden's searches on a task of the benchmark, as a program: it can be killed, and started again to resume.

python -m benchmarks.prompt_tasks.leyden_arm '{"problem": "desk", "method": "GEPA", ...}'
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

import leyden
from benchmarks.prompt_tasks import apps
from benchmarks.prompt_tasks.problem import Task
from benchmarks.prompt_tasks.problems import PROBLEMS
from leyden_plugins.algorithms.prompt import GEPA, BeamSearch, PromptSearch, Reflection, SearchRecord
from leyden_plugins.algorithms.prompt.command import read_searches

METHODS: dict[str, type[PromptSearch]] = {"GEPA": GEPA, "BeamSearch": BeamSearch}


def history(record: SearchRecord) -> list[dict[str, object]]:
    """Return what was best after each candidate, with the rollouts that were spent by then."""
    found: list[dict[str, object]] = []
    best = record.candidates[0]
    for one in record.candidates:
        best = one if one.score > best.score else best
        found.append({"rollouts": one.rollouts, "prompts": best.prompts})
    return found


def main() -> None:
    """Search, and write the report."""
    # problem, method, server, seed, concurrency, search (the method's own options), run (a folder), report (a file)
    options: dict[str, Any] = json.loads(sys.argv[1])
    problem = PROBLEMS[options["problem"]]
    base_url = f"{options['server']}/v1"

    async def app(task: Task) -> float:
        async with AsyncOpenAI(base_url=base_url, api_key="none") as client:
            return await apps.run(problem, task, problem.openings, client, leyden.role)

    reflection = Reflection(f"{problem.name}/reflection", base_url=base_url, api_key_env=None)
    run = Path(options["run"])
    with leyden.Trainer(
        app,
        algorithm=METHODS[options["method"]](reflection=reflection, seed=options["seed"], **options["search"]),
        tasks=problem.tasks(options["seed"], "search", problem.search_tasks),
        prompts=problem.openings,
        workers=0,  # the app only waits for its model
        concurrency=options["concurrency"],
        run=run,
        sinks=(),
        seed=options["seed"],
    ) as trainer:
        trainer.fit(resume=run.exists())
    [record] = asyncio.run(read_searches(run))
    report = {"history": history(record), "rollouts": record.rollouts, "ended": record.ended}
    Path(options["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
