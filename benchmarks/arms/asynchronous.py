"""Asynchronous training with bounded staleness against synchronous, with heavy-tailed waits, through the full path.

Each rollout waits a log-normal while (median 0.5 s, 99th percentile ten times that), 128 are under way, five seeds
(`benchmarks/asynchronous.py`). `final` is the mean reward on 64 held-out tasks, sampled at temperature 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from leyden.training.evaluation import bootstrap

TITLE = "Asynchronous against synchronous, heavy-tailed waits"
BOUNDS = {"synchronous": 0, "max_staleness=2": 2}
VARIANTS = tuple(BOUNDS)
SEEDS = (1, 2, 3, 4, 5)
STEPS = 20
LEARNING_RATE = 5e-3


def prepare(models: Path) -> None:
    """Do nothing: each seed has a random model of its own."""


async def run(variant: str, seed: int, models: Path) -> dict[str, object]:
    """Train; return curve, held-out reward and throughput."""
    from benchmarks.asynchronous import run as train

    found = await asyncio.to_thread(train, seed, BOUNDS[variant], steps=STEPS, learning_rate=LEARNING_RATE)
    return {
        "curve": found["reward"],
        "before": found["accuracy_before"],
        "final": found["accuracy_after"],
        "final_n": 64,
        "rollouts a second": found["rollouts_per_second"],
        "staleness": found["staleness"],
    }


def verdict(variants: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """Return the paired differences over seeds with their bootstrap intervals."""
    pairs = list(zip(variants["synchronous"], variants["max_staleness=2"], strict=True))
    lost = bootstrap([float(str(late["final"])) - float(str(one["final"])) for one, late in pairs])
    pace = [float(str(late["rollouts a second"])) / float(str(one["rollouts a second"])) for one, late in pairs]
    faster = bootstrap(pace)
    return (
        f"Throughput {faster.mean:.2f} times [{faster.low:.2f}, {faster.high:.2f}], "
        f"held-out reward {lost.mean:+.3f} [{lost.low:+.3f}, {lost.high:+.3f}] "
        f"({lost.n} seeds, paired, 95 % bootstrap intervals; least ratio {min(pace):.2f}, mean {fmean(pace):.2f})."
    )
