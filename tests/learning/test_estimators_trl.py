"""Advantages against TRL's own trainers, given the same rewards."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from leyden_plugins.algorithms.rl import GRPO, RLOO, DrGRPO, Overlong, PolicyGradient
from tests.learning.builders import transition

REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.3, 0.3, 0.3, 0.9]]
PROMPTS = ["w1 w2", "w3 w4"]


def ours(algorithm: PolicyGradient) -> list[float]:
    calls = [
        transition(rollout_id=f"r{task}-{number}", group_id=f"g{task}", value=value)
        for task, rewards in enumerate(REWARDS)
        for number, value in enumerate(rewards)
    ]
    return [one.advantage for one in algorithm.advantages(calls, ())]


def theirs(algorithm: str, checkpoint: Path, folder: Path, **options: object) -> Sequence[float]:
    import trl
    from datasets import Dataset

    config = getattr(trl, f"{algorithm}Config")(
        output_dir=str(folder),
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=2,
        beta=0.0,
        use_cpu=True,
        report_to=[],
        **options,
    )
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=str(checkpoint),
        reward_funcs=lambda completions, **_rest: [reward for rewards in REWARDS for reward in rewards],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    inputs = [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]
    found: Sequence[float] = trainer._generate_and_score_completions(inputs)["advantages"].tolist()
    return found


@pytest.mark.parametrize(
    ("algorithm", "trainer", "options"),
    [
        (GRPO(), "GRPO", {"scale_rewards": "group"}),
        (DrGRPO(), "GRPO", {"scale_rewards": "none"}),
        (RLOO(), "RLOO", {}),
    ],
)
def test_advantages_are_those_of_trl(
    algorithm: PolicyGradient, trainer: str, options: dict[str, object], checkpoint: Path, tmp_path: Path
) -> None:
    expected = theirs(trainer, checkpoint, tmp_path, **options)
    assert ours(algorithm) == pytest.approx(expected, rel=1e-3)  # TRL adds 1e-4 to the std


def test_the_punishment_of_long_answers_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, 79, 80, 81, 90, 99, 100, 101, 500]
    expected = get_soft_overlong_punishment(100, 20)([[0] * length for length in lengths])
    overlong = Overlong(longest=100, margin=20)
    assert [overlong.punishment(length) for length in lengths] == pytest.approx(expected)
