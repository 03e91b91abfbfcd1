"""Groups that a step turns down, groups of earlier steps, and policies that stop learning."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import leyden
from leyden.errors import ConfigurationError, LeydenError
from leyden.interfaces import Batch, Group, Session
from leyden.roles import LoRA, Policy
from leyden.stepwise import Stepwise
from leyden.training.runfolder import read_json
from leyden_plugins.algorithms.rl import GRPO, Replay
from tests.running.reading import ledger
from tests.running.small import CountingLearner, Notes, ask, odd_wins, small_trainer

MODES = pytest.mark.parametrize("max_staleness", [0, 2])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


class Counted(Notes):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, Mapping[str, float]] = {}

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics[step] = metrics
        super().step_finished(step, metrics)


class Choosy(GRPO):
    """Takes no group of an odd task."""

    most_batches = 6

    def accepts(self, group: Group) -> bool:
        return int(str(group.task)) % 2 == 0


def is_even(name: str) -> bool:
    return int(name.rpartition("t")[2]) % 2 == 0


# ---- groups that are not accepted ----------------------------------------------------------------------------------


@MODES
def test_other_tasks_take_the_place_of_groups_that_are_not_accepted(run, max_staleness):
    sink = Counted()
    options = {"tasks": list(range(12)), "algorithm": Choosy(group_size=2), "max_staleness": max_staleness}
    small_trainer(run, sinks=[sink], **options).fit(6)
    read = ledger(run)
    assert all(len(names) == 2 and all(map(is_even, names)) for names in read.taken.values())
    rejected = [name for names in read.rejected.values() for name in names]
    assert rejected and not any(map(is_even, rejected))
    counted = {name for update in read.standing for name in update.rollout_ids}
    assert {name.rpartition("-")[0] for name in counted} == {name for some in read.taken.values() for name in some}
    assert {step: sink.metrics[step]["groups/rejected"] for step in read.rejected} == {
        step: float(len(names)) for step, names in read.rejected.items()
    }
    if max_staleness:
        assert read.oldest() <= max_staleness
        assert set(read.groups()) == counted_groups(read.taken) | set(rejected), "nothing is sampled to be dropped"


def counted_groups(taken: Mapping[int, Sequence[str]]) -> set[str]:
    return {name for names in taken.values() for name in names}


@MODES
def test_a_step_gives_up_after_so_many_times_its_tasks(run, max_staleness):
    class Never(Choosy):
        most_batches = 3

        def accepts(self, group: Group) -> bool:
            return False

    learner = CountingLearner()
    options = {"tasks": list(range(12)), "algorithm": Never(group_size=2), "max_staleness": max_staleness}
    small_trainer(run, learner=learner, **options).fit(3)
    read = ledger(run)
    assert {step: len(names) for step, names in read.rejected.items()} == {1: 6, 2: 6, 3: 6}
    assert learner.steps == {"me": 0} and read.updates == []


@MODES
def test_a_resumed_run_turns_the_same_groups_down(run, max_staleness):
    class Failing(CountingLearner):
        def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
            if self.steps[policy] == 2:
                raise LeydenError("the machine is on fire")
            return super().forward_backward(policy, batch)

    options = {"tasks": list(range(12)), "algorithm": Choosy(group_size=2), "max_staleness": max_staleness}
    with pytest.raises(LeydenError, match="on fire"):
        small_trainer(run, learner=Failing(), **options).fit(5)
    before = ledger(run)
    small_trainer(run, **options).fit(5, resume=True)
    after = ledger(run)
    assert {step: after.taken[step] for step in (1, 2, 3)} == before.taken
    assert {step: after.rejected[step] for step in (1, 2, 3)} == before.rejected


def test_a_run_killed_while_it_chooses_goes_on_with_every_group_it_had_begun(run):
    class Chooses(GRPO):
        most_batches = 6
        seen = 0
        dies = True

        def accepts(self, group: Group) -> bool:
            Chooses.seen += 1
            if Chooses.dies and Chooses.seen == 3:
                raise LeydenError("killed here")
            return not group.group_id.startswith(("g1-", "g2-"))

    options = {"tasks": list(range(12)), "tasks_per_step": 1, "max_staleness": 1}
    with pytest.raises(LeydenError, match="killed here"):
        small_trainer(run, algorithm=Chooses(group_size=2), **options).fit(2)
    Chooses.dies = False
    small_trainer(run, algorithm=Chooses(group_size=2), **options).fit(2, resume=True)
    read = ledger(run)
    rejected = [name.partition("-")[0] for name in read.rejected[1]]
    assert (sorted(rejected), read.rejected.get(2, [])) == (["g1", "g2"], [])
    assert [names[0].partition("-")[0] for names in read.taken.values()] == ["g3", "g4"]


def test_a_step_that_has_run_out_of_tasks_goes_on_with_the_groups_it_has(run):
    class One(Choosy):
        def accepts(self, group: Group) -> bool:
            return group.task == 0

    small_trainer(run, tasks=[0, 1, 2], algorithm=One(group_size=2)).fit(1)
    read = ledger(run)
    assert read.taken == {1: ["s1-t0"]} and sorted(read.rejected[1]) == ["s1-t1", "s1-t2"]


# ---- groups of earlier steps ---------------------------------------------------------------------------------------


class Replaying(Stepwise):
    """Trains a step's groups, and two of the last two steps again."""

    group_size = 2

    def __init__(self) -> None:
        self.ages: dict[int, set[int]] = {}

    async def improve(
        self, session: Session, policy: Policy, groups: Sequence[Group], step: int
    ) -> Mapping[str, float]:
        return await GRPO(group_size=2).improve(session, policy, groups, step)

    async def run(self, session: Session) -> None:
        async for step in session.steps():
            fresh = await session.sample(step, group_size=2)
            again = await session.replay(step, count=2, max_age=2)
            groups = [*fresh, *again]
            [policy] = session.policies
            self.ages[step] = {session.staleness(one) for one in session.transitions(again, policy)}
            await self.improve(session, policy, groups, step)
            await session.finish_step(step, groups, {})


@MODES
def test_replayed_groups_come_from_the_last_steps_and_stand_apart_in_the_ledger(run, max_staleness):
    sink, algorithm = Counted(), Replaying()
    small_trainer(run, algorithm=algorithm, max_staleness=max_staleness, sinks=[sink]).fit(5)
    read = ledger(run)
    step_of = {name: step for step, names in read.taken.items() for name in names}
    for update in read.standing:
        again = {name.rpartition("-")[0] for name in update.replayed_ids}
        assert len(again) == min(2, 2 * (update.step - 1))
        assert {update.step - step_of[name] for name in again} <= {1, 2}
        assert {name.rpartition("-")[0] for name in update.rollout_ids} == set(read.taken[update.step])
    counted = [name for update in read.standing for name in update.rollout_ids]
    assert len(counted) == len(set(counted)) == 20
    assert max(max(ages, default=0) for ages in algorithm.ages.values()) >= 1, "their age is known"
    assert max(metrics["policy/staleness_max"] for metrics in sink.metrics.values()) <= max_staleness


def test_an_algorithms_own_replay_stands_in_the_ledger_of_the_policy_that_used_it(run):
    algorithms = {"a": GRPO(group_size=2, replay=Replay(groups=1, max_age=1)), "b": GRPO(group_size=2)}
    small_trainer(run, two_roles, policies=two_policies(), algorithm=algorithms).fit(3)
    counts = {(update.policy, update.step): len(update.replayed_ids) for update in ledger(run).standing}
    assert counts == {("a", 1): 0, ("a", 2): 2, ("a", 3): 2, ("b", 1): 0, ("b", 2): 0, ("b", 3): 0}


def test_one_seed_replays_the_same_groups(tmp_path):
    def again(seed: int) -> list[list[str]]:
        run = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        small_trainer(run, algorithm=Replaying(), seed=seed).fit(4)
        return [update.replayed_ids for update in ledger(run).standing]

    assert again(1) == again(1) != again(2)


# ---- several policies ----------------------------------------------------------------------------------------------


def two_roles(task: object) -> float:
    with leyden.role("writer"):
        ask("write")
    with leyden.role("critic"):
        return odd_wins(task)


def two_policies(**critic: object) -> list[Policy]:
    return [
        Policy("a", roles=["writer"], lora=LoRA(rank=4)),
        Policy("b", roles=["critic"], **critic),  # type: ignore[arg-type]  # the caller's options
    ]


@MODES
def test_a_frozen_policy_is_neither_updated_nor_published_and_does_not_age(run, max_staleness):
    learner, sink = CountingLearner(), Counted()
    trainer = small_trainer(
        run,
        two_roles,
        policies=two_policies(freeze_after=2),
        learner=learner,
        sinks=[sink],
        max_staleness=max_staleness,
    )
    summary = trainer.fit(6)
    read = ledger(run)
    steps = {name: [update.step for update in read.standing if update.policy == name] for name in ("a", "b")}
    assert steps == {"a": [1, 2, 3, 4, 5, 6], "b": [1, 2]}
    assert learner.steps == {"a": 6, "b": 2}
    assert "policy 'b' is trained up to step 2 and goes on unchanged after it" in sink.lines
    policies = summary["policies"]
    assert policies["b"] == {"trainable": True, "lora": None, "freeze_after": 2, "updates": 2, "version": 2}
    assert policies["a"]["updates"] == 6
    assert read.oldest() <= max_staleness
    assert set(sink.metrics[6]) >= {"a/policy/staleness_max"} and "policy/staleness_max" not in sink.metrics[6]


def test_an_algorithm_of_its_own_cannot_train_a_frozen_policy(run):
    class Stubborn(Stepwise):
        group_size = 2

        async def improve(
            self, session: Session, policy: Policy, groups: Sequence[Group], step: int
        ) -> Mapping[str, float]:
            for every in session.policies:
                await GRPO(group_size=2).improve(session, every, groups, step)
            return {}

    learner = CountingLearner()
    small_trainer(run, two_roles, policies=two_policies(freeze_after=0), learner=learner, algorithm=Stubborn()).fit(2)
    assert learner.steps == {"a": 2, "b": 0}


def test_each_policy_has_its_own_algorithm_checkpoint_and_entry_in_the_run_record(run):
    seen: list[tuple[str, str]] = []

    class Seen(GRPO):
        async def improve(
            self, session: Session, policy: Policy, groups: Sequence[Group], step: int
        ) -> dict[str, float]:
            seen.append((self.marker, policy.name))
            return dict(await super().improve(session, policy, groups, step))

    class First(Seen):
        marker = "first"

    class Second(Seen):
        marker = "second"

    algorithms = {"a": First(group_size=2), "b": Second(group_size=2)}
    small_trainer(run, two_roles, policies=two_policies(), algorithm=algorithms, checkpoint_every=1).fit(1)
    assert seen == [("first", "a"), ("second", "b")]
    checkpoint = run / "checkpoints" / "step-000001" / "policies"
    assert {path.name for path in checkpoint.iterdir()} == {"a", "b"}
    recorded = read_json(run / "run.json")["policies"]
    assert recorded["a"]["lora"]["rank"] == 4 and recorded["b"]["lora"] is None  # type: ignore[index]  # plain JSON


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        ({}, "give each trainable policy, by its name, an algorithm"),
        ({"a": GRPO(group_size=2), "b": "grpo"}, "give each trainable policy, by its name, an algorithm"),
        ({"a": GRPO(group_size=2)}, r"algorithms are given for \['a'\]"),
        ({"a": GRPO(group_size=2), "b": GRPO(group_size=4)}, "groups of different sizes"),
    ],
)
def test_algorithms_that_do_not_fit_the_policies_are_refused(run, algorithms, message):
    with pytest.raises(ConfigurationError, match=message):
        small_trainer(run, two_roles, policies=two_policies(), algorithm=algorithms)
