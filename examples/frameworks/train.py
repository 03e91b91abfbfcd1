"""Train the same little app in any of the seven frameworks, for a few steps, with the text-to-SQL demo's model.

Each `*_app.py` beside this file is a plain program of its framework that knows nothing of Leyden: a writer, a checker
and a rewriter of SQL. `writer` and `rewriter` are trained; `checker` keeps the endpoint it has.

    python -m examples.frameworks.train langchain
    python -m examples.frameworks.train autogen --python envs/autogen/bin/python

With `--python` the app runs under the interpreter of another environment, which needs the framework and
`leyden[autogen]`, but neither torch nor this environment's packages.
"""

import argparse
import os
from pathlib import Path

import leyden
from examples.text_to_sql import questions
from examples.text_to_sql.train import MODEL

FRAMEWORKS = ("langchain", "openai", "openai_agents", "autogen", "crewai", "agent_framework", "agentscope")
ROLES = ("writer", "rewriter")
STEPS = 3


def train(framework: str, *, steps: int, python: str | None, run: Path | None) -> dict[str, object]:
    """Train one framework's app; return the run's summary."""
    from leyden_plugins.algorithms.rl import GRPO
    from leyden_plugins.engines.transformers import TransformersEngine
    from leyden_plugins.gateway import serve

    engine = TransformersEngine(MODEL)
    with serve(engine, names=["sql-checker"]) as endpoint:
        # Where the app finds the models of roles that are not trained.
        os.environ["OPENAI_BASE_URL"] = endpoint.base_url
        os.environ["OPENAI_API_KEY"] = endpoint.api_key
        training = leyden.Trainer(
            f"examples.frameworks.{framework}_app:solve",
            reward="examples.frameworks.scoring:score",
            tasks=[question.task for question in questions.load("train")],
            tasks_per_step=4,
            policies=[leyden.Policy("sql", roles=ROLES, learning_rate=3e-4)],
            engine=engine,
            algorithm=GRPO(group_size=4),
            python=python,
            run=run,
        )
        return training.fit(steps)


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--python", default=None, help="interpreter of the environment that has the framework")
    parser.add_argument("--run", type=Path, default=None, help="folder of this run (default runs/<time>)")
    options = parser.parse_args()
    train(options.framework, steps=options.steps, python=options.python, run=options.run)


if __name__ == "__main__":
    main()
