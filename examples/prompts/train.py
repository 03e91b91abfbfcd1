"""Improve the prompts of an app with three roles, all at once: offline, in seconds, without a GPU or a key.

`agent.py` knows nothing of Leyden. With a real app, leave out `serving`, and give `Reflection` a strong model.

    python -m examples.prompts.train
"""

import argparse
import os
from pathlib import Path
from typing import Any

import leyden
from examples.prompts.agent import graph
from examples.prompts.letters import Task, draw, score
from examples.prompts.model import EDITOR, serving
from leyden.deploying.export import export
from leyden_plugins.algorithms.prompt import GEPA, Reflection
from leyden_plugins.algorithms.prompt.command import prompts_command

ROLES = ("sorter", "writer", "checker")
BUDGET = 400


def solve(task: Task) -> dict[str, Any]:
    """Answer one letter; this is the agent."""
    state: dict[str, Any] = graph.invoke({"letter": task["letter"], "ticket": task["ticket"]})
    return state


def main() -> None:
    """Parse the options, search, and use the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"rollouts at most (default {BUDGET})")
    parser.add_argument("--seed", type=int, default=0, help="of the letters and the search")
    parser.add_argument("--run", type=Path, default=None, help="folder of this run (default runs/<time>)")
    parser.add_argument("--resume", action="store_true", help="go on with --run")
    options = parser.parse_args()
    with serving() as base_url:
        os.environ |= {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "none"}
        held_out = draw(40, seed=1000 + options.seed)
        trainer = leyden.Trainer(
            solve,
            reward=score,
            tasks=draw(32, seed=options.seed),
            val_tasks=held_out,
            prompts=ROLES,
            algorithm=GEPA(
                reflection=Reflection(EDITOR, base_url=base_url, api_key_env=None),
                budget=options.budget,
                seed=options.seed,
            ),
            workers=0,  # the app only waits for its model
            run=options.run,
        )
        with trainer:
            summary = trainer.fit(resume=options.resume)
        prompts_command([str(trainer.run_folder)])
        print(f"\nheld out, 40 letters: {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}")

        folder = trainer.run_folder / "exported"
        if not folder.exists():
            export(trainer.run_folder, folder)
        task = held_out[0]
        with leyden.deploy(folder):
            state = solve(task)
        print(f"\nThe app without a trainer, under leyden.deploy({str(folder)!r}):")
        print(f"  {task['letter']}\n  {state['queue']}: {state['reply']} ({state['verdict']})")


if __name__ == "__main__":
    main()
