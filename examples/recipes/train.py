"""Fine-tuning, then RL, then a search for prompts, then RL again: one script, one run, one store.

    python -m examples.recipes.train
    python -m examples.recipes.train --compare    # against RL alone, three seeds

Two roles' weights and the third one's prompt are trained. RL cannot help where every sample fails, and here whatever a
customer says in the plural or in German fails: `front` does not know what is expected of it. So the prompts are
searched on just those tasks, and RL goes on where they now succeed.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import leyden
from examples.chat_server import serving
from examples.recipes import closed_model
from examples.recipes.shop import HELD_OUT, TASKS, solve
from examples.two_policies.train import MODEL, SAMPLED

if TYPE_CHECKING:
    from leyden.interfaces import Algorithm

PHASES = (("fine-tuning on its own best", 3), ("RL", 9), ("prompts for unsolved tasks", 1), ("RL", 9))
"""Names and steps."""
STEPS = sum(steps for _, steps in PHASES)


def recipe(seed: int) -> leyden.Chain:
    """Return the phases."""
    from leyden_plugins.algorithms.prompt import GEPA
    from leyden_plugins.algorithms.rl import GRPO
    from leyden_plugins.algorithms.sft import RejectionSampling

    search = GEPA(reflection=closed_model.reflect, budget=200, tasks_from="unsolved", seed=seed)
    algorithms: list[Algorithm] = [RejectionSampling(group_size=8), GRPO(group_size=8), search, GRPO(group_size=8)]
    return leyden.Chain(*map(leyden.Phase, algorithms, (steps for _, steps in PHASES)))


def train(
    algorithm: "Algorithm", *, seed: int, run: Path | None = None, resume: bool = False, quiet: bool = False
) -> list[float]:
    """Train; return the share of held-out customers that are served right: before, and after every step."""
    from examples.two_policies.make_model import make_model
    from leyden_plugins.engines.transformers import TransformersEngine

    policy = leyden.Policy(
        "desk", roles=["router", "clerk"], lora=leyden.LoRA(rank=8), learning_rate=5e-3, eval_sampling=SAMPLED
    )
    is_recipe = isinstance(algorithm, leyden.Chain)
    with (
        serving(closed_model.answer) as url,
        leyden.Trainer(
            solve,
            tasks=TASKS,
            val_tasks=HELD_OUT,
            policies=[policy],
            prompts=["front"] if is_recipe else (),
            algorithm=algorithm,
            engine=TransformersEngine(make_model(MODEL), max_batch_size=128, seed=seed),
            tasks_per_step=24,
            concurrency=128,
            evaluate_every=1,
            run=run,
            sinks=["jsonl"] if quiet else ["terminal", "jsonl", "report"],
            seed=seed,
        ) as trainer,
    ):
        os.environ.update(OPENAI_BASE_URL=url, OPENAI_API_KEY="not-needed")
        summary = trainer.fit(None if is_recipe else STEPS, resume=resume)
        lines = (trainer.run_folder / "metrics.jsonl").read_text().splitlines()
        between = [json.loads(line)["evaluation/reward"] for line in lines[:-1]]
        return [float(str(one)) for one in (summary["accuracy_before"], *between, summary["accuracy_after"])]


def show(curve: Sequence[float]) -> None:
    """Print the held-out share after each phase."""
    print(f"\nServed right, of {len(HELD_OUT)} held-out customers\n{curve[0]:6.3f}  before")
    for number, (name, _) in enumerate(PHASES, 1):
        print(f"{curve[sum(steps for _, steps in PHASES[:number])]:6.3f}  after {name}")


def compare(folder: Path, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Run the recipe and RL alone, as many steps of as many rollouts, and print a table."""
    from leyden_plugins.algorithms.rl import GRPO

    for name, make in (("recipe", recipe), ("RL alone", lambda _: GRPO(group_size=8))):
        found = [train(make(seed), seed=seed, run=folder / f"{name}-{seed}", quiet=True)[-1] for seed in seeds]
        print(f"{name:10} {fmean(found):.3f} ± {stdev(found):.3f}   {', '.join(f'{one:.3f}' for one in found)}")


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=None, help="folder of the run (default runs/<time>)")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint of --run")
    parser.add_argument("--compare", action="store_true", help="the recipe against RL alone, three seeds")
    options = parser.parse_args()
    if options.compare:
        compare(options.run or Path("runs") / "recipes")
    else:
        show(train(recipe(options.seed), seed=options.seed, run=options.run, resume=options.resume))


if __name__ == "__main__":
    main()
