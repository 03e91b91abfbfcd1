"""Rollouts that go on while the learner works: never too stale, never lost, never counted twice."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

import pytest

import leyden
from leyden.errors import ConfigurationError, LeydenError, RoleError, RolloutError
from leyden.interfaces import Batch
from leyden.roles import Policy
from leyden.spans import Mode, RolloutState, Update
from leyden.training.asynchronous import Places
from leyden.training.versions import Versions
from leyden_plugins.algorithms.rl import GRPO
from tests.running.reading import Ledger, ledger
from tests.running.small import CountingLearner, Notes, SmallEngine, odd_wins, rollout_id, small_trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


def waits(task: object) -> float:
    """Take a heavy-tailed while, drawn from the rollout's name."""
    time.sleep(min(0.3, random.Random(rollout_id()).lognormvariate(-5.0, 1.0)))
    return odd_wins(task)


class SlowLearner(CountingLearner):
    """Takes long enough for rollouts to begin and end meanwhile; fails once, at the update given."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        time.sleep(0.02)
        if self.steps[policy] + 1 == self.fails_at:
            raise LeydenError("the machine is on fire")
        return super().forward_backward(policy, batch)


def asynchronous(run: Path, agent: object = waits, **options: object) -> leyden.Trainer:
    defaults: dict[str, object] = {"max_staleness": 2, "learner": SlowLearner(), "tasks": list(range(10))}
    return small_trainer(run, agent, **{**defaults, **options})


def check(found: Ledger, *, steps: int, bound: int, group_size: int = 2, tasks_per_step: int = 2) -> None:
    """Assert what holds of every finished asynchronous run, however often it was killed."""
    assert [update.step for update in found.standing] == list(range(1, steps + 1))
    assert all(len(found.taken[step]) == tasks_per_step for step in range(1, steps + 1))
    taken = [name for step in range(1, steps + 1) for name in found.taken[step]]
    assert len(set(taken)) == len(taken), "no group is trained twice"
    assert set(found.groups()) == set(taken), "and none is lost"
    assert set(found.groups().values()) == {group_size}
    assert all(rollout.state is RolloutState.SUCCEEDED for rollout in found.rollouts)
    for update in found.standing:
        assert {name.rpartition("-")[0] for name in update.rollout_ids} == set(found.taken[update.step])
    assert found.oldest() <= bound


# ---- the bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_no_trained_call_is_staler_than_the_bound_and_the_metric_says_how_stale(run, bound):
    notes = Notes()
    found: dict[int, Mapping[str, float]] = {}
    notes.step_finished = lambda step, metrics: found.update({step: metrics})  # type: ignore[method-assign]
    asynchronous(run, max_staleness=bound, sinks=[notes]).fit(12)
    read = ledger(run)
    check(read, steps=12, bound=bound)
    assert read.oldest() >= 1, "rollouts began before the update that came before theirs"
    assert {step: found[step]["policy/staleness_max"] for step in found} == {
        step: max(ages) for step, ages in read.ages().items()
    }
    assert {step: found[step]["policy/staleness_mean"] for step in found} == {
        step: fmean(ages) for step, ages in read.ages().items()
    }


def test_a_group_that_takes_long_is_trained_late_but_in_time_and_whole(run):
    def agent(task: object) -> float:
        if rollout_id().startswith("g2-") and rollout_id().endswith("-1"):
            time.sleep(0.6)
        return odd_wins(task)

    asynchronous(run, agent, max_staleness=3).fit(8)
    read = ledger(run)
    check(read, steps=8, bound=3)
    [step] = [step for step, names in read.taken.items() if any(name.startswith("g2-") for name in names)]
    assert step == 4, "it waits for no other group, and the fourth step waits for it"


def test_every_place_in_time_is_kept_for_a_group_that_needs_it():
    assert Places(free=2, a_step=2).suffice([0, 0, 1, 1])
    assert not Places(free=1, a_step=2).suffice([0, 0, 1])
    assert not Places(free=2, a_step=2).suffice([1, 1, 1, 1, 1])
    assert Places(free=0, a_step=2).suffice([1, 1, 2, 2])
    assert not Places(free=2, a_step=2).suffice([-1])


def test_staleness_counts_updates_of_the_own_policy_and_not_version_numbers():
    def update(policy: str, step: int, version: int, *, voided: bool = False) -> Update:
        return Update(
            update_id=f"{policy}{version}", policy=policy, step=step, version=version, rollout_ids=[], voided=voided
        )

    versions = Versions(
        [
            update("a", 1, 1),
            update("a", 2, 2, voided=True),
            update("a", 3, 3, voided=True),
            update("a", 2, 4),
            update("a", 3, 5),
            update("b", 1, 1),
        ]
    )
    assert [versions.staleness("a", version) for version in (0, 1, 2, 4, 3, 5)] == [3, 2, 1, 1, 0, 0]
    assert versions.staleness("b", 0) == 1, "the other policy's updates do not age it"
    assert versions.staleness("frozen", 0) == 0


def test_sampling_goes_on_while_the_learner_works(run):
    updates: list[tuple[float, float]] = []
    ends: list[float] = []

    class Timed(SlowLearner):
        def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
            began = time.monotonic()
            time.sleep(0.3)
            updates.append((began, time.monotonic()))
            return super().forward_backward(policy, batch)

    def agent(task: object) -> float:
        time.sleep(0.06)
        reward = odd_wins(task)
        ends.append(time.monotonic())
        return reward

    asynchronous(run, agent, learner=Timed(), max_staleness=1).fit(5)
    inside = [sum(began < end < ended for end in ends) for began, ended in updates]
    assert min(inside[1:-1]) >= 2, "in all updates but the first, before which all may have ended, and the last"


def test_an_engine_that_keeps_versions_is_never_held_and_one_that_does_not_is(run, tmp_path):
    from leyden_plugins.gateway.gateway import HttpGateway

    held: list[int] = []
    original = HttpGateway.hold

    async def hold(self: object) -> None:
        held.append(1)
        await original(self)  # type: ignore[arg-type]  # the gateway itself

    class Waiting(SmallEngine):
        keeps_versions = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HttpGateway, "hold", hold)
        asynchronous(run).fit(3)
        assert held == []
        asynchronous(tmp_path / "waiting", engine=Waiting()).fit(3)
        assert len(held) == 3
    check(ledger(tmp_path / "waiting"), steps=3, bound=2)


# ---- room ----------------------------------------------------------------------------------------------------------


def test_no_more_rollouts_are_under_way_than_allowed_and_none_begins_that_no_step_will_train(run):
    under_way: set[str] = set()
    most: list[int] = []

    def agent(task: object) -> float:
        under_way.add(rollout_id())
        most.append(len(under_way))
        time.sleep(0.005)
        under_way.discard(rollout_id())
        return odd_wins(task)

    asynchronous(run, agent, max_staleness=4, concurrency=3).fit(6)
    check(ledger(run), steps=6, bound=4)
    assert max(most) == 3


def test_tasks_come_in_the_seeded_order_of_a_synchronous_run(tmp_path):
    asynchronous(tmp_path / "one").fit(5)
    small_trainer(tmp_path / "two", tasks=list(range(10))).fit(5)
    began = sorted(ledger(tmp_path / "one").groups(), key=lambda name: int(name[1:].partition("-")[0]))
    assert [name.partition("-")[2] for name in began] == [
        name.partition("-")[2] for name in ledger(tmp_path / "two").groups()
    ]


@pytest.mark.parametrize("bound", [-1, 0.5])
def test_a_bound_that_is_no_number_of_updates_is_refused(run, bound):
    with pytest.raises(ConfigurationError, match="max_staleness must be a whole number"):
        small_trainer(run, max_staleness=bound)


def test_an_evaluation_in_the_middle_sees_one_version(run):
    engine = SmallEngine()
    asynchronous(run, engine=engine, val_tasks=["v0", "v1", "v2"], evaluate_every=2).fit(6)
    read = ledger(run)
    for step in (2, 4):
        versions = {
            completion.version
            for rollout in read.rollouts
            if rollout.mode is Mode.EVALUATE and rollout.step == step
            for completion in read.records[rollout.rollout_id].completions
        }
        assert versions == {step}


# ---- stops, failures, kills ----------------------------------------------------------------------------------------


def test_a_stop_ends_after_its_step_and_a_resume_goes_on_with_what_was_under_way(run):
    notes = Notes()
    trainer = asynchronous(run, sinks=[notes], max_staleness=4)
    notes.when_step_finished = lambda step: setattr(trainer._jobs.session, "stop_requested", step == 3)
    assert trainer.fit(9)["steps"] == 3
    left = ledger(run)
    waiting = set(left.groups()) - {name for names in left.taken.values() for name in names}
    assert waiting, "groups were under way"
    assert {rollout.state for rollout in left.rollouts} <= {RolloutState.SUCCEEDED, RolloutState.QUEUED}
    assert asynchronous(run, max_staleness=4).fit(9, resume=True)["steps"] == 9
    read = ledger(run)
    check(read, steps=9, bound=4)
    assert waiting <= {name for step in range(4, 10) for name in read.taken[step]}


def test_a_step_that_failed_is_made_again_from_the_same_groups(run):
    with pytest.raises(LeydenError, match="on fire"):
        asynchronous(run, learner=SlowLearner(fails_at=6), checkpoint_every=3).fit(9)
    left = ledger(run)
    assert [update.step for update in left.standing] == [1, 2, 3, 4, 5]
    learner = SlowLearner()
    asynchronous(run, learner=learner, checkpoint_every=3).fit(9, resume=True)
    read = ledger(run)
    check(read, steps=9, bound=2)
    voided = {update.step: update.rollout_ids for update in read.updates if update.voided}
    again = {update.step: update.rollout_ids for update in read.standing}
    assert voided == {step: again[step] for step in (4, 5)}
    assert {step: read.taken[step] for step in left.taken} == left.taken, "the sixth step's too"
    assert learner.steps == {"me": 9}


SCRIPT = """
import sys
from pathlib import Path
from tests.running.test_asynchronous import asynchronous
asynchronous(Path(sys.argv[1]), checkpoint_every=3).fit(20, resume=len(sys.argv) > 2)
"""


def test_kills_at_any_moment_lose_no_group_and_count_none_twice(run):
    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(run), *words],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )

    def saved() -> int:
        """Return the latest checkpoint's step."""
        return max((int(path.name[5:11]) for path in (run / "checkpoints").glob("step-??????")), default=0)

    process = start()
    for pause in (0.02, 0.15, 0.3):
        before, deadline = saved(), time.monotonic() + 30
        while saved() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, said
        process = start("resume")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    check(ledger(run), steps=20, bound=2)


def test_a_cancelled_run_leaves_no_rollout_under_way(run):
    async def main() -> None:
        fitting = asyncio.create_task(asynchronous(run, checkpoint_every=1).afit(9))
        while not (run / "checkpoints" / "step-000002").exists():
            await asyncio.sleep(0.01)
        fitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fitting
        assert RolloutState.RUNNING not in {
            rollout.state for rollout in (await asyncio.to_thread(ledger, run)).rollouts
        }
        assert (await asynchronous(run).afit(9, resume=True))["steps"] == 9

    asyncio.run(main())
    check(ledger(run), steps=9, bound=2)


def test_a_run_that_was_asynchronous_goes_on_synchronously_and_the_other_way_round(run):
    asynchronous(run).fit(3)
    small_trainer(run, tasks=list(range(10))).fit(5, resume=True)
    asynchronous(run).fit(7, resume=True)
    read = ledger(run)
    assert [update.step for update in read.standing] == [1, 2, 3, 4, 5, 6, 7]
    kinds = ["".join(sorted({name[0] for name in read.taken[step]})) for step in range(1, 8)]
    assert kinds == ["g", "g", "g", "s", "s", "g", "g"]
    assert read.oldest() <= 2


def test_groups_begun_under_a_looser_bound_are_left_out_when_it_is_tightened(run):
    notes = Notes()
    trainer = asynchronous(run, sinks=[notes], max_staleness=6)
    notes.when_step_finished = lambda step: setattr(trainer._jobs.session, "stop_requested", step == 2)
    trainer.fit(9)
    asynchronous(run, max_staleness=1).fit(9, resume=True)
    read = ledger(run)
    assert [update.step for update in read.standing] == list(range(1, 10))
    assert max(age for step, ages in read.ages().items() if step > 2 for age in ages) <= 1


def test_a_step_in_which_all_failed_stops_the_run_and_other_groups_are_sampled_on_resume(run):
    def broken(task: object) -> float:
        raise LookupError("not today")

    with pytest.raises(RolloutError, match="all 4 rollouts of step 1 failed"):
        asynchronous(run, broken).fit(2)
    broken_groups = set(ledger(run).groups())
    summary = asynchronous(run).fit(6, resume=True)
    read = ledger(run)
    taken = [name for step in range(1, 7) for name in read.taken[step]]
    assert summary["steps"] == 6 and len(set(taken)) == 12
    assert {"g1", "g2"} & {name.partition("-")[0] for name in broken_groups}
    assert not {"g1", "g2"} & {name.partition("-")[0] for name in taken}


def test_a_refused_first_group_is_left_out_and_another_one_looked_at(run):
    with pytest.raises(RoleError, match="no such role exists"):
        asynchronous(run, policies=[Policy("me", roles=["mian"])]).fit(2)
    assert len(ledger(run).groups()) == 1, "nothing else begins before the look at the first group is over"
    asynchronous(run).fit(2, resume=True)
    assert not any(name.startswith("g1-") for names in ledger(run).taken.values() for name in names)


def test_whole_groups_of_any_size_are_trained(run):
    asynchronous(run, algorithm=GRPO(group_size=3), max_staleness=1).fit(6)
    check(ledger(run), steps=6, bound=1, group_size=3)
