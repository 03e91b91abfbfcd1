"""Measure the learning core: arms that differ in one thing each, over several seeds.

The engine is called in process with plain async agents (`benchmarks/in_process.py`); the arm `path` repeats one of
them through worker, wire, gateway and store. Every job (arm, variant, seed) runs in one of two processes.

    python -m benchmarks.learning                      # everything, three seeds
    python -m benchmarks.learning --arms credit --seeds 0
    python -m benchmarks.learning --draw               # tables and pictures of the results that are there

Results: benchmarks/results/learning.json and one picture an arm; the tables go to docs/learning.md.
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
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev

from leyden.training.summary import package_versions
from leyden.usage import load_average, usage

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "learning.md"
INTRODUCTION = """\
# What the learning core does

Measured by `make bench-learning` (`benchmarks/learning.py` writes this page) on two virtual CPU cores, with tiny models
that the benchmark makes or that lie in `examples/`. The engine is called in process with plain async agents
(`benchmarks/in_process.py`) unless it says otherwise. Figures are means and standard deviations over seeds; settings
were chosen on seed 0, which is in no table. Bands in the pictures are the range over seeds. Single figures, with
versions, are in `benchmarks/results/learning.json`.
"""
MODELS = ROOT / "build" / "benchmarks"
ARMS = ("tokenisation", "credit", "estimators", "policies", "asynchronous", "path")
SEEDS = (1, 2, 3)
"""Seed 0 was looked at while the arms were made."""
PROCESSES = 2

Result = dict[str, object]


def job(arm: str, variant: str, seed: int) -> Result:
    """Run one variant with one seed; in a worker process."""
    import torch

    torch.set_num_threads(1)
    began, cpu = time.monotonic(), usage().cpu_seconds
    found: Result = asyncio.run(import_module(f"benchmarks.arms.{arm}").run(variant, seed, MODELS))
    return found | {"seed": seed, "seconds": time.monotonic() - began, "cpu_seconds": usage().cpu_seconds - cpu}


def run_all(arms: Sequence[str], seeds: Sequence[int], keep: Callable[[str, str, Result], None]) -> None:
    """Run every job of the arms; `keep` is given each result as it comes."""
    modules = {arm: import_module(f"benchmarks.arms.{arm}") for arm in arms}
    MODELS.mkdir(parents=True, exist_ok=True)
    for module in modules.values():
        module.prepare(MODELS)  # once, before several processes want the same model
    jobs = [
        (arm, variant, seed)
        for arm, module in modules.items()
        for variant in module.VARIANTS
        for seed in getattr(module, "SEEDS", seeds)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        running = {pool.submit(job, *one): one for one in jobs}
        for done in as_completed(running):
            arm, variant, seed = running[done]
            result = done.result()
            keep(arm, variant, result)
            print(f"{arm} / {variant} / seed {seed}: {result['final']:.3f} in {result['seconds']:.0f} s", flush=True)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def _cell(values: Sequence[float]) -> str:
    """Return values that may all be the same whole number, or not be there."""
    if not values:
        return ""
    return str(values[0]) if len(set(values)) == 1 and isinstance(values[0], int) else spread(values)


def table(arm: str, variants: Mapping[str, Sequence[Result]]) -> str:
    """Return an arm's table in Markdown: mean and standard deviation over seeds."""
    module = import_module(f"benchmarks.arms.{arm}")
    extra = sorted({name for results in variants.values() for one in results for name in one} - COMMON)
    extra = [
        name for name in extra if any(isinstance(one.get(name), int | float) for r in variants.values() for one in r)
    ]
    heads = ["variant", "before", "final", "evaluated", "first step", "last three steps", *extra, "CPU s", "seeds"]
    lines = [f"## {module.TITLE}", "", " | ".join(["", *heads, ""]).strip(), "|" + "---|" * len(heads)]
    for variant, results in variants.items():
        curves = [one["curve"] for one in results]
        cells = [
            variant,
            spread([one["before"] for one in results]),  # type: ignore[misc]  # a float
            spread([one["final"] for one in results]),  # type: ignore[misc]  # as above
            f"{results[0]['final_n']} a seed",
            spread([curve[0] for curve in curves]),  # type: ignore[index]  # a list of floats
            spread([fmean(curve[-3:]) for curve in curves]),  # type: ignore[index]  # as above
        ]
        for name in extra:
            known = [one[name] for one in results if name in one]
            cells.append(_cell(known))  # type: ignore[arg-type]  # floats
        cells += [f"{fmean([one['cpu_seconds'] for one in results]):.0f}", str(len(results))]  # type: ignore[misc]
        lines.append("| " + " | ".join(cells) + " |")
    verdict = [module.verdict(variants), ""] if hasattr(module, "verdict") else []
    picture = f"![{module.TITLE}](../benchmarks/results/learning_{arm}.png)"
    return "\n".join([*lines, "", *verdict, (module.__doc__ or "").strip(), "", picture, ""])


COMMON = {"curve", "before", "final", "final_n", "seed", "seconds", "cpu_seconds"}


def draw(arm: str, variants: Mapping[str, Sequence[Result]]) -> None:
    """Write an arm's picture: each variant's mean curve, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    module = import_module(f"benchmarks.arms.{arm}")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for number, (variant, results) in enumerate(variants.items()):
        curves = [one["curve"] for one in results]
        steps = range(1, len(curves[0]) + 1)  # type: ignore[arg-type]  # a list of floats
        by_step = list(zip(*curves, strict=True))  # type: ignore[call-overload]  # as above
        color = pyplot.get_cmap("tab20" if len(variants) > 10 else "tab10")(number)
        axes.plot(steps, [fmean(values) for values in by_step], label=variant, color=color)
        axes.fill_between(steps, [min(v) for v in by_step], [max(v) for v in by_step], alpha=0.12, color=color)
    axes.set(xlabel="step", ylabel="mean score of the step's rollouts", title=module.TITLE, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2 if len(variants) > 6 else 1)
    figure.tight_layout()
    figure.savefig(RESULTS / f"learning_{arm}.png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="only write tables and pictures again")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    written = RESULTS / "learning.json"
    known = json.loads(written.read_text()) if written.exists() else {"arms": {}}
    if not options.draw:
        began = time.monotonic()
        for arm in options.arms:
            module = import_module(f"benchmarks.arms.{arm}")
            known["arms"][arm] = {
                "title": module.TITLE,
                "measured": datetime.now(UTC).isoformat(timespec="minutes"),
                "versions": package_versions(),
                "load_before": load_average(),
                "variants": {variant: [] for variant in module.VARIANTS},
            }

        def keep(arm: str, variant: str, result: Result) -> None:
            results = known["arms"][arm]["variants"][variant]
            results.append(result)
            results.sort(key=lambda one: one["seed"])
            written.write_text(json.dumps(known, indent=1) + "\n")

        RESULTS.mkdir(exist_ok=True)
        run_all(options.arms, options.seeds, keep)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    tables = []
    for arm in ARMS:
        if arm in known["arms"]:
            tables.append(table(arm, known["arms"][arm]["variants"]))
            draw(arm, known["arms"][arm]["variants"])
    PAGE.write_text("\n".join([INTRODUCTION, *tables]))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
