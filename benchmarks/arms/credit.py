"""A reward for each turn against one for the whole, on a task with a distractor.

A rollout asks `speller` for four codes and lets a `gambler` speak in between, whose luck, a coin worth two codes, has
nothing to do with what anybody said. One variant is told only the sum at the end, as most systems are; the other what
each call earned. Algorithm, samples and budget are the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arms import spelling
from benchmarks.in_process import Episode, Run, trained
from leyden import credit
from leyden.roles import Policy

TITLE = "Per-turn credit against broadcast, with a distractor role"
VARIANTS = ("per turn", "broadcast")
STEPS = 20
TURNS = 4
LUCK = 2.0
FINAL_SAMPLES = 20


def agent(variant: str):  # type: ignore[no-untyped-def]  # an `Agent`
    """Return the agent, which states its rewards in the variant's way."""
    known = spelling.codes()

    async def play(task: object, episode: Episode) -> float:
        assert isinstance(task, Sequence)
        earned: list[tuple[float, str]] = []
        for item in task:
            said = await episode.ask("speller", [{"role": "user", "content": item}], max_tokens=spelling.LENGTH + 1)
            earned.append((float(said.text == known[item]), said.call_id))
            if len(earned) == TURNS // 2:
                gamble = await episode.ask("gambler", [{"role": "user", "content": item}], max_tokens=4)
                luck = LUCK * random.Random(f"luck/{episode.seed}").choice((-1, 1))
                earned.append((luck, gamble.call_id))
        episode.score = sum(value for value, call in earned if call.endswith("speller")) / TURNS
        if variant == "broadcast":
            return sum(value for value, _ in earned)
        for value, call in earned:
            episode.reward(value, call=call)
        return 0.0

    return play


def prepare(models: Path) -> None:
    """Make the base model."""
    spelling.make_model(models / "spelling")


async def run(variant: str, seed: int, models: Path) -> dict[str, object]:
    """Train one variant; return its curve (share of codes right) and final figures."""
    from leyden_plugins.algorithms.rl import HierarchicalGRPO

    items = sorted(spelling.codes())
    rng = random.Random("credit tasks")
    session = Run(
        agent=agent(variant),
        tasks=[rng.sample(items, TURNS + 1)[:TURNS] for _ in range(64)],
        policies=[Policy("player", learning_rate=3e-4)],
        model=spelling.make_model(models / "spelling"),
        total_steps=STEPS,
        tasks_per_step=8,
        seed=seed,
        credit=credit.per_turn() if variant == "per turn" else credit.broadcast,
    )
    return await trained(session, HierarchicalGRPO(group_size=8), samples=FINAL_SAMPLES)
