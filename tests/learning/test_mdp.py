"""Which samples are admitted, and what becomes of their tokens."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden import mdp
from leyden.errors import ConfigurationError, EngineError, RewardError
from leyden.interfaces import RolloutRecords, Sample, Transition
from leyden.layouts import Attention, Row, merged, one_row_a_call, packed
from leyden.roles import Policy
from leyden.spans import Choice, Completion, RolloutState, Status
from tests.learning.builders import POLICY, call, choice, records, reward, rich_transitions, transition


def spans_of(one: RolloutRecords, **options: Any) -> list[tuple[str, int]]:
    return [(each.completion.span_id, each.choice.index) for each in mdp.admitted(one, [POLICY], **options)]


# ---- admission -------------------------------------------------------------------------------------------------


def test_a_delivered_call_of_a_rewarded_rollout_is_admitted() -> None:
    assert spans_of(records(call([1], choice([2])))) == [("s0", 0)]


@pytest.mark.parametrize("state", [RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.TIMED_OUT])
def test_a_failed_rollout_with_a_reward_is_trained(state: RolloutState) -> None:
    assert spans_of(records(call([1], choice([2])), state=state, total=0.0)) == [("s0", 0)]


@pytest.mark.parametrize("state", [RolloutState.RUNNING, RolloutState.LOST, RolloutState.QUEUED])
def test_an_unfinished_rollout_is_not_trained(state: RolloutState) -> None:
    assert spans_of(records(call([1], choice([2])), state=state)) == []


def test_a_rollout_without_a_reward_is_not_trained() -> None:
    assert spans_of(records(call([1], choice([2])), total=None)) == []


@pytest.mark.parametrize(
    "completion",
    [
        call([1], choice([2]), delivered=False),
        call([1], choice([2]), status=Status.INTERRUPTED),
        call([1], choice([2]), status=Status.ERROR),
        call([1], choice([2], finish_reason="interrupted")),
        call([1], choice([2]), policy="judge"),
        call([1], choice([2]), policy="base"),
        call([1], choice([2]), attempt=2),
        call([1], choice([])),
    ],
    ids=["undelivered", "interrupted", "error", "cut", "other policy", "base", "late attempt", "empty"],
)
def test_other_calls_are_not_admitted(completion: Completion) -> None:
    assert spans_of(records(completion)) == []


def test_a_policy_that_is_not_trainable_is_not_trained() -> None:
    frozen = Policy("sql", trainable=False)
    assert mdp.admitted(records(call([1], choice([2]))), [frozen]) == []


def test_of_several_http_attempts_the_last_delivered_one_counts() -> None:
    one = records(
        call([1], choice([2]), http_attempt=0),
        call([1], choice([3]), http_attempt=1),
        call([1], choice([4]), http_attempt=2, delivered=False),
    )
    assert [each.choice.token_ids for each in mdp.admitted(one, [POLICY])] == [[3]]


def test_length_is_a_complete_sample_unless_overlong_ones_are_masked() -> None:
    one = records(call([1], choice([2], finish_reason="length")))
    assert spans_of(one) == [("s0", 0)]
    assert spans_of(one, mask_overlong=True) == []


def test_of_several_choices_the_extended_and_the_rewarded_ones_count() -> None:
    several = call([1], choice([2], index=0), choice([3], index=1), choice([4], index=2))
    later = call([1, 3, 9], choice([5]), span_id="s1", start_ns=1)
    assert spans_of(records(several)) == []
    assert spans_of(records(several, later)) == [("s0", 1), ("s1", 0)]
    assert spans_of(records(several, rewards=[reward(1.0, span="s0", index=2)])) == [("s0", 2)]


def test_a_prompt_sent_earlier_extends_nothing() -> None:
    earlier = call([1, 3, 9], choice([5]), span_id="s1", start_ns=0)
    several = call([1], choice([2], index=0), choice([3], index=1), start_ns=1)
    assert spans_of(records(several, earlier)) == [("s1", 0)]


def test_turns_count_the_calls_of_a_role_by_start_time() -> None:
    one = records(
        call([3], choice([1]), span_id="c", start_ns=3),
        call([1], choice([1]), span_id="a", start_ns=1),
        call([2], choice([1]), span_id="b", role="rewriter", start_ns=2),
        call([4], choice([1]), span_id="d", start_ns=2, status=Status.INTERRUPTED),
    )
    found = mdp.transitions(one, [POLICY])
    assert [(each.span_id, each.role, each.turn) for each in found] == [
        ("a", "writer", 0),
        ("b", "rewriter", 0),
        ("c", "writer", 2),
    ]


def test_a_transition_carries_the_temperature_it_was_sampled_at() -> None:
    one = records(call([1], choice([2]), sampling={"temperature": 0.7}, off_distribution=True))
    (found,) = mdp.transitions(one, [POLICY])
    assert (found.temperature, found.off_distribution) == (0.7, True)


def test_missing_logprobs_are_an_error_that_names_the_call() -> None:
    broken = Choice(index=0, token_ids=[2, 3], logprobs=[-1.0], finish_reason="stop")
    with pytest.raises(EngineError, match=r"'s0' of role 'writer' has 2 tokens and 1 log-prob"):
        mdp.transitions(records(call([1], broken)), [POLICY])


def test_a_credit_function_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(RewardError, match=r"returned 0 values for the 1 calls of rollout 'r0'"):
        mdp.transitions(records(call([1], choice([2]))), [POLICY], credit=lambda _records, _transitions: [])


LAYOUTS = (
    one_row_a_call,
    merged,
    lambda samples: packed(samples, Attention(pair_cost=0.0, mask_entries=None), longest=99),
)


# ---- properties ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A rollout's completions, and by construction which sampled tokens must be trained."""

    completions: list[Completion]
    trained: dict[float, tuple[int, ...]]
    """The unique log-probability of a sampled token -> everything the engine saw up to and with that token."""


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Draw interleaved roles, turns that extend earlier calls, branches, retries and calls that must not count."""
    completions: list[Completion] = []
    trained: dict[float, tuple[int, ...]] = {}
    contexts: list[list[int]] = [[0]]
    unique = 0
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4)
    for number in range(draw(st.integers(1, 8))):
        prompt = draw(st.sampled_from(contexts)) + draw(tokens)
        retried = [["good", "good"], ["lost", "good"], ["good", "lost"]]
        fates = draw(st.sampled_from([["good"]] * 4 + retried + [["lost"], ["cut"], ["judge"], ["stale"]]))
        counting = max((i for i, fate in enumerate(fates) if fate == "good"), default=None)
        for http_attempt, fate in enumerate(fates):
            answer = draw(tokens)
            ids = [float(-(unique := unique + 1)) for _ in answer]
            completions.append(
                call(
                    prompt,
                    Choice(
                        index=0,
                        token_ids=answer,
                        logprobs=ids,
                        finish_reason="interrupted" if fate == "cut" else draw(st.sampled_from(["stop", "length"])),
                    ),
                    span_id=f"s{number}",
                    http_attempt=http_attempt,
                    role=draw(st.sampled_from(["writer", "rewriter"])),
                    policy="judge" if fate == "judge" else "sql",
                    attempt=2 if fate == "stale" else 1,
                    delivered=fate != "lost",
                    status=Status.INTERRUPTED if fate == "cut" else Status.OK,
                    start_ns=number,
                )
            )
            contexts.append(prompt + answer)
            if http_attempt == counting:
                trained |= {ids[i]: (*prompt, *answer[: i + 1]) for i in range(len(answer))}
    return Story(completions, trained)


@given(stories(), st.sampled_from(LAYOUTS))
@settings(max_examples=300)
def test_each_admitted_token_is_trained_once_in_its_own_context_and_no_other_ever(
    story: Story, layout: Callable[[Sequence[Sample]], list[Row]]
) -> None:
    samples = mdp.samples(mdp.weigh(mdp.transitions(records(*story.completions), [POLICY]), "token_mean"))
    trained: Counter[float] = Counter()
    for row in layout(samples):
        for index, places in row.samples.items():
            sample = samples[index]
            assert len(sample.token_ids) == len(sample.weights) == len(sample.advantages) == len(sample.logprobs)
            for place, token, unique in zip(places, sample.token_ids, sample.logprobs, strict=True):
                trained[unique] += 1
                until = row.seen_until or [len(row.token_ids)] * len(row.token_ids)
                seen = [row.token_ids[k] for k in range(place + 1) if place < until[k]]
                assert (*seen, token) == story.trained[unique]
    assert trained == Counter(story.trained.keys())


@given(stories(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(story: Story, rng: random.Random) -> None:
    shuffled = list(story.completions)
    rng.shuffle(shuffled)
    first = mdp.transitions(records(*story.completions), [POLICY])
    second = mdp.transitions(records(*shuffled), [POLICY])
    assert first == second


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="normalisation='mean' is unknown"):
        mdp.weigh([], "mean")  # type: ignore[arg-type]


# ---- weights and batches ---------------------------------------------------------------------------------------


def token_weight(transitions: list[Transition], rollout_id: str) -> float:
    return sum(one.weight * len(one.token_ids) for one in transitions if one.rollout_id == rollout_id)


UNEVEN = [
    transition(rollout_id="a", span_id="a0", tokens=[1] * 2),
    transition(rollout_id="a", span_id="a1", tokens=[1] * 6),
    transition(rollout_id="b", span_id="b0", tokens=[1] * 4),
]


def test_per_rollout_lets_rollouts_weigh_equally_and_their_tokens_too() -> None:
    weighed = mdp.weigh(UNEVEN, "per_rollout")
    assert [one.weight for one in weighed] == pytest.approx([1 / 16, 1 / 16, 1 / 8])
    assert token_weight(weighed, "a") == pytest.approx(token_weight(weighed, "b")) == pytest.approx(0.5)


def test_per_call_lets_the_calls_of_a_rollout_weigh_equally() -> None:
    weighed = mdp.weigh(UNEVEN, "per_call")
    assert [one.weight * len(one.token_ids) for one in weighed] == pytest.approx([0.25, 0.25, 0.5])


def test_token_mean_lets_every_token_weigh_equally() -> None:
    assert [one.weight for one in mdp.weigh(UNEVEN, "token_mean")] == pytest.approx([1 / 12] * 3)


@pytest.mark.parametrize("normalisation", ["per_rollout", "per_call", "token_mean"])
def test_the_weights_of_a_batch_sum_to_one(normalisation: mdp.Normalisation) -> None:
    samples = mdp.samples(mdp.weigh(rich_transitions(9), normalisation))
    assert sum(sum(sample.weights) for sample in samples) == pytest.approx(1.0)


def test_a_sample_carries_what_stands_for_each_token() -> None:
    one = transition(tokens=[3, 4], weight=0.5, advantage=2.0)
    (plain,) = mdp.samples([one])
    assert (list(plain.weights), list(plain.advantages)) == ([0.5, 0.5], [2.0, 2.0])
    (own,) = mdp.samples([replace(one, corrections=[1.0, 0.25], token_advantages=[1.0, -1.0])])
    assert (list(own.weights), list(own.advantages)) == ([0.5, 0.125], [1.0, -1.0])


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_batches_are_whole_groups_of_nearly_equal_number(batches: int, groups: int, seed: int) -> None:
    every = [transition(group_id=f"g{i % groups}", rollout_id=f"r{i}", span_id=f"s{i}") for i in range(3 * groups)]
    cut = mdp.cut(every, batches, seed=f"{seed}")
    held = [{one.group_id for one in batch} for batch in cut]
    assert len(cut) == min(batches, groups)
    assert sorted(one.span_id for batch in cut for one in batch) == sorted(one.span_id for one in every)
    assert sum(map(len, held)) == groups
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert cut == mdp.cut(every, batches, seed=f"{seed}")


def test_batches_are_drawn_anew_for_every_seed() -> None:
    every = [transition(group_id=f"g{i}") for i in range(8)]
    orders = {tuple(one.group_id for batch in mdp.cut(every, 2, seed=str(seed)) for one in batch) for seed in range(5)}
    assert len(orders) > 1
