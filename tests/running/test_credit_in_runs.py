"""Rewards that an agent aims at its calls reach what is trained: through the wire, the store and the assignment."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

import pytest

import leyden
from leyden.credit import per_turn
from leyden.errors import ConfigurationError
from leyden.interfaces import Batch
from tests.running.small import CountingLearner, ask, rollout_id, small_trainer


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


class Advantages(CountingLearner):
    """Keeps the advantage of each call by what its prompt says."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = {}

    def forward_backward(self, policy: str, batch: Batch) -> dict[str, float]:
        for objective in batch:
            for sample in objective.samples:
                text = bytes(token for token in sample.prompt_token_ids if token < 256).decode()
                self.found.setdefault(text.split()[-2], []).append(round(sample.advantages[0], 3))
        return {"loss": 0.0}


def two_turns(task: object) -> float:
    """Speak twice; the second sample's first turn is rewarded after it, and its second one is not."""
    ask(f"turn-0-of-{rollout_id()[-1]}")
    leyden.emit_reward(float(rollout_id()[-1]), "style", span=leyden.last_call())
    ask(f"turn-1-of-{rollout_id()[-1]}")
    return 0.0


async def branches(task: object) -> float:
    """Let two roles speak at the same time, each rewarded on its own."""

    async def branch(name: str) -> None:
        with leyden.role(name):
            await asyncio.to_thread(ask, f"{name}-of-{rollout_id()[-1]}")
            await asyncio.sleep(0.01)  # the other one has spoken by now
            leyden.emit_reward(float(rollout_id()[-1]) if name == "good" else 0.0, "own", span=leyden.last_call())

    await asyncio.gather(branch("good"), branch("idle"))
    return 0.0


def advantages(run: Path, agent: object, **options: object) -> dict[str, list[float]]:
    learner = Advantages()
    small_trainer(run, agent, learner=learner, tasks_per_step=1, **options).fit(1)
    return learner.found


def normalised(returns: Sequence[float], value: float) -> float:
    """Return GRPO's (R - mean) / std over the calls of the group's two rollouts, as many in each."""
    return round((value - fmean(returns)) / stdev(returns), 3)


@pytest.mark.parametrize(
    ("weights", "weight"), [({"reward": 1.0, "style": 2.0}, 2.0), ({"reward": 1.0}, 1.0), ({"reward": 5.0}, 1.0)]
)
def test_a_turn_reward_is_weighted_by_its_name_and_credits_its_turn(
    tmp_path: Path, weights: dict[str, float], weight: float
) -> None:
    found = advantages(tmp_path / "run", two_turns, reward_weights=weights)
    returns = [0.0, 0.0, weight, 0.0]
    assert found == {
        "turn-0-of-0": [normalised(returns, 0.0)],
        "turn-1-of-0": [normalised(returns, 0.0)],
        "turn-0-of-1": [normalised(returns, weight)],
        "turn-1-of-1": [normalised(returns, 0.0)],
    }


def test_a_weight_of_0_only_measures(tmp_path: Path) -> None:
    found = advantages(tmp_path / "run", two_turns, reward_weights={"reward": 1.0, "style": 0.0})
    assert not any(value for some in found.values() for value in some), "no returns differ, so nothing is taught"


def test_branches_side_by_side_are_credited_each_on_its_own(tmp_path: Path) -> None:
    found = advantages(tmp_path / "run", branches)
    assert {name for name, some in found.items() if some[0] > 0} == {"good-of-1"}


@pytest.mark.parametrize("credit", ["per-turn", per_turn(0.5)], ids=["by name", "with a discount"])
def test_an_assignment_is_given_by_name_or_as_a_function(tmp_path: Path, credit: object) -> None:
    def agent(task: object) -> float:
        ask(f"turn-0-of-{rollout_id()[-1]}")
        ask(f"turn-1-of-{rollout_id()[-1]}")
        leyden.emit_reward(float(rollout_id()[-1]), span=leyden.last_call(), name="late")
        return 0.0

    found = advantages(tmp_path / "run", agent, credit=credit)
    first = 1.0 if credit == "per-turn" else 0.5
    # With equal returns in each rollout the spread is that of the rollouts.
    returns = [0.0, 1.0] if credit == "per-turn" else [0.0, 0.0, first, 1.0]
    assert found["turn-0-of-1"] == [normalised(returns, first)]
    assert found["turn-1-of-1"] == [normalised(returns, 1.0)]


def test_an_unknown_assignment_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="per-turn"):
        small_trainer(tmp_path / "run", credit="per-trun")


@pytest.mark.parametrize(
    ("credit", "says"), [(per_turn, r"call it, as in credit=per_turn\(0.9\)"), (0.9, "credit=0.9 is no function")]
)
def test_what_assigns_nothing_is_refused_at_once(tmp_path: Path, credit: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        small_trainer(tmp_path / "run", credit=credit)


def test_a_rollout_with_turn_rewards_only_has_the_total_0(tmp_path: Path) -> None:
    def agent(task: object) -> None:
        ask(f"turn-0-of-{rollout_id()[-1]}")
        leyden.emit_reward(float(rollout_id()[-1]), span=leyden.last_call())

    found = advantages(tmp_path / "run", agent)
    assert found == {"turn-0-of-0": [-0.707], "turn-0-of-1": [0.707]}
