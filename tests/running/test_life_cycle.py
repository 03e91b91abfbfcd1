"""A run from its first rollout to its summary: stopped, failed, resumed, repeated."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import leyden
from leyden.errors import ConfigurationError, EngineError, RoleError, RolloutError
from leyden.interfaces import RolloutRecords
from leyden.looping import Job
from leyden.roles import Policy, Sampling
from leyden.spans import Checkpoint, Mode, Rollout, Update
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import read_json
from leyden_plugins.algorithms.rl import GRPO
from tests.running.small import CountingLearner, Notes, SmallEngine, ask, odd_wins, rollout_id, small_trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


async def read(run: Path) -> tuple[list[Rollout], list[Update], Checkpoint | None]:
    async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
        return list(await store.rollouts()), list(await store.updates()), await store.latest_checkpoint()


def stored(run: Path) -> tuple[list[Rollout], list[Update], Checkpoint | None]:
    return asyncio.run(read(run))


def records(run: Path, *rollout_ids: str) -> list[RolloutRecords]:
    async def look() -> list[RolloutRecords]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            return list(await store.records(rollout_ids))

    return asyncio.run(look())


# ---- the end, and going on -----------------------------------------------------------------------------------------


def test_a_finished_run_has_its_numbers_in_the_summary(run):
    with small_trainer(run, val_tasks=["v0", "v1", "v2"]) as trainer:
        summary = trainer.fit(2)
    rollouts, updates, checkpoint = stored(run)
    assert (summary["train_rollouts"], summary["evaluation_rollouts"], summary["rollouts"]) == (8, 6, 14)
    assert len(rollouts) == 14
    assert [update.step for update in updates] == [1, 2]
    assert checkpoint is not None and (run / checkpoint.folder / "policies" / "me" / "steps.json").exists()
    assert summary["policy_calls"] == summary["model_calls"] == 14
    assert summary["evaluation_failures"] == {"0": 0, "2": 0}
    assert read_json(run / "summary.json")["accuracy_after"] == summary["accuracy_after"]


def test_resuming_a_finished_run_gives_its_summary_and_more_steps_go_on(run):
    small_trainer(run, val_tasks=["v0"]).fit(2)
    notes = Notes()
    again = small_trainer(run, val_tasks=["v0"], sinks=[notes])
    assert again.fit(2, resume=True)["policy_calls"] == 10, "the summary of the run, not of an empty fit"
    assert notes.steps == [] and "has all its 2 steps" in notes.lines[0]
    summary = again.fit(3, resume=True)
    assert notes.steps == [3]
    assert (summary["steps"], summary["resumed_after"], summary["train_rollouts"]) == (3, 2, 12)


def test_a_stop_ends_the_run_after_its_step_with_a_checkpoint_and_without_an_evaluation(run):
    notes = Notes()
    trainer = small_trainer(run, val_tasks=["v0"], sinks=[notes])
    notes.when_step_finished = lambda step: setattr(trainer._jobs.session, "stop_requested", step == 2)
    summary = trainer.fit(5)
    rollouts, _, checkpoint = stored(run)
    assert (summary["steps"], summary["total_steps"], summary["accuracy_after"]) == (2, 5, None)
    assert checkpoint is not None and checkpoint.step == 2
    assert {rollout.step for rollout in rollouts if rollout.mode is Mode.EVALUATE} == {0}
    assert any(line.endswith(f"leyden resume {run}") for line in notes.lines)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something is so; fail where it does not come to it."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def press_ctrl_c() -> None:
    """Interrupt this process while its main thread waits for a fit: never before, amid a Ctrl-C, or afterwards."""
    wait_for(main_thread_waits)
    os.kill(os.getpid(), signal.SIGINT)


def main_thread_waits() -> bool:
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code is not Job.result.__code__:
        frame = frame.f_back
    return frame is not None


def test_ctrl_c_ends_a_run_in_order_and_a_resume_completes_it(run):
    notes = Notes()
    trainer = small_trainer(run, sinks=[notes])

    def interrupt(step: int) -> None:
        press_ctrl_c()
        wait_for(lambda: trainer._jobs.session.stop_requested)

    notes.when_step_finished = interrupt
    assert trainer.fit(50)["steps"] == 1
    _, _, checkpoint = stored(run)
    assert checkpoint is not None and checkpoint.step == 1
    assert small_trainer(run).fit(5, resume=True)["steps"] == 5


def test_a_second_ctrl_c_stops_at_once_with_the_store_closed(run):
    is_at_work, is_over = threading.Event(), threading.Event()

    def agent(task: object) -> float:
        is_at_work.set()
        is_over.wait(30)
        return 1.0

    trainer = small_trainer(run, agent)

    def press_twice() -> None:
        is_at_work.wait(20)
        press_ctrl_c()
        wait_for(lambda: trainer._jobs.session.stop_requested)
        press_ctrl_c()

    pressing = threading.Thread(target=press_twice)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(1)
    pressing.join()
    is_over.set()
    rollouts, _, _ = stored(run)
    assert {rollout.state.value for rollout in rollouts} == {"queued"}, "given up, to be run anew"
    assert small_trainer(run).fit(1, resume=True)["train_rollouts"] == 4


def test_a_cancelled_afit_can_be_resumed_at_once_in_the_same_process(run):
    is_over = threading.Event()

    def agent(task: object) -> float:
        if not is_over.is_set() and "s2" in rollout_id():
            raise SystemExit if is_over.wait(20) else TimeoutError
        return odd_wins(task)

    async def main() -> None:
        fitting = asyncio.create_task(small_trainer(run, agent, checkpoint_every=1).afit(3))
        while not (run / "checkpoints" / "step-000001").exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        fitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fitting
        is_over.set()
        summary = await small_trainer(run, agent).afit(3, resume=True)
        assert (summary["steps"], summary["train_rollouts"], summary["failures"]) == (3, 12, {})

    asyncio.run(main())


def test_a_step_in_which_all_failed_is_sampled_anew_once_the_agent_is_mended(run):
    def broken(task: object) -> float:
        raise LookupError("not today")

    with pytest.raises(RolloutError, match=r"all 4 rollouts of step 1 failed: {'LookupError': 4}.*"):
        small_trainer(run, broken).fit(1)
    summary = small_trainer(run).fit(1, resume=True)
    assert (summary["steps"], summary["failures"], summary["train_rollouts"]) == (1, {"LookupError": 4}, 8)
    [update] = stored(run)[1]
    assert sorted(update.rollout_ids)[0].startswith("s1.1-t")


def test_a_refused_first_group_is_looked_at_again_on_resume(run):
    with pytest.raises(RoleError, match="no such role exists"):
        small_trainer(run, policies=[Policy("me", roles=["mian"])]).fit(1)
    notes = Notes()
    small_trainer(run, policies=[Policy("me", roles=["main"])], sinks=[notes]).fit(1, resume=True)
    assert any("roles seen (model calls): main 2" in line for line in notes.lines)
    assert len(records(run, "s1.1-t0-0", "s1.1-t0-1")[0].completions) == 1 or stored(run)[1]


def test_a_run_that_never_began_leaves_its_folder_free(run):
    class Broken(SmallEngine):
        async def start(self, policies: object) -> None:
            raise EngineError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        small_trainer(run, engine=Broken()).fit(1)
    assert small_trainer(run).fit(1)["steps"] == 1


def test_a_resume_asked_for_by_the_command_line_is_for_one_fit_only(run, monkeypatch, tmp_path):
    small_trainer(run).fit(1)
    monkeypatch.setenv("LEYDEN_RESUME", str(run))
    monkeypatch.setenv("LEYDEN_RESUME_STEPS", "2")
    assert small_trainer(tmp_path / "ignored").fit(9)["steps"] == 2
    assert small_trainer(tmp_path / "other").fit(1)["steps"] == 1
    assert not (tmp_path / "ignored").exists()


def test_a_checkpoint_that_a_kill_left_uncommitted_never_displaces_a_committed_one(run):
    small_trainer(run, checkpoint_every=1).fit(2)
    (run / "checkpoints" / "step-000009").mkdir()
    (run / "checkpoints" / "step-000004.partial").mkdir()
    small_trainer(run, checkpoint_every=1, keep_checkpoints=1).fit(3, resume=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]


# ---- many in one process -------------------------------------------------------------------------------------------


def test_two_trainers_run_at_once_in_threads_of_one_process(tmp_path):
    found: dict[str, object] = {}

    def train(name: str) -> None:
        found[name] = small_trainer(tmp_path / name, val_tasks=["v"]).fit(3)["rollouts"]

    threads = [threading.Thread(target=train, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {"one": 14, "two": 14}


def test_trainers_leave_no_threads_and_no_open_files(tmp_path):
    script = """
import os, sys, threading
from pathlib import Path
from tests.running.small import small_trainer
from tests.running.test_life_cycle import wait_for

for index in range(8):
    with small_trainer(Path(sys.argv[1]) / str(index)) as trainer:
        trainer.fit(2)
    wait_for(lambda: threading.active_count() <= 2)  # the agents' loop stays
    print(threading.active_count(), len(os.listdir("/proc/self/fd")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 8, done.stderr
    assert {threads for threads, _ in counts} == {2}
    assert counts[-1][1] - counts[1][1] < 4, "a shared client may keep a connection or two, not one a run"


def test_one_seed_gives_one_order_of_tasks(tmp_path):
    def order(seed: int) -> list[str]:
        run = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        small_trainer(run, tasks=[f"task {index}" for index in range(20)], seed=seed).fit(3)
        return [rollout.task_id for rollout in stored(run)[0]]

    assert order(1) == order(1) != order(2)


def test_a_sink_that_raises_everywhere_disturbs_nothing(run):
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise LookupError(name)

    assert small_trainer(run, sinks=[Broken()]).fit(1)["steps"] == 1


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_only_training_replaces_the_agents_own_sampling(run):
    def agent(task: object) -> float:
        ask(str(task), temperature=0.25, seed=7)
        return float(int(rollout_id()[-1]) % 2)

    engine = SmallEngine()
    policy = Policy("me", sampling=Sampling(temperature=0.9))
    trainer = small_trainer(run, agent, engine=engine, policies=[policy], val_tasks=["held out"])
    trainer.fit(1)
    asked = {
        str(one.request.messages[0]["content"]): (one.request.sampling.temperature, one.request.sampling.seed)
        for one in engine.log
    }
    assert asked.pop("held out") == (0.25, 7)
    assert set(asked.values()) == {(0.9, None)}
    trainer.dev(1)
    assert engine.log[-1].request.sampling.temperature == 0.25


def test_a_policy_that_is_not_trainable_is_served_and_recorded_and_never_trained(run):
    def agent(task: object) -> float:
        with leyden.role("opponent"):
            ask("your move")
        return odd_wins(task)

    learner = CountingLearner()
    policies = [Policy("me", roles=["main"]), Policy("frozen", roles=["opponent"], trainable=False)]
    small_trainer(run, agent, policies=policies, learner=learner).fit(2)
    assert {name for name, _ in learner.samples} == {"me"}
    [one] = records(run, stored(run)[0][0].rollout_id)
    assert [completion.policy for completion in one.completions] == ["frozen", "me"]


# ---- rewards -------------------------------------------------------------------------------------------------------


def test_a_reward_for_one_role_reaches_the_loss_of_that_role_alone(run):
    def agent(task: object) -> float:
        is_odd = int(rollout_id()[-1]) % 2
        for name in ("writer", "critic"):
            with leyden.role(name):
                ask(name)
        leyden.emit_reward(float(is_odd), "style", role="writer")
        return 0.0

    learner = CountingLearner()
    policies = [Policy("a", roles=["writer"]), Policy("b", roles=["critic"])]
    small_trainer(run, agent, policies=policies, learner=learner).fit(1)
    assert {name for name, _ in learner.samples} == {"a"}
    signs = {max(row.advantages) > 0 for _, row in learner.samples if any(row.advantages)}
    assert signs == {True, False}


def test_named_rewards_add_up_by_weight_and_one_that_lacks_a_name_leaves_its_group(run):
    def agent(task: object) -> dict[str, float]:
        ask(str(task))
        sample = int(rollout_id()[-1])
        return {"right": sample / 2} if sample == 2 else {"right": sample / 2, "short": 1.0}

    small_trainer(run, agent, algorithm=GRPO(group_size=3), reward_weights={"right": 2.0, "short": 0.5}).fit(1)
    rollouts = stored(run)[0]
    assert {rollout.rollout_id[-1]: rollout.reward for rollout in rollouts} == {"0": 0.5, "1": 1.5, "2": None}
    assert {rollout.error_type for rollout in rollouts if rollout.reward is None} == {"NoReward"}
    [update] = stored(run)[1]
    assert {name[-1] for name in update.rollout_ids} == {"0", "1"}


@pytest.mark.parametrize(("failure_reward", "trained"), [(0.0, {"0", "1", "2"}), (None, {"1", "2"})])
def test_a_failed_rollout_is_trained_with_its_failure_reward_or_dropped(run, failure_reward, trained):
    def agent(task: object) -> float:
        ask(str(task))
        sample = int(rollout_id()[-1])
        if sample == 0:
            raise LookupError("a bad answer")
        return float(sample)

    summary = small_trainer(run, agent, algorithm=GRPO(group_size=3), failure_reward=failure_reward).fit(1)
    assert summary["failures"] == {"LookupError": 2}
    [update] = stored(run)[1]
    assert {name[-1] for name in update.rollout_ids} == trained


def test_an_overlong_answer_is_masked_where_the_user_says_so(tmp_path):
    def agent(task: object) -> float:
        ask(str(task), max_tokens=1)
        return float(int(rollout_id()[-1]) % 2)

    learners = {mask: CountingLearner() for mask in (False, True)}
    for mask, learner in learners.items():
        small_trainer(tmp_path / str(mask), agent, learner=learner, mask_overlong=mask).fit(1)
    assert learners[False].samples and not learners[True].samples


def test_an_evaluation_leaves_out_what_was_dropped_on_purpose_and_counts_failures(run):
    def agent(task: str) -> object:
        if task == "broken":
            raise LookupError("no")
        return leyden.NO_REWARD if task == "dropped" else 1.0

    evaluation = small_trainer(run, agent).evaluate(["good", "broken", "dropped"])
    assert (evaluation.estimate().mean, evaluation.estimate().n, evaluation.failures) == (0.5, 2, 1)


def test_there_must_be_something_to_evaluate_on(run):
    with pytest.raises(ConfigurationError, match="nothing to evaluate on"):
        small_trainer(run).evaluate()
