"""What breaks around a run: the engine, the gateway, a worker, the store, an agent that never ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from leyden.errors import EngineError, RolloutError
from leyden.interfaces import Generation, GenerationRequest
from leyden.spans import FINISHED, Completion, Rollout
from leyden.sqlite import SQLiteStore
from leyden_plugins.algorithms.rl import GRPO
from tests.running.small import CountingLearner, SmallEngine, ask, odd_wins, rollout_id, small_trainer
from tests.running.test_life_cycle import records, run, stored, unpatched, wait_for

__all__ = ["run", "unpatched"]
ROOT = Path(__file__).parents[2]


# ---- engine and gateway --------------------------------------------------------------------------------------------


class Faulty(SmallEngine):
    """Refuses some of its calls."""

    def __init__(self, refused: range) -> None:
        super().__init__()
        self.refused = refused
        self.asked = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        self.asked += 1
        if self.asked in self.refused:
            raise EngineError("the device fell off the bus")
        return await super().generate(request)


def test_an_engine_that_fails_for_a_moment_costs_no_rollout(run):
    summary = small_trainer(run, engine=Faulty(range(3, 6))).fit(2)
    assert (summary["failures"], summary["train_rollouts"]) == ({}, 8)


def test_an_engine_that_is_gone_stops_the_run_and_is_not_blamed_on_the_agent(run):
    trainer = small_trainer(run, engine=Faulty(range(3, 10**6)), timeout_seconds=0.6, max_attempts=2)
    with pytest.raises(RolloutError, match=r"all 4 rollouts of step 2 failed: {'EngineError': 4}"):
        trainer.fit(5)
    lost = [rollout for rollout in stored(run)[0] if rollout.error_type is not None]
    assert {(rollout.reward, rollout.error_type, rollout.attempt) for rollout in lost} == {(None, "EngineError", 2)}


# ---- agents --------------------------------------------------------------------------------------------------------


def test_an_async_agent_that_blocks_works_in_this_process_too(run):
    async def agent(task: object) -> float:
        return odd_wins(task)

    assert small_trainer(run, agent).fit(2)["failures"] == {}


def test_hanging_agents_time_out_are_trained_and_take_no_place_from_the_others(run):
    learner = CountingLearner()

    def agent(task: object) -> float:
        ask(str(task))
        if int(rollout_id()[-1]) % 2:
            threading.Event().wait(60)
        return 1.0

    trainer = small_trainer(
        run, agent, learner=learner, concurrency=2, timeout_seconds=0.4, algorithm=GRPO(group_size=4)
    )
    summary = trainer.fit(2)
    assert summary["failures"] == {"TimeoutError": 8}
    assert {rollout.reward for rollout in stored(run)[0] if rollout.error_type} == {0.0}
    assert {max(row.advantages) > 0 for _, row in learner.samples} == {True, False}, "failures are trained"


def test_an_agent_that_changes_its_task_changes_nobody_elses(run):
    def agent(task: dict[str, str]) -> float:
        task["question"] += "!"
        ask(task["question"])
        return float(int(rollout_id()[-1]) % 2)

    engine = SmallEngine()
    small_trainer(run, agent, tasks=[{"question": "how"}, {"question": "why"}], engine=engine).fit(2)
    assert {str(one.request.messages[0]["content"]) for one in engine.log} == {"how!", "why!"}


def test_fifty_rollouts_are_in_flight_at_once_and_no_more(run):
    running, most, lock = 0, 0, threading.Lock()
    everybody = threading.Barrier(50, timeout=15)

    def agent(task: object) -> float:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        everybody.wait()
        reward = odd_wins(task)
        with lock:
            running -= 1
        return reward

    trainer = small_trainer(run, agent, algorithm=GRPO(group_size=50), tasks_per_step=1, concurrency=50)
    assert (trainer.fit(2)["failures"], most) == ({}, 50)


# ---- workers -------------------------------------------------------------------------------------------------------

DYING = """
import os, signal
from pathlib import Path
from tests.running.small import ask, odd_wins, rollout_id

def solve(task):
    ask(str(task))
    mark = Path(os.environ["MARK"])
    if rollout_id().endswith("1") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return odd_wins(task)
"""


def test_a_killed_workers_attempts_are_made_again_and_only_the_second_ones_are_trained(run, tmp_path, monkeypatch):
    (tmp_path / "dying_app.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    import dying_app

    learner = CountingLearner()
    summary = small_trainer(run, dying_app.solve, learner=learner, workers=1, tasks_per_step=1).fit(2)
    rollouts, updates, _ = stored(run)
    assert summary["failures"] == {} and summary["train_rollouts"] == 4
    assert summary["retries"] == sum(rollout.attempt - 1 for rollout in rollouts) >= 1
    # The one that killed the worker had its answer; the others of that worker may not have asked yet.
    again = next(rollout for rollout in rollouts if rollout.attempt == 2 and rollout.rollout_id.endswith("1"))
    [kept] = records(run, again.rollout_id)
    assert {completion.attempt for completion in kept.completions} == {2}
    assert any(isinstance(one, Completion) and one.attempt == 1 for one in late(run, again.rollout_id))
    counted = [rollout_id for update in updates for rollout_id in update.rollout_ids]
    assert sorted(counted) == sorted(rollout.rollout_id for rollout in rollouts)
    trained = sum(len(sample.token_ids) for _, sample in learner.samples)
    assert trained == sum(
        len(choice.token_ids)
        for one in records(run, *counted)
        for completion in one.completions
        for choice in completion.choices
    )


def late(run: Path, rollout_id: str) -> list[object]:
    async def look() -> list[object]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            return list(await store.late_records(rollout_id))

    return asyncio.run(look())


# ---- kill -9, and a full disk --------------------------------------------------------------------------------------

SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
from leyden.sqlite import SQLiteStore
from tests.running.small import CountingLearner, odd_wins, rollout_id, small_trainer

run, moment = Path(sys.argv[1]), sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def agent(task):
    reward = odd_wins(task)
    where = {"s1-": "preflight" if not list(run.glob("metrics*")) and moment == "preflight" else "first step",
             "e0-": "first evaluation", "e2-": "evaluation", "s4-": "step"}.get(rollout_id()[:3])
    if where == moment and (moment != "first step" or rollout_id().endswith(late_task)):
        die()
    if moment == "full disk" and rollout_id().startswith("s3-"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return reward

late_task = "1"

class Learner(CountingLearner):
    def save(self, folder):
        super().save(folder)
        if moment == "checkpoint" and self.steps["me"] >= 2:
            die()

if moment == "commit":
    async def commit_checkpoint(self, checkpoint):
        die()
    SQLiteStore.commit_checkpoint = commit_checkpoint

summary = small_trainer(run, agent, learner=Learner(), val_tasks=["v0", "v1"], evaluate_every=2, checkpoint_every=1)
print(summary.fit(4, resume=moment == "resume")["steps"])
"""


def script(run: Path, moment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run), moment],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def check_every_rollout_counts_once(run: Path) -> None:
    rollouts, updates, checkpoint = stored(run)
    assert checkpoint is not None and checkpoint.step == 4
    assert [update.step for update in updates] == [1, 2, 3, 4]
    counted = [rollout_id for update in updates for rollout_id in update.rollout_ids]
    assert sorted(counted) == sorted(train_ids(rollouts))
    assert all(rollout.state in FINISHED for rollout in rollouts)
    steps = json.loads((run / checkpoint.folder / "learner" / "steps.json").read_text())
    assert steps == {"me": 4}, "no update was lost or made twice"


def train_ids(rollouts: list[Rollout]) -> list[str]:
    return [rollout.rollout_id for rollout in rollouts if rollout.rollout_id.startswith("s")]


@pytest.mark.parametrize(
    "moment", ["preflight", "first evaluation", "first step", "checkpoint", "commit", "evaluation", "step"]
)
def test_a_run_killed_at_any_moment_is_completed_with_every_rollout_counted_once(run, moment):
    killed = script(run, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = script(run, "resume")
    assert resumed.stdout == "4\n", resumed.stderr
    check_every_rollout_counts_once(run)


def test_a_full_disk_ends_the_run_with_the_stores_message_and_room_lets_it_go_on(run):
    full = script(run, "full disk")
    assert full.returncode == 1
    assert "leyden.errors.StoreError" in full.stderr.splitlines()[-1] and "make room" in full.stderr
    resumed = script(run, "resume")
    assert resumed.stdout == "4\n", resumed.stderr
    check_every_rollout_counts_once(run)


# ---- Ctrl-C, as a terminal sends it: to the whole process group ----------------------------------------------------

GUARDED = """
import os, sys, time
from pathlib import Path
from tests.running.small import odd_wins, small_trainer

def solve(task):
    time.sleep(float(os.environ["PAUSE"]))
    return odd_wins(task)

if __name__ == "__main__":
    trainer = small_trainer(Path(sys.argv[1]), solve, workers=2, sinks=["terminal", "jsonl"])
    print("steps:", trainer.fit(1000)["steps"])
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_step_and_checkpoint_and_a_second_one_everything(run, tmp_path, times):
    path = tmp_path / "guarded.py"
    path.write_text(GUARDED)
    process = subprocess.Popen(
        [sys.executable, str(path), str(run)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PAUSE": "0.05" if times == 1 else "0.5"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 2)
    os.killpg(process.pid, signal.SIGINT)
    if times == 2:
        assert any("Ctrl-C again stops at once" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
    printed = process.stdout.read()
    assert process.wait(30) == (0 if times == 1 else -signal.SIGINT)
    wait_for(lambda: not living_members(process.pid))
    if times == 1:
        checkpoint = stored(run)[2]
        assert checkpoint is not None and f"steps: {checkpoint.step}" in printed
        assert f"leyden resume {run}" in printed.replace("\n", "")


def living_members(group: int) -> list[str]:
    """Return the processes of a group that are more than an entry waiting to be read."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(stat.parent.name)
    return found
