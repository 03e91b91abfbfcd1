"""Rewards that come after a rollout has ended."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

import leyden
from leyden import feedback
from leyden.cli import main
from leyden.errors import ConfigurationError, DatasetError, RewardError
from leyden.interfaces import RolloutRecords
from tests.recording.app import recorded


def record(folder: Path, count: int = 3, *, reward: float | None = None) -> list[str]:
    """Record some rollouts of one task; return their ids."""
    ids = []
    with leyden.record(folder) as recording:
        for number in range(count):
            with recording.rollout({"question": "why?"}) as rollout:
                rollout.output = f"answer {number}"
                if reward is not None:
                    rollout.reward(reward)
            ids.append(rollout.rollout_id)
    return ids


def totals(folder: Path, **weights: float) -> list[float | None]:
    return [one.rollout.reward for group in recorded(folder, **weights) for one in group.rollouts]


def test_rewards_reach_rollouts_while_the_app_goes_on_recording(tmp_path: Path) -> None:
    with leyden.record(tmp_path) as recording:
        with recording.rollout("task") as rollout:
            pass
        leyden.reward(rollout.rollout_id, 1, store=tmp_path)  # perhaps before it is stored
        recording.flush()
        assert totals(tmp_path) == [1.0]
        leyden.reward(rollout.rollout_id, 0.25, "polite", store=tmp_path, role="writer")
    assert totals(tmp_path, reward=1.0, polite=2.0) == [1.0]  # a role's reward is in no total
    [one] = recorded(tmp_path)[0].rollouts
    assert {(each.name, each.target_role, each.value) for each in one.rewards} == {
        ("reward", None, 1.0),
        ("polite", "writer", 0.25),
    }


def test_the_last_word_counts(tmp_path: Path) -> None:
    _, second, third = record(tmp_path, reward=0.0)
    leyden.reward(second, 1.0, store=tmp_path)
    leyden.reward(third, 1.0, store=tmp_path)
    leyden.reward(third, 0.5, store=tmp_path)
    assert totals(tmp_path) == [0.0, 1.0, 0.5]


def test_what_is_no_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="finite"):
        leyden.reward("one", float("inf"), store=tmp_path)
    with pytest.raises(ConfigurationError, match="is no folder"):
        leyden.reward("one", 1.0, store=tmp_path / "nowhere")
    (tmp_path / feedback.FILE).write_text('{"rollout_id": "a", "value": 1}\n{"rollout_id"\n')
    with pytest.raises(DatasetError, match=r"line 2 of .* is no reward"):
        feedback.read(tmp_path)


def give_many(folder: Path, name: str) -> None:
    """Run in a process of its own."""
    for number in range(200):
        leyden.reward(f"{name}-{number}", float(number), store=folder)


def test_processes_add_rewards_side_by_side(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=give_many, args=(tmp_path, name)) for name in "abc"]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert len({(line.rollout_id, line.value) for line in feedback.read(tmp_path)}) == 600


def test_a_table_is_added_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = record(tmp_path / "runs")
    table = tmp_path / "table.csv"
    table.write_text(f"rollout_id,value,name\n{first},1,\n{second},often,reward\n")
    assert main(["rewards", "add", str(tmp_path / "runs"), str(table)]) == 2
    assert "line 3 of" in (told := capsys.readouterr().err) and "'often' is no finite number" in told
    assert totals(tmp_path / "runs") == [None, None, None]
    table.write_text(f"rollout_id,value,name\n{first},1,\n{second},0.5,reward\nnobody,1,reward\n")
    assert main(["rewards", "add", str(tmp_path / "runs"), str(table)]) == 0
    assert "1 of them are for rollouts that are not stored here (yet), such as 'nobody'" in capsys.readouterr().out
    assert totals(tmp_path / "runs") == [1.0, 0.5, None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("rollout,value\na,1\n", "are needed"),
        ("rollout_id,value,nmae\na,1,x\n", "may stand beside them"),
        ("rollout_id,value\n,1\n", "has no rollout_id"),
        ("rollout_id,value\na,1,2\n", "has too many fields"),
        ("rollout_id,value\na,nan\n", "is no finite number"),
        ("rollout_id,value\n", "holds no rows"),
    ],
)
def test_a_table_that_is_none_is_refused(
    tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 1)
    (tmp_path / "table.csv").write_text(content)
    assert main(["rewards", "add", str(tmp_path), str(tmp_path / "table.csv")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / feedback.FILE).exists()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """A judge that gives the number at an answer's end, over 2, to each of those it is shown."""
    from leyden_plugins.rewards.judge import Judge

    asked: list[list[str]] = []

    async def call(judge: Judge, task: object, shown: list[RolloutRecords]) -> list[dict[str, float] | None]:
        outputs = [str(one.rollout.output) for one in shown]
        asked.append(outputs)
        return [None if output.endswith("1") else {judge.name: int(output[-1]) / 2} for output in outputs]

    monkeypatch.setattr(Judge, "__call__", call)
    yield asked


def test_a_judge_adds_rewards_and_asks_only_for_what_is_missing(
    tmp_path: Path, judged: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    arguments = ["rewards", "judge", str(tmp_path), "--model", "m", "--api-key-env", "", "--name", "good"]
    assert main(arguments) == 1  # one answer could not be judged
    assert "judged 2 of 3 rollouts" in capsys.readouterr().out
    assert totals(tmp_path, good=1.0) == [0.0, None, 1.0]
    main(arguments)
    assert judged == [["answer 0", "answer 1", "answer 2"], ["answer 1"]]
    main([*arguments, "--mode", "rank"])
    assert judged[-1] == ["answer 0", "answer 1", "answer 2"]  # ranked against the others
    capsys.readouterr()
    assert main(["rewards", "show", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "3 rollouts: 3 succeeded" in told
    assert "good: 2 rewards, mean 0.500" in told


def test_recorded_rollouts_of_all_processes_are_listed_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with leyden.record(tmp_path) as first:
        with first.rollout("one"):
            pass
        first.flush()
        [other] = record(tmp_path, 1)
    leyden.reward(other, 0.75, store=tmp_path)
    assert main(["rollouts", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "recorded" in told and "0.75" in told and "one" in told
    assert main(["show", str(tmp_path), other]) == 0
    assert "0.75" in capsys.readouterr().out
