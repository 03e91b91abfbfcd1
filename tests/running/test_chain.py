"""Several algorithms in one run, and who speaks while a step is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import leyden
from leyden.errors import ConfigurationError
from leyden.interfaces import Demands, Group, Session
from leyden.roles import Policy, Route
from leyden.running.rollouts import spoken_by
from leyden.spans import Completion
from leyden.sqlite import SQLiteStore
from leyden.stepwise import PerPolicy, Stepwise
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.algorithms.sft import RejectionSampling
from tests.running.small import CountingLearner, Notes, SmallEngine, small_trainer


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


class Listens(Stepwise):
    """Trains nothing, and keeps the steps it was asked to improve in."""

    def __init__(self, *, group_size: int = 2, speakers: Mapping[str, str | None] | None = None) -> None:
        self.group_size = group_size
        self.steps: list[int] = []
        self.speakers = speakers or {}
        self.groups: list[Sequence[Group]] = []

    async def improve(
        self, session: Session, policy: Policy, groups: Sequence[Group], step: int
    ) -> Mapping[str, float]:
        self.steps.append(step)
        self.groups.append(groups)
        return {}


def test_phases_follow_each_other_over_one_store(tmp_path: Path) -> None:
    first, second = Listens(group_size=2), Listens(group_size=4)
    chain = leyden.Chain(leyden.Phase(first, steps=2), leyden.Phase(second, steps=1))
    with small_trainer(tmp_path / "run", algorithm=chain) as trainer:
        summary = trainer.fit()
    assert (first.steps, second.steps, summary["steps"]) == ([1, 2], [3], 3)
    assert summary["train_rollouts"] == 2 * 2 * 2 + 2 * 4


def test_each_phase_trains_what_the_one_before_left(tmp_path: Path) -> None:
    learner = CountingLearner()
    chain = leyden.Chain(
        leyden.Phase(RejectionSampling(group_size=2), steps=2), leyden.Phase(GRPO(group_size=2), steps=2)
    )
    with small_trainer(tmp_path / "run", algorithm=chain, learner=learner) as trainer:
        trainer.fit()
    assert learner.steps == {"me": 4}


def test_a_resume_goes_on_in_the_phase_that_was_under_way(tmp_path: Path) -> None:
    first, second, notes = Listens(), Listens(), Notes()
    chain = leyden.Chain(leyden.Phase(first, steps=2), leyden.Phase(second, steps=2))
    with small_trainer(tmp_path / "run", algorithm=chain, sinks=[notes], checkpoint_every=1) as trainer:
        jobs = trainer._jobs

        def stop(step: int) -> None:
            if step == 3:
                assert jobs.session is not None
                jobs.session.stop_requested = True

        notes.when_step_finished = stop
        trainer.fit()
    assert (first.steps, second.steps) == ([1, 2], [3])
    first, second = Listens(), Listens()
    chain = leyden.Chain(leyden.Phase(first, steps=2), leyden.Phase(second, steps=2))
    with small_trainer(tmp_path / "run", algorithm=chain) as trainer:
        trainer.fit(resume=True)
    assert (first.steps, second.steps) == ([], [4])


def test_a_stop_in_one_phase_does_not_begin_the_next(tmp_path: Path) -> None:
    first, second, notes = Listens(), Listens(), Notes()
    chain = leyden.Chain(leyden.Phase(first, steps=2), leyden.Phase(second, steps=2))
    with small_trainer(tmp_path / "run", algorithm=chain, sinks=[notes]) as trainer:
        jobs = trainer._jobs

        def stop(step: int) -> None:
            assert jobs.session is not None
            jobs.session.stop_requested = True

        notes.when_step_finished = stop
        assert trainer.fit()["steps"] == 1
    assert (first.steps, second.steps) == ([1], [])


def test_a_phase_may_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    class Rates(CountingLearner):
        def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
            rates.append(learning_rate)
            return super().optim_step(policy, learning_rate)

    rates: list[float] = []
    chain = leyden.Chain(
        leyden.Phase(RejectionSampling(group_size=2), steps=1, learning_rate=0.5),
        leyden.Phase(GRPO(group_size=2), steps=1),
    )
    policies = [leyden.Policy("me", learning_rate=0.25)]
    with small_trainer(tmp_path / "run", algorithm=chain, learner=Rates(), policies=policies) as trainer:
        trainer.fit()
    assert rates == [0.5, 0.25]
    with pytest.raises(ConfigurationError, match="learning_rate=-1"):
        leyden.Phase(GRPO(), steps=1, learning_rate=-1)


def test_a_chain_asks_for_what_its_phases_ask_for() -> None:
    class Prompts(Listens):
        demands = Demands(steps=1, trains=False, prompts=True)

    chain = leyden.Chain(leyden.Phase(Listens(group_size=3), steps=5), leyden.Phase(Prompts()))
    assert chain.demands == Demands(steps=6, prompts=True, synchronous=True)
    assert chain.group_size == 3


def test_phases_without_a_length_or_with_two_are_refused() -> None:
    class Knows(Listens):
        demands = Demands(steps=1)

    with pytest.raises(ConfigurationError, match="needs steps="):
        leyden.Phase(Listens())
    with pytest.raises(ConfigurationError, match="takes 1 steps by itself"):
        leyden.Phase(Knows(), steps=2)
    with pytest.raises(ConfigurationError, match="at least 1"):
        leyden.Phase(Listens(), steps=0)
    with pytest.raises(ConfigurationError, match="Chain takes phases"):
        leyden.Chain()
    with pytest.raises(ConfigurationError, match="Chain takes phases"):
        leyden.Chain(Listens())  # type: ignore[arg-type]


# ---- who speaks ----------------------------------------------------------------------------------------------------


def completions(run: Path, prefix: str) -> list[Completion]:
    async def read() -> list[Completion]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            names = [one.rollout_id for one in await store.rollouts() if one.rollout_id.startswith(prefix)]
            return [completion for one in await store.records(names) for completion in one.completions]

    return asyncio.run(read())


def test_another_policy_speaks_while_a_step_is_sampled(tmp_path: Path) -> None:
    policies = [leyden.Policy("me"), leyden.Policy("teacher", roles=["nobody"], trainable=False)]
    taught = Listens(speakers={"me": "teacher"})

    def agent(task: object) -> float:
        leyden.declare_roles("nobody")
        from tests.running.small import odd_wins

        return odd_wins(task)

    with small_trainer(tmp_path / "run", agent, algorithm=taught, policies=policies, engine=SmallEngine()) as trainer:
        trainer.fit(1)
    found = completions(tmp_path / "run", "s1.taught-")
    assert len(found) == 4 and {one.policy for one in found} == {"teacher"}
    assert {one.policy for one in completions(tmp_path / "run", "s1-")} == {"me"}, "the look before training"


def test_routes_go_to_the_one_who_speaks_or_to_the_app_s_own_model() -> None:
    routes = (Route(model="a", roles=("x",)), Route(model="b", roles=None))
    found = spoken_by(routes, {"a": "b", "b": None})
    assert [(one.model, one.roles, tuple(one.kept_roles)) for one in found] == [
        ("b", ("x",), ()),
        ("b", None, ("*",)),
    ]
    assert spoken_by(routes, {}) == routes


def test_those_of_several_algorithms_are_put_together() -> None:
    both = PerPolicy({"a": Listens(speakers={"a": None}), "b": Listens(speakers={"b": "c"})})
    assert both.speakers == {"a": None, "b": "c"}
