"""Train the text-to-SQL agent: `writer` and `rewriter` learn together, `checker` stays as it is.

`agent.py` knows nothing of Leyden. Its checker is in no policy, so its calls keep going where OPENAI_BASE_URL
points: here to the untrained base model, which the same engine serves as an ordinary endpoint.

    python -m examples.text_to_sql.train --steps 20
    python -m examples.text_to_sql.train --engine vllm    # sample from a vLLM server instead
"""

import argparse
import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import leyden
from examples.text_to_sql import questions, reward
from examples.text_to_sql.agent import CHECKER_MODEL, graph
from examples.text_to_sql.databases import path

if TYPE_CHECKING:
    from leyden.interfaces import Algorithm, Engine

MODEL = Path(__file__).parent / "model"
VLLM_ENVIRONMENTS = Path(__file__).parents[2] / "build" / "environments"
"""Where `make vllm-environment` puts one."""
ROLES = ("writer", "rewriter")
STEPS = 20
VALIDATION = 200
"""Held-out questions (tuning bucket) evaluated before and after."""


async def solve(task: dict[str, str]) -> dict[str, str]:
    """Answer one question; this is the agent, and all it returns is its answer."""
    state = await graph.ainvoke({"question": task["question"], "database": str(path(task["database"]))})
    return {"first_sql": state["first_sql"], "sql": state["sql"]}


def score(task: dict[str, str], answer: dict[str, str], rollout: object) -> dict[str, float]:
    """Reward the final query; the first one is measured too, but only `reward` trains."""
    return {"reward": reward.reward(task, answer["sql"]), "first_query": reward.reward(task, answer["first_sql"])}


@contextmanager
def serving_engine(seed: int, *, vllm_python: Path | None = None) -> Iterator["Engine"]:
    """Start the engine and serve the untrained model, for roles in no policy, where the app looks for it.

    A vLLM server has one set of weights, which training replaces; then the untrained model has an engine of its own.
    """
    from leyden_plugins.engines.transformers import TransformersEngine
    from leyden_plugins.engines.vllm import VLLMEngine
    from leyden_plugins.gateway import serve

    print("starting the engine; the untrained model answers for the agent's checker", flush=True)
    untrained = TransformersEngine(MODEL, seed=seed)
    with serve(untrained, names=[CHECKER_MODEL]) as endpoint:
        os.environ["OPENAI_BASE_URL"] = endpoint.base_url
        os.environ["OPENAI_API_KEY"] = endpoint.api_key
        if vllm_python is None:
            yield untrained
            return
        engine = VLLMEngine(MODEL, python=vllm_python, seed=seed)
        try:
            yield engine
        finally:
            asyncio.run(engine.stop())


def find_vllm(given: Path | None) -> Path:
    """Return the interpreter to start vLLM with: the one given, or that of the project's own environment."""
    complete = VLLM_ENVIRONMENTS.glob("vllm-*/leyden-environment.stamp")
    found = [given] if given is not None else [stamp.parent / "bin" / "python" for stamp in complete]
    if not found:
        raise SystemExit(
            "--engine vllm needs an environment with vLLM: `make vllm-environment` makes one for the CPU, and "
            "--vllm-python PATH names the interpreter of another"
        )
    return found[0]


def algorithm(seed: int) -> "Algorithm":
    """Return the demo's algorithm."""
    from leyden_plugins.algorithms.rl import GRPO

    return GRPO(group_size=8, updates_per_step=2, seed=seed)


def trainer(
    engine: "Engine",
    algorithm: "Algorithm",
    *,
    seed: int,
    run: Path | None,
    roles: Sequence[str] = ROLES,
    lora: leyden.LoRA | None = None,
) -> leyden.Trainer:
    """Return the demo's trainer."""
    rate = 3e-4 if lora is None else 3e-3
    policy = leyden.Policy("sql", roles=roles, lora=lora, learning_rate=rate, final_learning_rate_fraction=0.3)
    return leyden.Trainer(
        solve,
        reward=score,
        tasks=[question.task for question in questions.load("train")],
        val_tasks=[question.task for question in questions.load("tuning", count=VALIDATION)],
        tasks_per_step=16,
        evaluate_every=5,
        policies=[policy],
        engine=engine,
        algorithm=algorithm,
        run=run,
        seed=seed,
    )


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of task order and sampling")
    parser.add_argument("--run", type=Path, default=None, help="folder of this run (default runs/<time>)")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint of --run")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="what samples")
    parser.add_argument("--vllm-python", type=Path, help="interpreter with vLLM (default: of `make vllm-environment`)")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter in place of all weights")
    options = parser.parse_args()
    vllm_python = find_vllm(options.vllm_python) if options.engine == "vllm" else None
    lora = None if options.lora is None else leyden.LoRA(rank=options.lora, alpha=2 * options.lora)
    with serving_engine(options.seed, vllm_python=vllm_python) as engine:
        training = trainer(engine, algorithm(options.seed), seed=options.seed, run=options.run, lora=lora)
        summary = training.fit(options.steps, resume=options.resume)
        show_deployed(training.run_folder, summary["steps"])


def show_deployed(run: Path, steps: object) -> None:
    """Export the run, serve it, and answer one question with the app itself: no trainer takes part."""
    from leyden.deploying.export import export
    from leyden_plugins.gateway import serve_folder

    folder = run / f"export-step-{steps}"
    if not folder.exists():
        export(run, folder)
    task = questions.load("tuning", count=1)[0].task
    with serve_folder(folder) as served, leyden.deploy(folder, served.base_url):
        answer = asyncio.run(solve(task))
    print(f"\nThe app without a trainer: leyden.deploy({str(folder)!r}, base_url=...) sends it to the trained model")
    print(f"  {task['question']}\n  {answer['sql']}\n  reward {score(task, answer, None)['reward']:g}")


if __name__ == "__main__":
    main()
