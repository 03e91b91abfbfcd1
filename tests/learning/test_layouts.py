"""The layouts of a batch: who lies where, and what it costs."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden import mdp
from leyden.interfaces import Transition
from leyden.layouts import Attention, Layout, Row, lay_out, merged, one_row_a_call, packed
from tests.learning.builders import sample
from tests.learning.conversations import conversations

FREE = Attention(pair_cost=0.0, mask_entries=None)
"""Attention costs nothing, so that positions alone count."""
MASKS = Attention(pair_cost=0.0, mask_entries=10**6)
DEAR = Attention(pair_cost=0.001, mask_entries=10**6)


def tokens(rows: Sequence[Row]) -> list[list[int]]:
    return [list(row.token_ids) for row in rows]


def context(row: Row, place: int) -> tuple[int, ...]:
    """Return the tokens that the one at `place` sees, itself the last; their positions count from 0."""
    until = row.seen_until or [len(row.token_ids)] * len(row.token_ids)
    seen = [key for key in range(place + 1) if place < until[key]]
    assert [row.position_ids[key] for key in seen] == [*range(len(seen))]
    return tuple(row.token_ids[key] for key in seen)


def cost(row: Row, attention: Attention) -> float:
    """Count what a row costs, pair by pair."""
    length = len(row.token_ids)
    if row.seen_until is None:
        return length + attention.pair_cost * length * (length + 1) / 2
    seen = sum(until - place for place, until in enumerate(row.seen_until))
    return length + attention.pair_cost * (seen if attention.mask_entries is None else length**2)


ATTENTIONS = st.builds(
    Attention, pair_cost=st.sampled_from([0.0, 0.01, 0.1, 1.0]), mask_entries=st.sampled_from([None, 100, 10_000])
)


# ---- rows ------------------------------------------------------------------------------------------------------


def test_a_conversation_of_turns_becomes_one_row() -> None:
    turns = [sample([1], [2, 3]), sample([1, 2, 3, 4], [5]), sample([1, 2, 3, 4, 5, 6], [7])]
    (row,) = merged(turns)
    assert row.token_ids == [1, 2, 3, 4, 5, 6, 7]
    assert {index: list(places) for index, places in row.samples.items()} == {0: [0, 1], 1: [3], 2: [5]}
    assert tokens(one_row_a_call(turns)) == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]]


def test_a_broken_prefix_starts_a_row_of_its_own() -> None:
    assert tokens(merged([sample([1], [2, 3]), sample([1, 2, 9], [5])])) == [[1, 2, 3], [1, 2, 9, 5]]


def test_answers_that_repeat_or_overlap_stand_in_one_row_and_are_trained_each() -> None:
    calls = [sample([1], [2, 3]), sample([1], [2, 3]), sample([1, 2], [3, 4]), sample([1, 2, 3], [4], temperature=0.5)]
    (row,) = merged(calls)
    assert row.token_ids == [1, 2, 3, 4]
    assert {index: list(places) for index, places in row.samples.items()} == {0: [0, 1], 1: [0, 1], 2: [1, 2], 3: [2]}


def test_a_packed_row_holds_the_tree_depth_first() -> None:
    calls = [sample([1, 2], [3, 4]), sample([1, 2], [3, 5]), sample([1, 2], [6])]
    (row,) = packed(calls, FREE, longest=100)
    assert row.token_ids == [1, 2, 3, 4, 5, 6]
    assert row.position_ids == [0, 1, 2, 3, 3, 2]
    assert row.seen_until == [6, 6, 5, 4, 5, 6]
    assert row.samples == {0: [1, 2], 1: [1, 2], 2: [1]}


@given(conversations(), st.sampled_from(get_args(Layout)), ATTENTIONS, st.integers(1, 40))
def test_each_token_is_trained_once_and_in_its_own_context(
    calls: list[Transition], layout: Layout, attention: Attention, longest: int
) -> None:
    samples = mdp.samples(calls)
    trained: Counter[int] = Counter()
    for row in lay_out(samples, layout, attention, longest=longest):
        assert len(row.token_ids) == len(row.position_ids)
        for index, places in row.samples.items():
            trained[index] += 1
            one = samples[index]
            assert len(places) == len(one.token_ids)
            for number, place in enumerate(places):
                assert context(row, place) == (*one.prompt_token_ids, *one.token_ids[:number])
    assert trained == Counter(range(len(samples)))


@given(conversations(), st.sampled_from(["merged", "packed", "auto"]), ATTENTIONS, st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_no_row(
    calls: list[Transition], layout: Layout, attention: Attention, rng: random.Random
) -> None:
    samples = mdp.samples(calls)
    shuffled = rng.sample(samples, len(samples))
    first, second = (lay_out(every, layout, attention, longest=40) for every in (samples, shuffled))
    assert [(row.token_ids, row.position_ids, row.seen_until) for row in first] == [
        (row.token_ids, row.position_ids, row.seen_until) for row in second
    ]


@given(conversations())
def test_merged_rows_hold_no_more_tokens_than_calls_and_packed_ones_each_node_once(calls: list[Transition]) -> None:
    samples = mdp.samples(calls)
    by_call, in_rows, in_packs = (
        sum(len(row.token_ids) for row in rows)
        for rows in (one_row_a_call(samples), merged(samples), packed(samples, FREE, longest=10**6))
    )
    whole = [(*one.prompt_token_ids, *one.token_ids) for one in samples]
    nodes = len({one[:length] for one in whole for length in range(1, len(one) + 1)})
    assert nodes == in_packs <= in_rows <= by_call


# ---- cost ------------------------------------------------------------------------------------------------------


def test_paths_share_a_row_when_that_costs_less() -> None:
    group = [sample([1] * 20, [2, number]) for number in range(8)]
    assert [len(row.samples) for row in packed(group, DEAR, longest=99)] == [8]
    mostly_answers = [sample([1] * 3, [number] * 100) for number in range(8)]
    assert [len(row.samples) for row in packed(mostly_answers, DEAR, longest=999)] == [1] * 8
    assert [len(row.samples) for row in packed(mostly_answers, MASKS, longest=999)] == [8]
    strangers = [sample([number] * 20, [2]) for number in range(4)]
    assert [len(row.samples) for row in packed(strangers, FREE, longest=999)] == [1] * 4


def test_a_short_common_prefix_of_long_rows_is_not_worth_their_mask() -> None:
    calls = [sample([1] * 10 + [number] * 2000, [2]) for number in (3, 4)]
    masks, blocks = (Attention(pair_cost=1e-3, mask_entries=entries) for entries in (10**8, None))
    assert len(lay_out(calls, "auto", masks, longest=8192)) == 2
    assert len(lay_out(calls, "auto", blocks, longest=8192)) == 1
    assert len(lay_out(calls, "packed", masks, longest=8192)) == 1


@given(conversations(), ATTENTIONS, st.integers(1, 40))
@settings(max_examples=200)
def test_auto_is_the_cheapest_way_to_cut_the_leaves_into_runs(
    calls: list[Transition], attention: Attention, longest: int
) -> None:
    samples = mdp.samples(calls)
    leaves = merged(samples)
    bound = longest if attention.mask_entries is None else min(longest, int(attention.mask_entries**0.5))

    def run(first: int, end: int) -> Row | None:
        """Return the row of some leaves, all their common tokens shared; `None` where that is not allowed."""
        chosen = [index for row in leaves[first:end] for index in row.samples]
        rows = packed([samples[index] for index in chosen], FREE, longest=10**6)
        return rows[0] if len(rows) == 1 and (end - first == 1 or len(rows[0].token_ids) <= bound) else None

    cheapest = [0.0]  # of the first so many leaves
    for end in range(1, len(leaves) + 1):
        costs = [(cheapest[first], run(first, end)) for first in range(end)]
        cheapest.append(min(before + cost(row, attention) for before, row in costs if row is not None))
    found = lay_out(samples, "auto", attention, longest=longest)
    assert sum(cost(row, attention) for row in found) == pytest.approx(cheapest[-1])
    others: tuple[Layout, ...] = ("calls", "merged", "packed")
    for other in others:
        rows = lay_out(samples, other, attention, longest=longest)
        assert sum(cost(row, attention) for row in rows) >= cheapest[-1] - 1e-6


def test_rows_that_share_are_bounded_and_longer_paths_go_alone() -> None:
    calls = [sample([1] * 50, [number] * 10) for number in range(2, 12)]
    for attention, longest in ((FREE, 100), (Attention(pair_cost=0.0, mask_entries=100 * 100), 10**6)):
        assert [len(row.token_ids) for row in packed(calls, attention, longest=longest)] == [100, 100]
    assert [len(row.token_ids) for row in packed(calls, FREE, longest=59)] == [60] * 10
