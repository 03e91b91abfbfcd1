"""One function judges the finished rollouts of a group: when it is called, what it sees, what its rewards do."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import leyden
from leyden.errors import EngineError, RewardError, RolloutError
from leyden.interfaces import Outcome, RolloutRecords
from leyden.ownership import current_owner
from leyden.running import group_rewards
from leyden.spans import Mode, RolloutState
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_rollout
from leyden_plugins.algorithms.rl import GRPO
from tests.capture.rollouts import rollout, routing_to
from tests.rewards.judges import serving
from tests.running.small import CountingLearner, ask, client, rollout_id, small_trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(group_rewards.GroupRewards.__init__, "__kwdefaults__", {"pause_seconds": 0.0})
    yield
    leyden.uninstrument()


def stored(run: Path) -> dict[str, RolloutRecords]:
    """Return the run's rollouts by their ids."""

    async def read() -> Sequence[RolloutRecords]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            return await store.records([one.rollout_id for one in await store.rollouts()])

    return {one.rollout.rollout_id: one for one in asyncio.run(read())}


def speaks(task: object) -> str:
    """Answer with the sample's own text."""
    ask(str(task))
    return f"answer {rollout_id()[-1]} to {task}"


def by_number(task: object, rollouts: Sequence[RolloutRecords]) -> list[float]:
    return [float(str(one.rollout.output).split()[1]) for one in rollouts]


class Court:
    """A function of the group that keeps what it was shown."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.seen: list[tuple[object, list[object]]] = []
        self.groups: list[str] = []

    async def __call__(self, task: object, rollouts: Sequence[RolloutRecords]) -> list[float]:
        self.groups.append(rollouts[0].rollout.group_id)
        if self.failures:
            raise self.failures.pop(0)
        self.seen.append((task, [one.rollout.output for one in rollouts]))
        return by_number(task, rollouts)


def test_the_rewards_of_a_group_reach_the_store_and_the_learner(run: Path) -> None:
    court, learner = Court(), CountingLearner()
    small_trainer(run, speaks, group_reward=court, learner=learner).fit(2)
    assert sorted(court.seen, key=str) == [
        (f"task {index}", [f"answer {number} to task {index}" for number in range(2)]) for index in range(4)
    ]
    found = stored(run)
    assert {name[-1]: one.rollout.reward for name, one in found.items()} == {"0": 0.0, "1": 1.0}
    assert all([reward.name for reward in one.rewards] == ["reward"] for one in found.values())
    advantages = {round(sample.advantages[0], 3) for _, sample in learner.samples}
    assert advantages == {-0.707, 0.707} and len(learner.samples) == 8


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_function_may_be_sync_and_given_by_name(run: Path, max_staleness: int) -> None:
    name = "tests.running.test_group_rewards:by_number"
    small_trainer(run, speaks, group_reward=name, val_tasks=["held out"], max_staleness=max_staleness).fit(2)
    found = stored(run)
    evaluated = [one.rollout.reward for one in found.values() if one.rollout.mode is Mode.EVALUATE]
    assert evaluated == [2.0, 2.0] or evaluated == [0.0, 0.0]
    trained = [one.rollout.reward for one in found.values() if one.rollout.mode is Mode.TRAIN]
    assert set(trained) == {0.0, 1.0}


def test_only_rollouts_that_wait_are_shown(run: Path) -> None:
    def agent(task: object) -> object:
        ask()
        number = int(rollout_id()[-1])
        if number == 0:
            raise ValueError("the agent broke")
        return leyden.NO_REWARD if number == 1 else f"answer {number}"

    court = Court()
    small_trainer(run, agent, group_reward=court, algorithm=GRPO(group_size=4), tasks_per_step=1).fit(1)
    assert [outputs for _, outputs in court.seen] == [["answer 2", "answer 3"]]
    assert [one.rollout.reward for one in stored(run).values()] == [0.0, None, 2.0, 3.0]


def test_names_from_agent_and_group_combine_by_weight(run: Path) -> None:
    def agent(task: object) -> str:
        ask()
        leyden.emit_reward(float(rollout_id()[-1]), "format")
        return "text"

    def judge(task: object, rollouts: Sequence[RolloutRecords]) -> list[dict[str, float]]:
        return [{"quality": 1.0, "length": 7.0} for _ in rollouts]

    small_trainer(run, agent, group_reward=judge, reward_weights={"format": 0.5, "quality": 2.0}).fit(1)
    assert {name[-1]: one.rollout.reward for name, one in stored(run).items()} == {"0": 2.0, "1": 2.5}


def test_a_name_from_both_is_refused(run: Path) -> None:
    def agent(task: object) -> str:
        ask()
        leyden.emit_reward(1.0)
        return "answer 1"

    with pytest.raises(RewardError, match=r"\['reward'\] from its agent and from the group reward function"):
        small_trainer(run, agent, group_reward=by_number).fit(1)


def test_rewards_that_can_give_no_total_are_refused(run: Path) -> None:
    with pytest.raises(
        RewardError, match=r"\['reward'\] with what its agents emitted, lack one of those with a weight"
    ):
        small_trainer(run, speaks, group_reward=by_number, reward_weights={"quality": 1.0}).fit(1)


@pytest.mark.parametrize("given", [[1.0], 1.0, "ab", {"reward": 1.0}])
def test_what_is_no_list_of_rewards_is_refused(run: Path, given: object) -> None:
    with pytest.raises(RewardError, match="for 2 rollouts; return a list with one float, dict of floats or None each"):
        small_trainer(run, speaks, group_reward=lambda task, rollouts: given).fit(1)


def test_a_rollout_may_be_left_without_a_reward(run: Path) -> None:
    learner = CountingLearner()
    small_trainer(run, speaks, group_reward=lambda task, rollouts: [None, 1.0], learner=learner).fit(1)
    assert [one.rollout.reward for one in stored(run).values()] == [None, 1.0] * 2
    assert not any(sample.advantages[0] for _, sample in learner.samples)


def test_model_calls_of_the_function_belong_to_no_rollout(tmp_path: Path) -> None:
    """Rollouts run in this process meanwhile, and their gateway is down."""

    def judge(task: object, rollouts: Sequence[RolloutRecords]) -> list[float]:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}, {"role": "user", "content": "{}"}]}
        reply = client.post(f"{server.base_url}/chat/completions", json=body)
        return [float(reply.json()["choices"][0]["message"]["content"])]

    async def score() -> float | None:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_rollouts([a_rollout("r")])
            await store.start(["r"], owner=current_owner(), lease_seconds=60.0, versions={})
            await store.finish([Outcome(rollout_id="r", attempt=1, state=RolloutState.SUCCEEDED)])
            await group_rewards.GroupRewards(judge, store=store, weights={"reward": 1.0}).score(["r"])
            return (await store.rollouts())[0].reward

    leyden.instrument()
    with serving(answer=lambda shown: "0.5") as server, rollout(routing_to("http://127.0.0.1:9")) as running:
        assert asyncio.run(score()) == 0.5
    assert running.calls == []


# ---- failures, and going on ------------------------------------------------------------------------------------------


def test_a_failure_is_tried_again(run: Path) -> None:
    court = Court(TimeoutError("slow"), TimeoutError("slow"))
    small_trainer(run, speaks, group_reward=court, tasks_per_step=1).fit(1)
    assert len(court.groups) == 3 and [one.rollout.reward for one in stored(run).values()] == [0.0, 1.0]


def test_a_group_that_cannot_be_judged_has_no_rewards_and_that_is_said(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(task: object, rollouts: Sequence[RolloutRecords]) -> list[float]:
        if rollouts[0].rollout.group_id == "s1-t0":
            raise TimeoutError("slow")
        return by_number(task, rollouts)

    learner = CountingLearner()
    with caplog.at_level(logging.WARNING):
        summary = small_trainer(run, speaks, group_reward=judge, learner=learner).fit(1)
    missing = [one for one in stored(run).values() if one.rollout.reward is None]
    assert [one.rollout.group_id for one in missing] == ["s1-t0"] * 2
    assert len(learner.samples) == 2, "only the other group is trained"
    assert summary["unscored_groups"] == 1
    assert "failed 3 times for group 's1-t0'" in caplog.text and "TimeoutError: slow" in caplog.text


def test_after_several_such_groups_the_run_stops_and_a_resume_judges_them(run: Path) -> None:
    court = Court(*[TimeoutError("down")] * 100)
    with pytest.raises(RolloutError, match=r"\d groups in a row; mend it and resume"):
        small_trainer(run, speaks, group_reward=court, tasks_per_step=4).fit(1)
    court = Court()
    small_trainer(run, speaks, group_reward=court, tasks_per_step=4).fit(1, resume=True)
    assert len(court.groups) == 4
    assert all(one.rollout.reward is not None for one in stored(run).values())


def test_groups_that_cannot_be_judged_beside_others_that_can_end_no_run(run: Path) -> None:
    def judge(task: object, rollouts: Sequence[RolloutRecords]) -> list[float]:
        if task != "task 0":
            raise TimeoutError("down for this task")
        return [0.0, 1.0]

    tasks = [f"task {number}" for number in range(6)]
    summary = small_trainer(run, speaks, group_reward=judge, tasks=tasks, tasks_per_step=6).fit(1)
    assert summary["unscored_groups"] == 5


def test_a_resume_judges_the_groups_that_were_not_scored_and_no_others(run: Path) -> None:
    class Stops(Court):
        async def __call__(self, task: object, rollouts: Sequence[RolloutRecords]) -> list[float]:
            given = await super().__call__(task, rollouts)
            if len(self.groups) == 2:
                raise EngineError("the run ends here, after judging and before the totals are written")
            return given

    first = Stops()
    with pytest.raises(EngineError, match="ends here"):
        small_trainer(run, speaks, group_reward=first).fit(1)
    scored, left = first.groups
    assert {one.rollout.group_id for one in stored(run).values() if one.rollout.reward is not None} == {scored}
    second = Court()
    small_trainer(run, speaks, group_reward=second).fit(1, resume=True)
    assert second.groups == [left]
    assert all(one.rollout.reward is not None for one in stored(run).values())
