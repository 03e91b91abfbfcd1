"""Each algorithm on text-to-SQL: a writer, and a rewriter when SQLite refuses the query; one policy for both.

Every algorithm gets the same tasks, learning rate and steps of 16 tasks with 8 rollouts, and its own defaults
otherwise, so this says that each of them learns, not which is best: none was tuned. DAPO samples further tasks in place
of groups without signal, so it sees more rollouts. `before` and `final` are greedy, on held-out questions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.in_process import Episode, Run
from examples.text_to_sql import questions, reward
from examples.text_to_sql.agent import instructions, show
from examples.text_to_sql.databases import path, query
from leyden.interfaces import Algorithm
from leyden.roles import Policy
from leyden_plugins.algorithms import rl

TITLE = "Algorithms, 15 steps of text-to-SQL"
STEPS = 15
LEARNING_RATE = 1e-3
FINAL = 200
FINAL_SEED = 41
"""Draws the held-out questions (final bucket, of known kind) on which nothing was chosen."""
MODEL = Path(__file__).parents[2] / "examples" / "text_to_sql" / "model"

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "REINFORCE": lambda: rl.Reinforce(group_size=8),
    "GRPO": lambda: rl.GRPO(group_size=8),
    "Dr. GRPO": lambda: rl.DrGRPO(group_size=8),
    "RLOO": lambda: rl.RLOO(group_size=8),
    "REINFORCE++": lambda: rl.ReinforcePlusPlus(group_size=8),
    "PPO (GAE)": lambda: rl.PPO(group_size=8),
    "hierarchical GRPO": lambda: rl.HierarchicalGRPO(group_size=8),
    "LightningRL": lambda: rl.LightningRL(group_size=8),
    "DAPO": lambda: rl.DAPO(group_size=8),
    "GSPO": lambda: rl.GSPO(group_size=8),
    "CISPO": lambda: rl.CISPO(group_size=8),
    "GRPO, KL k3 in the loss": lambda: rl.GRPO(group_size=8, kl_coefficient=0.02),
    "GRPO, entropy bonus": lambda: rl.GRPO(group_size=8, entropy_coefficient=0.002),
}
VARIANTS = tuple(ALGORITHMS)


async def answer(task: object, episode: Episode) -> float:
    """Write a query; where SQLite refuses it, write it again."""
    assert isinstance(task, dict)
    database = str(path(task["database"]))

    def messages(role: str, *said: tuple[str, str]) -> list[dict[str, object]]:
        system = str(instructions(role, database).content)
        return [{"role": "system", "content": system}, *({"role": who, "content": text} for who, text in said)]

    asked = ("user", task["question"])
    sql = (await episode.ask("writer", messages("writer", asked))).text
    result = query(database, sql)
    if result.error is not None:
        remark = f"{show(result)}\nwrong"
        sql = (await episode.ask("rewriter", messages("rewriter", asked, ("assistant", sql), ("user", remark)))).text
    return reward.reward(task, sql)


def prepare(models: Path) -> None:
    """Do nothing: the model lies in the repository."""


def session(seed: int, *, steps: int = STEPS) -> Run:
    """Return an untrained run."""
    return Run(
        agent=answer,
        tasks=[question.task for question in questions.load("train", count=1024)],
        policies=[Policy("sql", learning_rate=LEARNING_RATE)],
        model=MODEL,
        total_steps=steps,
        seed=seed,
    )


async def run(variant: str, seed: int, models: Path) -> dict[str, object]:
    """Train with one algorithm; return its curve and greedy accuracy on held-out questions."""
    training = session(seed)
    await training.open()
    before = await training.evaluate(held_out())
    await training.train(ALGORITHMS[variant]())
    final = await training.evaluate(held_out())
    await training.close()
    return {
        "curve": training.curve,
        "before": sum(before) / len(before),
        "final": sum(final) / len(final),
        "final_n": len(final),
        "rollouts": training.rollouts,
    }


def held_out() -> list[object]:
    """Return the held-out tasks."""
    drawn = (question for question in questions.stream("final", seed=FINAL_SEED))
    known = (question.task for question in drawn if question.held_out == "in_distribution")
    return [task for task, _ in zip(known, range(FINAL), strict=False)]
