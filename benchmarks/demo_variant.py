"""Train one variant of the demo once and evaluate it on the final bucket; `benchmarks/demo.py` runs it.

Variants: `grpo` is the demo; `shuffled` permutes rewards within groups; `rejection` fine-tunes on the best rollouts;
`writer-only` leaves the rewriter frozen; `zero` sets every advantage to 0; `base` trains nothing.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from examples.text_to_sql import questions, train
from leyden.interfaces import Group, Transition
from leyden.training.evaluation import Evaluation

VARIANTS = ("grpo", "shuffled", "rejection", "writer-only", "zero", "base")


def algorithm_of(variant: str, seed: int) -> object:
    """Return the variant's algorithm, made from the demo's."""
    from leyden_plugins.algorithms import rl
    from leyden_plugins.algorithms.sft import RejectionSampling

    demo = train.algorithm(seed)
    if variant == "rejection":
        return RejectionSampling(group_size=demo.group_size, updates_per_step=demo.updates_per_step)
    options = {one.name: getattr(demo, one.name) for one in fields(demo)}

    class ZeroAdvantages(rl.GRPO):
        def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
            return [replace(one, advantage=0.0) for one in transitions]

    class ShuffledRewards(rl.GRPO):
        def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
            moved = {}
            for group in groups:
                ids = [one.rollout.rollout_id for one in group.rollouts]
                values = [one.rollout.reward or 0.0 for one in group.rollouts]
                random.Random(f"{seed}/{group.group_id}").shuffle(values)
                moved.update(zip(ids, values, strict=True))
            swapped = [replace(one, value=moved[one.rollout_id]) for one in transitions]
            shuffled = [
                replace(
                    group,
                    rollouts=[
                        replace(one, rollout=replace_reward(one.rollout, moved[one.rollout.rollout_id]))
                        for one in group.rollouts
                    ],
                )
                for group in groups
            ]
            return super().advantages(swapped, shuffled)

    return {"zero": ZeroAdvantages, "shuffled": ShuffledRewards}.get(variant, rl.GRPO)(**options)


def replace_reward(rollout: object, value: float) -> object:
    """Return the rollout with another reward."""
    import msgspec

    return msgspec.structs.replace(rollout, reward=value)


def main() -> None:
    """Train, evaluate, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=train.STEPS)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--final-seed", type=int, required=True)
    parser.add_argument("--final-count", type=int, default=questions.SIZES["final"])
    options = parser.parse_args()
    final = questions.load("final", count=options.final_count, seed=options.final_seed)
    with train.serving_engine(options.seed) as engine:
        base_before = engine.sha256("base")
        roles = ["writer"] if options.variant == "writer-only" else None
        trainer = train.trainer(
            engine,
            algorithm_of(options.variant, options.seed),
            seed=options.seed,
            run=options.run,
            **({"roles": roles} if roles else {}),
        )
        summary = {} if options.variant == "base" else trainer.fit(options.steps)
        weights_after = engine.sha256("sql") if options.variant != "base" else None
        evaluation = trainer.evaluate([question.task for question in final])
        found = {
            "variant": options.variant,
            "seed": options.seed,
            "summary": {key: value for key, value in summary.items() if key != "examples"},
            "base_unchanged": engine.sha256("base") == base_before,
            "policy_unchanged": weights_after == base_before if weights_after else None,
            "final": values_by_kind(evaluation, final),
            "estimates": {name: asdict(estimate) for name, estimate in evaluation.estimates().items()},
        }
    options.run.mkdir(parents=True, exist_ok=True)
    (options.run / "variant.json").write_text(json.dumps(found, indent=2))


def values_by_kind(evaluation: Evaluation, final: Sequence[questions.Question]) -> dict[str, dict[str, list[float]]]:
    """Return kind -> reward name -> values in the order of the questions."""
    found: dict[str, dict[str, list[float]]] = {}
    for index, question in enumerate(final):
        for kind in ("all", question.held_out):
            for name, values in evaluation.values.items():
                found.setdefault(kind, {}).setdefault(name, []).append(values[f"v{index}"])
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
