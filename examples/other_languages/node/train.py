"""Train the agent of `agent.mjs`, a Node program that knows nothing of Leyden, with the text-to-SQL demo's model.

(cd examples/other_languages/node && npm ci)
python -m examples.other_languages.node.train
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import leyden
from examples.text_to_sql import questions
from examples.text_to_sql.databases import path, schema
from examples.text_to_sql.train import MODEL

if TYPE_CHECKING:
    from leyden.interfaces import Engine

AGENT = Path(__file__).parent / "agent.mjs"
STEPS = 3


def tasks(count: int | None = None) -> list[dict[str, str]]:
    """Return what the agent reads: a question, the tables, and the query that answers it."""
    return [
        {"question": each.text, "schema": schema(str(path(each.database))), "expected": each.sql}
        for each in questions.load("train", count=count)
    ]


def trainer(
    engine: "Engine", *, agent: Path = AGENT, count: int | None = None, run: Path | None = None
) -> leyden.Trainer:
    """Return the trainer; every rollout starts the program anew."""
    from leyden_plugins.algorithms.rl import GRPO

    return leyden.Trainer(
        leyden.Command(["node", str(agent)]),
        tasks=tasks(count),
        tasks_per_step=4,
        policies=[leyden.Policy("sql", learning_rate=3e-4)],
        engine=engine,
        algorithm=GRPO(group_size=4),
        run=run,
    )


def main() -> None:
    """Parse the options and train."""
    from leyden_plugins.engines.transformers import TransformersEngine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--run", type=Path, default=None, help="folder of this run (default runs/<time>)")
    options = parser.parse_args()
    trainer(TransformersEngine(MODEL), run=options.run).fit(options.steps)


if __name__ == "__main__":
    main()
