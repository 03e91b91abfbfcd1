"""Measure the demo: three seeds of training, controls, and the final bucket, which nothing else opens.

Every run is a process of its own (`benchmarks/demo_variant.py`), one after the other. The final questions are drawn
with a seed chosen now, and printed. Intervals are paired bootstrap intervals over questions; accuracies are greedy.

    python -m benchmarks.demo                    # about 9 minutes on 2 cores
    python -m benchmarks.demo --no-controls      # the demo's own three seeds
"""

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from leyden.training.evaluation import bootstrap
from leyden.usage import load_average

ROOT = Path(__file__).parent.parent
KNOWN = "in_distribution"
"""Questions whose templates and database the training data knows; the other kinds are reported apart."""
CONTROLS = ("shuffled", "rejection", "writer-only", "zero")


def run_variant(variant: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Run one variant in a process of its own, unless the folder holds it already, and return what it wrote."""
    run = folder / f"{variant}-{seed}"
    written = run / "variant.json"
    if written.exists():
        known: dict[str, object] = json.loads(written.read_text())
        return known
    command = [sys.executable, "-m", "benchmarks.demo_variant", "--variant", variant, "--seed", str(seed)]
    command += ["--run", str(run), "--steps", str(options.steps)]
    command += ["--final-seed", str(options.final_seed), "--final-count", str(options.final_count)]
    with (folder / f"{variant}-{seed}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    found: dict[str, object] = json.loads(written.read_text())
    return found


def independent(checkpoint: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Evaluate a checkpoint with the program that imports nothing of Leyden."""
    command = [sys.executable, "-m", "benchmarks.independent_evaluation", checkpoint, "--bucket", "final"]
    command += ["--count", str(options.final_count), "--seed", str(options.final_seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def line(name: str, run: dict[str, object], base: dict[str, object]) -> str:
    """Format one run: accuracy on questions of known kind, gain over the base with its paired interval, costs."""
    after, before = run["final"][KNOWN], base["final"][KNOWN]  # type: ignore[index]
    gain = bootstrap([a - b for a, b in zip(after["reward"], before["reward"], strict=True)])
    summary = run["summary"]
    return (
        f"{name:20} {fmean(after['reward']):.3f}  {fmean(after['first_query']):.3f}  "
        f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]  {summary['train_cpu_seconds']:6.0f}  "  # type: ignore[index]
        f"{summary['train_seconds']:6.0f}  {summary['total_seconds']:6.0f}  "  # type: ignore[index]
        f"{summary['peak_memory_bytes'] / 1e9:5.2f}  {summary['rollouts']:6d}  {summary['load_before']:5.2f}"  # type: ignore[index]
    )


def kinds(runs: Sequence[dict[str, object]]) -> list[str]:
    """Format the final accuracy by kind of question."""
    lines = []
    for kind in runs[0]["final"]:  # type: ignore[attr-defined]
        means = [fmean(run["final"][kind]["reward"]) for run in runs]  # type: ignore[index]
        count = len(runs[0]["final"][kind]["reward"])  # type: ignore[index]
        lines.append(f"  {kind:16} {', '.join(f'{mean:.3f}' for mean in means)}  (n={count})")
    return lines


def final_seed(folder: Path) -> int:
    """Return the seed that draws the final questions: drawn now, or kept in a folder that is gone on with."""
    kept = folder / "final_seed"
    if not kept.exists():
        kept.write_text(str(secrets.randbelow(2**31)))
    return int(kept.read_text())


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--final-count", type=int, default=500)
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here, and reuse those it holds")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="leyden-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    options.final_seed = final_seed(folder)
    print(f"final bucket: {options.final_count} questions, sampling seed {options.final_seed}; runs in {folder}")
    print(f"load before: {load_average():.2f}", flush=True)
    base = run_variant("base", 0, options, folder)
    before = base["final"][KNOWN]  # type: ignore[index]
    print(f"{len(before['reward'])} questions of known kind; the others are reported apart, below")
    print(f"base: whole agent {fmean(before['reward']):.3f}, first query {fmean(before['first_query']):.3f}")
    print(
        f"{'run':20} {'agent':5}  {'first':5}  {'gain (95 %, paired)':24}  {'cpu s':>6}  {'train':>6}  {'total':>6}  "
        f"{'GB':>5}  {'roll.':>6}  load",
        flush=True,
    )
    runs = []
    for seed in options.seeds:
        runs.append(run_variant("grpo", seed, options, folder))
        print(line(f"grpo, seed {seed}", runs[-1], base), flush=True)
    means = [fmean(run["final"][KNOWN]["reward"]) for run in runs]  # type: ignore[index]
    spread = stdev(means) if len(means) > 1 else float("nan")
    print(f"whole agent over seeds: mean {fmean(means):.3f}, sd {spread:.3f}, lowest {min(means):.3f}")
    print("by kind of question, one figure a seed (base first):", *kinds([base, *runs]), sep="\n")
    print("base's tensors unchanged:", all(run["base_unchanged"] for run in runs))
    checkpoint = Path(str(runs[0]["summary"]["checkpoint"])) / "policies" / "sql"  # type: ignore[index]
    print("independent evaluation of seed", options.seeds[0], independent(str(checkpoint), options), flush=True)
    for variant in () if options.no_controls else CONTROLS:
        run = run_variant(variant, options.seeds[0], options, folder)
        print(line(f"control: {variant}", run, base), flush=True)
        if variant == "zero":
            print("zero advantages leave the weights unchanged, bit for bit:", run["policy_unchanged"])


if __name__ == "__main__":
    main()
