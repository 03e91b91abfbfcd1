"""Two roles, each its own LoRA on one base, trained in one run; against either alone, at equal rollouts."""

from __future__ import annotations

from pathlib import Path

from benchmarks.in_process import Episode, Run, trained
from examples.two_policies import desk
from examples.two_policies.make_model import make_model
from leyden.roles import LoRA, Policy

TITLE = "Several policies in one run"
VARIANTS = ("both", "router alone", "clerk alone")
STEPS = 15
FINAL_SAMPLES = 20
"""Samples a good, at temperature 1, for the final figure."""


async def order(task: object, episode: Episode) -> float:
    """Let the desk find a good."""

    async def ask(role: str, question: str) -> str:
        said = await episode.ask(role, [{"role": "user", "content": f"{role} {question}"}], max_tokens=4)
        return said.text

    good = str(task)
    return float(await desk.find(good, ask) == desk.shelf_of(good))


def prepare(models: Path) -> None:
    """Make the base model."""
    make_model(models / "desk")


async def run(variant: str, seed: int, models: Path) -> dict[str, object]:
    """Train one variant; return its curve and final figures."""
    from leyden_plugins.algorithms.rl import GRPO

    policies = [
        Policy(
            role,
            roles=[role],
            lora=LoRA(rank=8),
            learning_rate=5e-3,
            trainable=variant in ("both", f"{role} alone"),
        )
        for role in ("router", "clerk")
    ]
    session = Run(
        agent=order,
        tasks=list(desk.GOODS),
        policies=policies,
        model=make_model(models / "desk"),
        total_steps=STEPS,
        seed=seed,
    )
    return await trained(session, GRPO(group_size=8), samples=FINAL_SAMPLES)
