"""Train the order desk: two roles, each its own LoRA on one base model, in one run.

python -m examples.two_policies.train                    # both
python -m examples.two_policies.train --roles router     # the clerk stays as it is
python -m examples.two_policies.train --compare          # both against either alone, three seeds
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import leyden
from examples.two_policies.desk import TASKS, solve

MODEL = Path("build") / "two_policies"
ROLES = ("router", "clerk")
STEPS = 15
SAMPLED = leyden.Sampling(temperature=1.0)
REPEATS = 10
"""Times that each order is asked in an evaluation, sampled at temperature 1."""


def train(
    roles: Sequence[str], *, seed: int, steps: int = STEPS, run: Path | None = None, quiet: bool = False
) -> float:
    """Train some of the roles; return the share of orders that are right afterwards.

    The others are served by the same engine, and stay as they are.
    """
    from examples.two_policies.make_model import make_model
    from leyden_plugins.algorithms.rl import GRPO
    from leyden_plugins.engines.transformers import TransformersEngine

    policies = [
        leyden.Policy(
            role,
            roles=[role],
            lora=leyden.LoRA(rank=8),
            learning_rate=5e-3,
            trainable=role in roles,
            eval_sampling=SAMPLED,
        )
        for role in ROLES
    ]
    with leyden.Trainer(
        solve,
        tasks=TASKS,
        val_tasks=TASKS * REPEATS,
        policies=policies,
        engine=TransformersEngine(make_model(MODEL), max_batch_size=128, seed=seed),
        algorithm={role: GRPO(group_size=8) for role in roles},
        tasks_per_step=16,
        concurrency=128,
        run=run,
        sinks=["jsonl"] if quiet else ["terminal", "jsonl", "report"],
        seed=seed,
    ) as trainer:
        return float(str(trainer.fit(steps)["accuracy_after"]))


def compare(steps: int, folder: Path, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Train both roles and either alone, with equal rollouts, and print a table."""
    for roles in (ROLES, ROLES[:1], ROLES[1:]):
        name = "+".join(roles)
        found = [train(roles, seed=seed, steps=steps, run=folder / f"{name}-{seed}", quiet=True) for seed in seeds]
        print(f"{name:14} {fmean(found):.3f} ± {stdev(found):.3f}   {', '.join(f'{one:.3f}' for one in found)}")


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=None, help="folder of the run (default runs/<time>)")
    parser.add_argument("--compare", action="store_true", help="both roles against either alone, three seeds")
    options = parser.parse_args()
    if options.compare:
        compare(options.steps, options.run or Path("runs") / "two_policies")
    else:
        train(options.roles, seed=options.seed, steps=options.steps, run=options.run)


if __name__ == "__main__":
    main()
