"""Searches for better prompts: Leyden's GEPA and beam search beside Agent Lightning 0.3's APO, at equal rollouts.

Three tasks on a model server that runs here and decides everything by hashes (`benchmarks/prompt_tasks/`): a support
desk with one role, the room selector of Agent Lightning's examples, and a desk with three roles, which Agent Lightning
cannot optimise together: it gets the reader alone, a role whose prompt can win as much as any single one. What a search
may spend is what APO spends with the settings of its room-selector example and its default of three rounds. A search's
best prompts after so many rollouts are scored on held-out tasks, which no search sees. Our beam search runs twice: with
APO's three rounds, which cost it less because it finds repeated rollouts in its store, and until the budget is spent.

    python -m benchmarks.prompts                 # three seeds
    python -m benchmarks.prompts --draw          # table and picture of the results that are there

APO waits in its polling most of the time, so two searches run side by side: one of APO's and one of Leyden's.
It takes half an hour on two cores, nearly all of it APO's.
Results: benchmarks/results/prompts.json and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from threading import Event
from typing import Any

from benchmarks.prompt_tasks.problem import Message, Problem
from benchmarks.prompt_tasks.problems import PROBLEMS
from benchmarks.prompt_tasks.runs import Report, killed, search
from leyden.training.summary import package_versions
from leyden.usage import load_average
from scripts.environments import agent_lightning

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
HELD_OUT = 200
"""Tasks that score a prompt."""
CONCURRENCY = 8
"""Rollouts side by side; as many runners has the room-selector example."""
APO_OPTIONS = {"beam_width": 2, "branch_factor": 2, "beam_rounds": 3, "val_batch_size": 10, "gradient_batch_size": 4}
BEAM_OPTIONS = {"beam_width": 2, "branch_factor": 2, "minibatch": 4}
"""APO's; ours compares every candidate on all selection tasks and has no first look at few of them."""
APO_ROLES = {"desk": "clerk", "rooms": "scheduler", "three_roles": "reader"}
KILLED = "three_roles"


@dataclass(frozen=True)
class Arm:
    """A method of search."""

    title: str
    module: str
    options: Mapping[str, object] = field(default_factory=dict)
    search: Mapping[str, object] = field(default_factory=dict)
    """The method's own options."""


ARMS = {
    "gepa": Arm("Leyden GEPA", "leyden_arm", {"method": "GEPA"}),
    "beam": Arm("Leyden beam search, 3 rounds", "leyden_arm", {"method": "BeamSearch"}, BEAM_OPTIONS | {"rounds": 3}),
    "long_beam": Arm("Leyden beam search", "leyden_arm", {"method": "BeamSearch"}, BEAM_OPTIONS | {"rounds": 100}),
    "apo": Arm("Agent Lightning APO", "agent_lightning_arm"),
}


def budget(problem: Problem) -> int:
    """Return what APO spends: the seed, then by round its critiques, its candidates on a few tasks, the best on all."""
    selection = problem.search_tasks - problem.search_tasks // 2
    width, branches = APO_OPTIONS["beam_width"], APO_OPTIONS["branch_factor"]
    made = width * branches
    spent = selection
    for number in range(APO_OPTIONS["beam_rounds"]):
        beam = width if number else 1
        spent += made * APO_OPTIONS["gradient_batch_size"] + (beam + made) * APO_OPTIONS["val_batch_size"] + selection
    return spent


async def answered(problem: Problem, prompts: Mapping[str, str], role: str, messages: Any, tools: Any = ()) -> Message:
    """Answer as the server would, without it."""
    return problem.answer(role, prompts[role], messages, bool(tools))


def held_out(problem: Problem, prompts: Mapping[str, str], seed: int) -> float:
    """Return the mean score on tasks that no search has seen."""

    async def scores() -> list[float]:
        ask = partial(answered, problem, {**problem.openings, **prompts})
        return [await problem.solve(task, ask) for task in problem.tasks(seed, "heldout", HELD_OUT)]

    return fmean(asyncio.run(scores()))


def job(name: str, arm: str, seed: int, apo: str) -> Report:
    """Run one search; return its report with the scores of its best prompts."""
    problem = PROBLEMS[name]
    settings: dict[str, object] = {"problem": name, "concurrency": CONCURRENCY, **ARMS[arm].options}
    if arm == "apo":
        settings |= {"role": APO_ROLES[name], "search": APO_OPTIONS}
    else:
        settings["search"] = {"budget": budget(problem), **ARMS[arm].search}
    report = search(apo if arm == "apo" else sys.executable, ARMS[arm].module, settings, seed=seed)
    curve = [(0, held_out(problem, problem.openings, seed))]
    curve += [(one["rollouts"], held_out(problem, one["prompts"], seed)) for one in report["history"]]
    best = report.pop("history")[-1]["prompts"]
    return report | {"curve": curve, "prompts": best, "full_prompts": held_out(problem, problem.full, seed)}


def lane(
    jobs: Sequence[tuple[str, str, int]], apo: str, found: dict[str, dict[str, list[Report]]], stop: Event
) -> None:
    """Run searches one after the other; leave the rest when told to stop."""
    for name, arm, seed in jobs:
        if stop.is_set():
            return
        report = job(name, arm, seed, apo)
        found[name][arm].append(report)
        score = report["curve"][-1][1]
        print(f"{name} / {arm} / seed {seed}: {score:.3f} in {report['search_seconds']:.0f} s", flush=True)


def measure(seeds: Sequence[int]) -> Report:
    """Run everything."""
    apo = str(agent_lightning())
    began, load = time.monotonic(), load_average()
    found: dict[str, dict[str, list[Report]]] = {name: {arm: [] for arm in ARMS} for name in PROBLEMS}
    every = [(name, arm, seed) for name in PROBLEMS for seed in seeds for arm in ARMS]
    stop = Event()
    with ThreadPoolExecutor(2) as pool:
        lanes = [[one for one in every if (one[1] == "apo") is is_apo] for is_apo in (True, False)]
        try:
            for done in as_completed([pool.submit(lane, jobs, apo, found, stop) for jobs in lanes]):
                done.result()
        finally:
            stop.set()
    options = {"budget": budget(PROBLEMS[KILLED])}
    return {
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": package_versions() | {"gepa": importlib.metadata.version("gepa"), "agentlightning": "0.3.0"},
        "seeds": list(seeds),
        "held_out_tasks": HELD_OUT,
        "concurrency": CONCURRENCY,
        "settings": {name: APO_OPTIONS if name == "apo" else arm.search for name, arm in ARMS.items()},
        "problems": found,
        "killed": killed(KILLED, options, seed=seeds[0], concurrency=CONCURRENCY),
        "load": [load, load_average()],
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def at(curve: Sequence[Sequence[float]], rollouts: float) -> float:
    """Return the score of what was best after so many rollouts."""
    return [score for spent, score in curve if spent <= rollouts][-1]


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def title(name: str, arm: str) -> str:
    """Return an arm's name in the table."""
    is_partial = arm == "apo" and len(PROBLEMS[name].openings) > 1
    return ARMS[arm].title + f" (cannot do several; {APO_ROLES[name]} only)" * is_partial


def table(found: Report) -> str:
    """Return the table in Markdown."""
    heads = ["task", "method", "before", "a third", "two thirds", "end", "rollouts", "reflections", "search s", "all s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, arms in found["problems"].items():
        most = budget(PROBLEMS[name])
        for arm, reports in arms.items():
            cells = [spread([at(one["curve"], most * part / 3) for one in reports]) for part in range(4)]
            cells += [f"{fmean(one[key] for one in reports):.0f}" for key in ("rollouts", "reflection_calls")]
            cells += [f"{fmean(one[key] for one in reports):.0f}" for key in ("search_seconds", "process_seconds")]
            lines.append(f"| {' | '.join([PROBLEMS[name].title, title(name, arm), *cells])} |")
        full = spread([one["full_prompts"] for one in arms["gepa"]])
        lines.append(f"| {PROBLEMS[name].title} | all rules, what can be reached | | | | {full} | | | | |")
    return "\n".join(lines)


def draw(found: Report) -> None:
    """Write the picture: held-out score of the best prompts against rollouts, means with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, len(found["problems"]), figsize=(15, 4.8), sharey=True)
    for axes, (name, arms) in zip(every, found["problems"].items(), strict=True):
        places = range(budget(PROBLEMS[name]) + 1)
        for number, (arm, reports) in enumerate(arms.items()):
            scores = [[at(one["curve"], place) for one in reports] for place in places]
            color = pyplot.get_cmap("tab10")(number)
            label = ARMS[arm].title + f" ({APO_ROLES[name]} only)" * (title(name, arm) != ARMS[arm].title)
            axes.plot(places, [fmean(values) for values in scores], label=label, color=color)
            axes.fill_between(places, [min(v) for v in scores], [max(v) for v in scores], alpha=0.12, color=color)
        full = fmean(one["full_prompts"] for one in arms["gepa"])
        axes.axhline(full, color="grey", linewidth=0.8, linestyle=":", label="all rules")
        axes.set(xlabel="rollouts", title=PROBLEMS[name].title, ylim=(-0.02, 1.3))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    every[0].set_ylabel(f"score on {found['held_out_tasks']} held-out tasks")
    figure.tight_layout()
    figure.savefig(RESULTS / "prompts.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="only write table and picture again")
    options = parser.parse_args()
    written = RESULTS / "prompts.json"
    if not options.draw:
        RESULTS.mkdir(exist_ok=True)
        written.write_text(json.dumps(measure(options.seeds), indent=1) + "\n")
    found = json.loads(written.read_text())
    draw(found)
    print(table(found))
    print(f"\nkilled and resumed: {json.dumps(found['killed'], indent=1)}\n{found['minutes']} minutes")


if __name__ == "__main__":
    main()
