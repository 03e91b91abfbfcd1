"""Train the werewolves against a frozen village, and report how often they win before and after.

`game.py` knows nothing of Leyden. The policy `werewolf` is trained by GRPO; the policy `villager` is the base model,
served by the same engine and never trained. A rollout is a game, its reward 1 when the werewolves win. The eight games
of a group have the same players in the same places; games that are evaluated have seeds that training never uses.

    python -m examples.werewolf.train                     # one run
    python -m examples.werewolf.train --seeds 0 1 2       # the runs of the README's figures

AgentScope may live in an environment of its own, with `leyden[agentscope]` but without torch: give its interpreter with
`--python envs/agentscope/bin/python`.
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev

import leyden

MODEL = Path(__file__).parent / "model"
STEPS = 28
GAMES_PER_STEP = 12
"""Each is played eight times."""

BUCKETS = {"train": 0, "tuning": 1_000_000, "final": 4_000_000}
"""The first seed of each bucket of games; settings were chosen on `tuning`."""

TRAINING_GAMES = 4096


def games(bucket: str, count: int) -> list[dict[str, int]]:
    """Return the games of a bucket: tasks."""
    return [{"seed": BUCKETS[bucket] + index} for index in range(count)]


def train(options: argparse.Namespace, seed: int) -> dict[str, object]:
    """Train once; return the run's summary."""
    from leyden_plugins.algorithms.rl import GRPO
    from leyden_plugins.engines.transformers import TransformersEngine

    training = leyden.Trainer(
        "examples.werewolf.game:play",
        reward="examples.werewolf.game:score",
        tasks=games("train", TRAINING_GAMES),
        val_tasks=games(options.bucket, options.games),
        tasks_per_step=GAMES_PER_STEP,
        policies=[
            leyden.Policy(
                "werewolf",
                roles=["werewolf"],
                learning_rate=options.learning_rate,
                final_learning_rate_fraction=0.1,
            ),
            leyden.Policy("villager", roles=["villager"], trainable=False),
        ],
        engine=TransformersEngine(MODEL, seed=seed),
        algorithm=GRPO(group_size=8, updates_per_step=2, seed=seed),
        python=options.python,
        run=options.run / f"seed-{seed}" if options.run else None,
        seed=seed,
    )
    with training:
        return training.fit(options.steps)


def show(summaries: dict[int, dict[str, object]]) -> None:
    """Print the win rates: each run's with its 95 % interval over games, then mean and spread over the runs."""
    print("\nhow often the werewolves win: before, after, gain (paired by game)")
    gains: list[float] = []
    for seed, summary in summaries.items():
        tables: dict[str, dict[str, dict[str, float]]] = summary["evaluations"]  # type: ignore[assignment]
        found = [tables[when]["reward"] for when in ("before", "after", "gain")]
        gains.append(found[2]["mean"])
        cells = (f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in found)
        print(f"seed {seed}: {'   '.join(cells)}")
    if len(gains) > 1:
        after = [float(summary["accuracy_after"]) for summary in summaries.values()]  # type: ignore[arg-type]
        print(f"after: mean {fmean(after):.3f}, standard deviation over seeds {stdev(after):.3f}")
        print(f"gain:  mean {fmean(gains):+.3f}, standard deviation over seeds {stdev(gains):.3f}")


def main() -> None:
    """Parse the options, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default 0)")
    parser.add_argument("--bucket", choices=("tuning", "final"), default="tuning", help="which games are evaluated")
    parser.add_argument("--games", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--python", default=None, help="interpreter of the environment that has AgentScope")
    parser.add_argument("--run", type=Path, default=None, help="folder of the runs (default runs/<time>)")
    options = parser.parse_args()
    show({seed: train(options, seed) for seed in options.seeds})


if __name__ == "__main__":
    main()
