"""What a step's records say in numbers, and when a collapse is said."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from leyden import mdp
from leyden.interfaces import Batch, Group, Loss, RolloutRecords, Transition
from leyden.layouts import merged
from leyden.metrics import (
    START_STEPS,
    STEPS_IN_A_ROW,
    CollapseWatch,
    _merged_tokens,
    advantage_metrics,
    call_metrics,
    mismatch_metrics,
    over_batches,
    reward_metrics,
    rollout_metrics,
    sample_metrics,
)
from leyden.plugins import load_plugins
from leyden.spans import Fork, ForkCause, Kind, Reward, RolloutState, Span, Status
from leyden.training.sinks import Sinks
from leyden_plugins.learners.torch.losses import Statistics, Tokens, loss_function
from leyden_plugins.observers.metrics import base_name
from tests.learning.builders import call, choice, group, records, rich_transitions, transition
from tests.running.small import CountingLearner, Notes, ask, rollout_id, small_trainer


def span(role: str, *, span_id: str = "t0", kind: Kind = Kind.MODEL_CALL) -> Span:
    return Span(
        span_id=span_id,
        parent_id=None,
        rollout_id="r0",
        attempt=1,
        kind=kind,
        name=role,
        role=role,
        start_ns=0,
        end_ns=1,
    )


def reward(value: float, name: str, *, role: str | None = None, on_span: str | None = None, index: int = 0) -> Reward:
    return Reward(
        rollout_id="r0", attempt=1, name=name, value=value, target_role=role, target_span=on_span, index=index
    )


def with_spans(one: RolloutRecords, *spans: Span) -> RolloutRecords:
    return RolloutRecords(rollout=one.rollout, spans=spans, completions=one.completions, rewards=one.rewards)


def group_of(*rollouts: RolloutRecords) -> Group:
    return Group(group_id="g0", task={}, rollouts=rollouts)


# ---- rewards and rollouts --------------------------------------------------------------------------------------


def test_rewards_leave_out_rollouts_without_one() -> None:
    metrics = reward_metrics([group(1.0, 0.0, None), group(0.5, 0.5, group_id="g1"), group(None, group_id="g2")])
    assert metrics == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": 0.125**0.5,
            "groups/total": 3.0,
            "groups/without_signal": 2.0,
            "groups/without_signal_share": 2 / 3,
            "reward/role/writer": 0.5,
        }
    )


def test_rewards_stand_by_name_by_role_and_by_what_a_role_was_given() -> None:
    first = with_spans(
        records(
            call([1], choice([2]), span_id="s0", role="writer"),
            total=1.0,
            rewards=[
                reward(0.5, "exact"),
                reward(0.25, "exact", index=1),
                reward(2.0, "style", role="writer"),
                reward(4.0, "style", on_span="s0"),
                reward(8.0, "brief", on_span="t0"),
                reward(9.0, "lost", on_span="of a call that left no record"),
            ],
        ),
        span("checker"),
        span("search", span_id="t1", kind=Kind.TOOL),
    )
    second = records(total=0.0, rewards=[reward(0.25, "exact")])
    metrics = reward_metrics([group_of(first, second)])
    assert {name: value for name, value in metrics.items() if name.startswith(("reward/name", "reward/role"))} == {
        "reward/name/exact": 0.5,
        "reward/role/writer": 1.0,
        "reward/role/checker": 1.0,
        "reward/role/writer/style": 6.0,
        "reward/role/checker/brief": 8.0,
    }


def test_rollouts_count_failures_and_each_call_of_every_role_once() -> None:
    tried_twice = [call([1], choice([2]), span_id="s0", http_attempt=number) for number in range(2)]
    first = with_spans(records(*tried_twice), span("writer", span_id="s0"), span("checker", span_id="s1"))
    second = records(state=RolloutState.TIMED_OUT, total=None)
    assert rollout_metrics([group_of(first, second)]) == {
        "rollouts/failed_share": 0.5,
        "rollouts/unrewarded_share": 0.5,
        "rollouts/calls_mean": 1.0,
        "rollouts/calls_max": 2.0,
    }
    assert rollout_metrics([]) == {}


# ---- calls and samples -----------------------------------------------------------------------------------------


def test_lengths_are_those_of_all_answers_also_of_calls_that_are_not_trained() -> None:
    calls = [
        call([0] * (10 * number), choice([1] * number, finish_reason="length" if number > 18 else "stop"))
        for number in range(1, 21)
    ]
    others = [
        call([0] * 999, choice([1] * 999), policy="other"),
        call([0] * 999, choice([1] * 790), status=Status.INTERRUPTED),
    ]
    metrics = call_metrics([group_of(records(*calls, *others, total=None))], "sql", tokens_trained=100.0)
    assert metrics == {
        "lengths/prompt_mean": 105.0,
        "lengths/prompt_p95": 190.0,
        "lengths/prompt_max": 200.0,
        "lengths/answer_mean": 10.5,
        "lengths/answer_p95": 19.0,
        "lengths/answer_max": 20.0,
        "lengths/overlong_share": 0.1,
        "forks/template": 0.0,
        "forks/tokenisation": 0.0,
        "forks/edit": 0.0,
        "forks/spliced_share": 0.0,
        "tokens/trained_per_sampled": 100 / (210 + 790),
    }
    assert call_metrics([group_of(records(*calls))], "silent", tokens_trained=0.0) == {}


def test_forks_are_counted_by_cause_and_spliced_tokens_by_share() -> None:
    fork = Fork(span_id="s0", position=3, cause=ForkCause.EDIT, before="", expected="a", found="b")
    forked = msgspec.structs.replace(call([0] * 6, choice([1])), fork=fork)
    spliced = msgspec.structs.replace(call([0] * 4, choice([1])), spliced=3)
    metrics = call_metrics([group_of(records(forked, forked, spliced))], "sql", tokens_trained=0.0)
    assert [metrics[f"forks/{cause}"] for cause in ForkCause] == [0.0, 0.0, 2.0]
    assert metrics["forks/spliced_share"] == 3 / 16


def test_diversity_is_the_share_of_distinct_first_answers_within_groups_and_roles() -> None:
    def first_answers(group_id: str, role: str, *answers: int) -> list[Transition]:
        return [
            transition(rollout_id=f"{group_id}-{number}", group_id=group_id, role=role, tokens=[answer])
            for number, answer in enumerate(answers)
        ]

    later = [transition(rollout_id=f"a-{number}", group_id="a", turn=1, tokens=[9]) for number in range(4)]
    every = [*first_answers("a", "writer", 1, 2, 3, 1), *first_answers("b", "writer", 5, 5), *later]
    found = sample_metrics(every)
    assert found["diversity/distinct_answers"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["samples/identical_groups"] == 1.0
    assert (found["turns/mean"], found["turns/max"]) == (pytest.approx(10 / 6), 2.0)
    alone = sample_metrics([transition(tokens=[1], logprobs=[-1.0]), transition(logprobs=[-0.5, 0.0])])
    assert alone["samples/entropy"] == 0.5
    alone = sample_metrics([transition()])
    assert "diversity/distinct_answers" not in alone, "one answer differs from no other"


def test_the_merge_ratio_is_that_of_merged_rows() -> None:
    turns = [transition(prompt=[1, 2], tokens=[3, 4]), transition(prompt=[1, 2, 3, 4], tokens=[5], turn=1)]
    assert sample_metrics(turns)["mdp/merge_ratio"] == pytest.approx(5 / 9)
    elsewhere = transition(prompt=[9, 9, 3, 4], tokens=[5], turn=1)
    assert sample_metrics([turns[0], elsewhere])["mdp/merge_ratio"] == 1.0, "it quotes the answer behind another prompt"
    assert sample_metrics([]) == {
        "transitions/admitted": 0.0,
        "mdp/merge_ratio": 1.0,
        "samples/identical_groups": 0.0,
    }
    for seed in range(20):
        rich = {(*one.prompt_token_ids, *one.token_ids): one for one in rich_transitions(30, seed=seed)}
        shuffled = random.Random(seed).sample(sorted(rich), len(rich))
        expected = sum(len(row.token_ids) for row in merged(mdp.samples(list(rich.values()))))
        assert _merged_tokens([rich[key] for key in shuffled]) == expected


def test_advantages_have_a_spread_and_a_share_of_zeros() -> None:
    calls = [transition(advantage=value) for value in (1.0, -3.0, 0.0)]
    calls.append(replace(transition(advantage=9.0), token_advantages=[4.0, 0.0]))
    assert advantage_metrics(calls) == pytest.approx(
        {"advantage/mean": 0.0, "advantage/std": math.sqrt(14 / 4), "advantage/max": 3.0, "advantage/zero_share": 0.25}
    )
    assert set(advantage_metrics([]).values()) == {0.0}


def test_the_mismatch_is_that_of_calls_whose_log_probabilities_were_computed_again() -> None:
    again = replace(transition(logprobs=[-1.0, -2.0]), old_logprobs=[-1.5, -1.75])
    assert mismatch_metrics([transition(), again]) == {"mismatch/mean": 0.375, "mismatch/max": 0.5}
    assert mismatch_metrics([transition()]) == {}


def test_batches_combine_to_means_largest_values_and_the_first_mismatch() -> None:
    batches = [
        {"loss/loss": 1.0, "loss/ratio_max": 1.5, "mismatch/mean": 0.1, "mismatch/max": 0.2},
        {"loss/loss": 3.0, "loss/ratio_max": 1.25, "mismatch/mean": 9.0, "mismatch/max": 9.0, "loss/kl_reference": 0.5},
    ]
    assert over_batches(batches) == {
        "loss/loss": 2.0,
        "loss/ratio_max": 1.5,
        "mismatch/mean": 0.1,
        "mismatch/max": 0.2,
        "loss/kl_reference": 0.5,
    }


def test_the_learner_compares_its_log_probabilities_with_the_recorded_ones() -> None:
    statistics = Statistics()
    recorded, now = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.75])
    for shift in (0.0, 1.0):  # of recomputed ones, which the mismatch has nothing to do with
        tokens = Tokens(
            logprobs=now,
            sampled_logprobs=recorded,
            old_logprobs=now + shift,
            advantages=torch.ones(2),
            weights=torch.ones(2),
            samples=torch.zeros(2),
        )
        loss = Loss(name="policy_gradient")
        statistics.add(tokens, loss_function(loss)(tokens), loss, places=2, padding=0)
    found = statistics.metrics()
    assert (found["mismatch/mean"], found["mismatch/max"]) == (0.375, 0.5)


# ---- a collapse ------------------------------------------------------------------------------------------------


def said(values: Sequence[float], name: str = "samples/entropy") -> list[int]:
    """Return after which values, from 1, the watch spoke."""
    watch = CollapseWatch()
    return [number for number, value in enumerate(values, 1) for _ in watch.step_finished(number, {name: value})]


def test_a_collapse_is_said_once_when_it_has_lasted() -> None:
    fallen = [1.0] * START_STEPS + [0.2] * (STEPS_IN_A_ROW + 5)
    assert said(fallen) == [START_STEPS + STEPS_IN_A_ROW]
    assert said(fallen, "sql/diversity/distinct_answers") == [START_STEPS + STEPS_IN_A_ROW]


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * START_STEPS + [0.3] * 50,
        [1.0] * START_STEPS + ([0.1] * (STEPS_IN_A_ROW - 1) + [0.9]) * 5,
        [0.0] * 50,
        [1.0] * START_STEPS + [math.nan] * 50,
    ],
    ids=["a fall that is no collapse", "one that does not last", "nothing from the start", "no number"],
)
def test_a_policy_that_still_tries_different_answers_is_left_alone(values: Sequence[float]) -> None:
    assert said(values) == []


def test_a_collapse_reaches_the_sinks_with_what_to_do() -> None:
    notes = Notes()
    sinks = Sinks([notes], load_plugins())
    tally = SimpleNamespace(rollouts=8, failures={"ToolError": 2, "TimeoutError": 1}, retries=0)
    parts = SimpleNamespace(runner=SimpleNamespace(tally=tally), meter=SimpleNamespace(step_fields=dict))
    for step in range(1, 20):
        sinks.step_finished(parts, step, {"sql/samples/entropy": 0.5 if step < 5 else 0.01})  # type: ignore[arg-type]
    (line,) = notes.lines
    assert "sql/samples/entropy: 0.01, 0.5 at the start" in line and "lower learning rate" in line


# ---- a whole run -----------------------------------------------------------------------------------------------


class Kept(Notes):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[Mapping[str, float]] = []

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append(metrics)


class Measuring(CountingLearner):
    """Reports what the learner of PyTorch does, of nothing."""

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        super().forward_backward(policy, batch)
        return Statistics().metrics()


def sometimes_fails(task: object) -> float:
    ask(str(task))
    if rollout_id().endswith("1"):
        raise LookupError("no such table")
    return 1.0


def test_every_metric_of_a_run_is_declared_and_finite(tmp_path: Path) -> None:
    kept = Kept()
    small_trainer(tmp_path / "run", sometimes_fails, sinks=[kept], val_tasks=["v"], learner=Measuring()).fit(2)
    for metrics in kept.metrics:
        assert [name for name in metrics if base_name(name) is None] == []
        assert all(math.isfinite(value) for value in metrics.values())
    last = kept.metrics[-1]
    assert {"loss/entropy", "mismatch/max", "advantage/std", "policy/staleness_max", "lengths/answer_p95"} <= set(last)
    assert last["rollouts/failed_share"] == 0.5
    assert last["rollouts/failed/LookupError"] == 4.0
    assert last["reward/role/main"] == last["reward/mean"] == 0.5
    assert last["tokens/trained_per_sampled"] == 1.0
