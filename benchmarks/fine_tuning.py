"""Fine-tuning and then RL against RL alone, at equal rollouts, on text-to-SQL.

Every variant gets the same tasks in the same order, 20 steps of 16 tasks with 8 rollouts, one learning rate and its
own defaults otherwise. What differs is the loss: rejection sampling for the first steps and then GRPO; either alone;
and DPO on the best and worst rollout of each group, alone and in front of GRPO. Greedy accuracy on held-out questions
is measured before and every second step; nothing was chosen on them.

    python -m benchmarks.fine_tuning                 # three seeds
    python -m benchmarks.fine_tuning --draw          # table and picture of the results that are there

Results: benchmarks/results/fine_tuning.json and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.arms import estimators
from benchmarks.in_process import Run
from leyden import Chain, Phase
from leyden.interfaces import Algorithm, Group
from leyden.training.summary import package_versions
from leyden.usage import load_average, usage
from leyden_plugins.algorithms.preference import DPO
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.algorithms.sft import RejectionSampling

RESULTS = Path(__file__).parent / "results"
STEPS = 20
FIRST = 5
"""Steps of the first phase."""
EVERY = 2
"""Steps between two looks at the held-out questions."""
LEARNING_RATE = 3e-4
"""The demo's; constant."""
SEEDS = (1, 2, 3)
"""Seed 0 was looked at while this was made: at 1e-3 all variants were near the top after five steps."""
SHOWN = (0, 4, 8, 12, 16, 20)
"""Steps in the table."""
PROCESSES = 2

VARIANTS: dict[str, Callable[[], Algorithm]] = {
    "RL": lambda: GRPO(group_size=8),
    "SFT, then RL": lambda: Chain(
        Phase(RejectionSampling(group_size=8), steps=FIRST), Phase(GRPO(group_size=8), steps=STEPS - FIRST)
    ),
    "SFT": lambda: RejectionSampling(group_size=8),
    "DPO, then RL": lambda: Chain(
        Phase(DPO(group_size=8), steps=FIRST), Phase(GRPO(group_size=8), steps=STEPS - FIRST)
    ),
    "DPO": lambda: DPO(group_size=8),
}

Result = dict[str, object]


@dataclass(kw_only=True)
class Watched(Run):
    """A run that is evaluated on held-out questions every few steps."""

    held_out: Sequence[object]
    accuracies: list[float] = field(default_factory=list)
    """Before the first step, then every `EVERY` steps."""

    async def look(self) -> None:
        """Evaluate greedily."""
        found = await self.evaluate(self.held_out)
        self.accuracies.append(fmean(found))

    async def finish_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Publish, and look when it is time."""
        await super().finish_step(step, groups, metrics)
        if step % EVERY == 0:
            await self.look()


async def train(variant: str, seed: int) -> Result:
    """Train one variant with one seed."""
    plain = estimators.session(seed, steps=STEPS)
    session = Watched(
        agent=plain.agent,
        tasks=plain.tasks,
        policies=[replace(policy, learning_rate=LEARNING_RATE) for policy in plain.policies],
        model=plain.model,
        total_steps=STEPS,
        seed=seed,
        held_out=estimators.held_out(),
    )
    await session.open()
    await session.look()
    await session.train(VARIANTS[variant]())
    await session.close()
    return {"curve": session.curve, "held_out": session.accuracies, "rollouts": session.rollouts}


def job(variant: str, seed: int) -> Result:
    """Run one variant with one seed; in a worker process."""
    import torch

    torch.set_num_threads(1)
    began, cpu = time.monotonic(), usage().cpu_seconds
    found = asyncio.run(train(variant, seed))
    return found | {"seed": seed, "seconds": time.monotonic() - began, "cpu_seconds": usage().cpu_seconds - cpu}


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def column(results: Sequence[Result], name: str, at: int) -> list[float]:
    """Return one place of each seed's list."""
    return [one[name][at] for one in results]  # type: ignore[index]  # a list of floats


def table(variants: Mapping[str, Sequence[Result]]) -> str:
    """Return the table in Markdown: greedy accuracy on held-out questions, mean and standard deviation over seeds."""
    heads = ["variant", *(f"step {step}" for step in SHOWN), "rollouts", "CPU s", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for variant, results in variants.items():
        cells = [spread(column(results, "held_out", step // EVERY)) for step in SHOWN]
        rollouts = {str(one["rollouts"]) for one in results}
        seconds = fmean(one["cpu_seconds"] for one in results)  # type: ignore[misc]  # floats
        lines.append(f"| {' | '.join([variant, *cells, ', '.join(rollouts), f'{seconds:.0f}', str(len(results))])} |")
    return "\n".join(lines)


def draw(variants: Mapping[str, Sequence[Result]]) -> None:
    """Write the picture: held-out accuracy and the training rollouts' reward, means with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for number, (variant, results) in enumerate(variants.items()):
        color = pyplot.get_cmap("tab10")(number)
        for axes, name, steps in (
            (left, "held_out", range(0, STEPS + 1, EVERY)),
            (right, "curve", range(1, STEPS + 1)),
        ):
            by_step = [column(results, name, at) for at in range(len(steps))]
            axes.plot(
                steps, [fmean(values) for values in by_step], label=variant, color=color, marker="o" * (axes is left)
            )
            axes.fill_between(steps, [min(v) for v in by_step], [max(v) for v in by_step], alpha=0.12, color=color)
    left.set(xlabel="step", ylabel="accuracy", title="held-out questions, greedy", ylim=(0.4, 1.02))
    right.set(xlabel="step", title="the step's rollouts, sampled at temperature 1")
    for axes in (left, right):
        axes.set_xticks(range(0, STEPS + 1, 4))
        axes.axvline(FIRST, color="grey", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    left.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "fine_tuning.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--draw", action="store_true", help="only write table and picture again")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    written = RESULTS / "fine_tuning.json"
    if not options.draw:
        began = time.monotonic()
        found: dict[str, object] = {
            "measured": datetime.now(UTC).isoformat(timespec="minutes"),
            "versions": package_versions(),
            "load_before": load_average(),
        }
        variants: dict[str, list[Result]] = {variant: [] for variant in options.variants}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            running = {pool.submit(job, variant, seed): variant for seed in options.seeds for variant in variants}
            for done in as_completed(running):
                result = done.result()
                variants[running[done]].append(result)
                accuracy = result["held_out"][-1]  # type: ignore[index]  # a list of floats
                print(
                    f"{running[done]} / seed {result['seed']}: {accuracy:.3f} in {result['seconds']:.0f} s", flush=True
                )
        for results in variants.values():
            results.sort(key=lambda one: one["seed"])  # type: ignore[arg-type, return-value]  # whole numbers
        RESULTS.mkdir(exist_ok=True)
        written.write_text(json.dumps(found | {"variants": variants}, indent=1) + "\n")
        print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    known = json.loads(written.read_text())["variants"]
    draw(known)
    print(table(known))


if __name__ == "__main__":
    main()
