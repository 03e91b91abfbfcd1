"""One algorithm in process and through the full path: worker process, wire, gateway, store, trainer.

The same plain agent and the same questions; sampling seeds differ, because the engine draws them in the order in which
requests come over the network. The curves should lie within each other's spread.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from openai import AsyncOpenAI

import leyden
from benchmarks.arms import estimators
from examples.text_to_sql import questions, reward
from examples.text_to_sql.agent import MAX_TOKENS, instructions, show
from examples.text_to_sql.databases import path, query

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

TITLE = "The same arm through the full path"
VARIANTS = ("in process", "full path")


@functools.cache
def client() -> AsyncOpenAI:
    """Return the client, made on the first use; its roles are trained, so nothing is ever sent there."""
    return AsyncOpenAI(api_key="not-needed", base_url="http://127.0.0.1:9/v1")


async def ask(role: str, messages: list[ChatCompletionMessageParam]) -> str:
    """Ask a role's model."""
    with leyden.role(role):
        reply = await client().chat.completions.create(model="sql", messages=messages, max_tokens=MAX_TOKENS)
    return reply.choices[0].message.content or ""


async def solve(task: dict[str, str]) -> float:
    """Do what `estimators.answer` does, with the client of an ordinary app."""
    database = str(path(task["database"]))
    system = {role: str(instructions(role, database).content) for role in ("writer", "rewriter")}
    sql = await ask(
        "writer", [{"role": "system", "content": system["writer"]}, {"role": "user", "content": task["question"]}]
    )
    result = query(database, sql)
    if result.error is not None:
        sql = await ask(
            "rewriter",
            [
                {"role": "system", "content": system["rewriter"]},
                {"role": "user", "content": task["question"]},
                {"role": "assistant", "content": sql},
                {"role": "user", "content": f"{show(result)}\nwrong"},
            ],
        )
    return reward.reward(task, sql)


class Curve:
    """A sink that keeps the mean rewards."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def run_started(self, info: Mapping[str, object]) -> None: ...

    def progress(self, info: Mapping[str, object]) -> None: ...

    def notice(self, text: str) -> None: ...

    def run_finished(self, summary: Mapping[str, object]) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the step's mean reward."""
        self.rewards.append(metrics["reward/mean"])


def prepare(models: Path) -> None:
    """Do nothing: the model lies in the repository."""


async def run(variant: str, seed: int, models: Path) -> dict[str, object]:
    """Train; return the curve and greedy accuracy on held-out questions."""
    if variant == "in process":
        return await estimators.run("GRPO", seed, models)
    return await asyncio.to_thread(full_path, seed)


def full_path(seed: int) -> dict[str, object]:
    """Train with a trainer."""
    from leyden_plugins.engines.transformers import TransformersEngine

    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        engine = TransformersEngine(estimators.MODEL, max_batch_size=128, seed=seed)
        with leyden.Trainer(
            solve,
            tasks=[question.task for question in questions.load("train", count=1024)],
            policies=[
                leyden.Policy(
                    "sql", learning_rate=estimators.LEARNING_RATE, eval_sampling=leyden.Sampling(temperature=0.0)
                )
            ],
            engine=engine,
            algorithm=estimators.ALGORITHMS["GRPO"](),
            tasks_per_step=16,
            concurrency=128,
            run=Path(folder) / "run",
            sinks=[curve],
            seed=seed,
        ) as trainer:
            before = trainer.evaluate(estimators.held_out()).estimate()
            trainer.fit(estimators.STEPS)
            final = trainer.evaluate(estimators.held_out()).estimate()
    return {
        "curve": curve.rewards,
        "before": before.mean,
        "final": final.mean,
        "final_n": final.n,
        "rollouts": estimators.STEPS * 16 * 8,
    }
