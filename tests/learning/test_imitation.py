"""Keeping by role, imitating a teacher, and fine-tuning on stored rollouts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import Demands, Group, Sample
from leyden.roles import Policy
from leyden.spans import RolloutState
from leyden.stepwise import PerPolicy
from leyden_plugins.algorithms.passes import Passes
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.algorithms.sft import (
    Distillation,
    FineTuning,
    RejectionSampling,
    kept_calls,
    kept_rollouts,
    sft_rows,
)
from tests.learning.builders import RecordedSession, call, choice, records, transition

TEACHER = Policy("big", roles=["nobody"], trainable=False)


def returns(**by_role: Sequence[float]) -> Group:
    """Return a group of empty rollouts, as many as each role has returns."""
    count = len(next(iter(by_role.values())))
    return Group(group_id="g0", task={}, rollouts=[records(rollout_id=f"r{one}") for one in range(count)])


def calls(**by_role: Sequence[float]) -> list[object]:
    return [
        transition(rollout_id=f"r{number}", role=role, span_id=f"{role}{number}", value=value)
        for role, values in by_role.items()
        for number, value in enumerate(values)
    ]


def kept(keep: object, **by_role: Sequence[float]) -> list[str]:
    found = kept_calls(calls(**by_role), [returns(**by_role)], keep)  # type: ignore[arg-type]
    return [one.span_id for one in found]


def test_each_role_is_held_against_its_own_return() -> None:
    values = {"writer": [0.9, 0.2, 0.8], "checker": [0.1, 0.7, 0.7], "critic": [1.0, 1.0, 1.0]}
    assert kept({"writer": 0.8, "checker": "best"}, **values) == ["writer0", "writer2", "checker1", "checker2"]
    assert kept({"w*": None, "*": "best"}, **values) == ["writer0", "writer1", "writer2", "checker1", "checker2"]


def test_a_roles_return_is_the_mean_over_its_calls_in_the_rollout() -> None:
    found = [transition(span_id="a", turn=0, value=1.0), transition(span_id="b", turn=1, value=0.5)]
    group = Group(group_id="g0", task={}, rollouts=[records()])
    assert len(kept_calls(found, [group], {"writer": 0.75})) == 2
    assert kept_calls(found, [group], {"writer": 0.8}) == []


def test_without_a_threshold_what_did_not_fail_is_kept_rewarded_or_not() -> None:
    rollouts = [
        records(rollout_id="r0", total=None),
        records(rollout_id="r1", total=0.0),
        records(rollout_id="r2", total=1.0, state=RolloutState.FAILED),
    ]
    assert kept_rollouts([Group(group_id="g0", task={}, rollouts=rollouts)], None) == {"r0", "r1"}


def test_rejection_sampling_trains_the_roles_that_are_named_alone() -> None:
    both = records(
        call([1], choice([2]), span_id="w"),
        call([1], choice([3]), span_id="c", role="checker"),
    )
    session = RecordedSession(groups=lambda _: [Group(group_id="g0", task={}, rollouts=[both])])
    asyncio.run(RejectionSampling(keep={"checker": 1.0}).run(session))
    ((_, ((objective,),)),) = session.updates
    assert [sample.token_ids for sample in objective.samples] == [[3]]


# ---- distillation --------------------------------------------------------------------------------------------------


def taught_group() -> Group:
    answered = records(call([1], choice([2, 3]), policy="big", version=4))
    return Group(group_id="g0", task={}, rollouts=[answered])


@pytest.mark.parametrize("teacher", ["big", None])
def test_the_teacher_speaks_and_its_tokens_are_imitated(teacher: str | None) -> None:
    session = RecordedSession(groups=lambda _: [taught_group()], policies=[Policy("sql"), TEACHER])
    asyncio.run(Distillation(teacher=teacher).run(session))
    assert session.asked_speakers == {"sql": teacher}
    ((name, ((objective,),)),) = session.updates
    assert (name, objective.loss.name) == ("sql", "cross_entropy")
    assert [(sample.token_ids, sample.weights) for sample in objective.samples] == [([2, 3], [0.5, 0.5])]
    assert session.finished[0]["tokens/retokenised_share"] == 0.0


def test_beside_other_algorithms_the_teacher_speaks_for_its_pupil_alone() -> None:
    policies = [Policy("sql"), Policy("check", roles=["checker"]), TEACHER]
    both = PerPolicy({"sql": Distillation(teacher="big", group_size=8), "check": GRPO()})
    both.check(policies)
    assert both.taught(policies[:2]) == {"sql": "big"}
    assert both.demands == Demands(synchronous=True)


def test_teachers_that_cannot_teach_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="teacher='huge' is no policy"):
        Distillation(teacher="huge").check([Policy("sql"), TEACHER])
    with pytest.raises(ConfigurationError, match="would teach nobody"):
        Distillation(teacher="sql").check([Policy("sql")])
    with pytest.raises(ConfigurationError, match="use at least 2"):
        Distillation(keep="best")


# ---- stored rollouts -----------------------------------------------------------------------------------------------


def stored(count: int, source: str = "prod") -> list[Group]:
    """Return groups of one rollout with two calls, whose tokens name the rollout."""
    return [
        Group(
            group_id=f"g{number}",
            task={},
            rollouts=[
                records(
                    call([1], choice([number]), span_id=f"a{number}"),
                    call([1, number], choice([number]), span_id=f"b{number}", start_ns=5),
                    rollout_id=f"r{number}",
                    group_id=f"g{number}",
                    total=float(number),
                )
            ],
        )
        for number in range(count)
    ]


def fine_tuned(algorithm: FineTuning, **sources: Sequence[Group]) -> RecordedSession:
    steps = algorithm.demands.steps
    assert steps is not None
    session = RecordedSession(groups=lambda _: [], total_steps=steps, sources=sources)
    asyncio.run(algorithm.run(session))
    return session


def trained(session: RecordedSession) -> list[list[Sample]]:
    """Return the samples of each optimizer step."""
    return [list(objective.samples) for _, batches in session.updates for (objective,) in batches]


def test_every_rollout_is_trained_whole_and_once_an_epoch() -> None:
    session = fine_tuned(FineTuning(source="prod", epochs=2, batch_size=2), prod=stored(5))
    batches = trained(session)
    assert sorted(len(batch) for batch in batches) == [2, 2, 4, 4, 4, 4]
    for batch in batches:
        assert set(Counter(sample.token_ids[0] for sample in batch).values()) == {2}  # both calls together
    assert Counter(sample.token_ids[0] for batch in batches for sample in batch) == dict.fromkeys(range(5), 4)
    assert [metrics["rollouts/kept"] for metrics in session.finished] == [5.0, 5.0]
    assert session.asked_exact == [False]


def test_steps_of_an_epoch_share_its_rollouts_wherever_in_a_chain_they_begin() -> None:
    passes = Passes(epochs=2, steps_per_epoch=3, batch_size=2)
    for first in (1, 6):
        steps = range(first, first + passes.steps)
        seen = Counter(item for step in steps for batch in passes.batches(range(10), step) for item in batch)
        assert seen == dict.fromkeys(range(10), 2)
    assert passes.batches(range(10), 2) == passes.batches(range(10), 2)
    assert passes.batches(range(2), 3) == []  # fewer items than steps


def test_keep_leaves_rollouts_out_and_nothing_to_imitate_is_an_error() -> None:
    session = fine_tuned(FineTuning(source="prod", keep=3.0, exact=True), prod=stored(5))
    assert {sample.token_ids[0] for sample in trained(session)[0]} == {3, 4}
    assert session.asked_exact == [True]
    with pytest.raises(ConfigurationError, match=r"nothing in source='prod' is to be imitated: 10 calls .* keep=9"):
        fine_tuned(FineTuning(source="prod", keep=9), prod=stored(5))


def test_sources_with_the_same_names_are_kept_apart() -> None:
    session = fine_tuned(FineTuning(source=["a", "b"], batch_size=1), a=stored(2), b=stored(2))
    assert len(trained(session)) == 4


def test_fine_tuning_knows_its_steps_and_runs_nothing() -> None:
    assert FineTuning(source="prod", epochs=3, steps_per_epoch=2).demands == Demands(steps=6, runs_agent=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": []}, "names no run"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"keep": "top"}, "keep='top'"),
        ({"keep": {}}, "names no role"),
        ({"keep": {"writer": float("nan")}}, "finite number"),
        ({"normalisation": "none"}, "normalisation='none'"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        FineTuning(**({"source": "prod"} | options))  # type: ignore[arg-type]


# ---- rows for TRL --------------------------------------------------------------------------------------------------


def test_a_call_is_a_row_whose_answer_is_labelled() -> None:
    assert sft_rows([transition(prompt=[1, 2], tokens=[3, 4])]) == [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    ]


def test_merged_turns_share_a_row_and_every_answer_token_is_labelled_once() -> None:
    turns = [
        transition(prompt=[1], tokens=[2], span_id="a"),
        transition(prompt=[1, 2, 5], tokens=[6], span_id="b", turn=1),
        transition(prompt=[1, 2, 7], tokens=[8], span_id="c", turn=1),
        transition(prompt=[1], tokens=[2], span_id="d", rollout_id="r1"),
    ]
    rows = sft_rows(turns, layout="merged")
    assert rows == [
        {"input_ids": [1, 2, 5, 6], "labels": [-100, 2, -100, 6]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [1, 2, 7, 8], "labels": [-100, -100, -100, 8]},
    ]
