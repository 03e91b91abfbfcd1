"""The token tree merges on exact prefixes and forgets nothing."""

import random
from collections.abc import Sequence
from itertools import permutations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from leyden.calltree import CallTree, Forked, call_trees, fork_counts
from leyden.credit import turns
from leyden.interfaces import RolloutRecords, Sample
from leyden.layouts import merged
from leyden.spans import Choice, Completion, Fork, ForkCause
from leyden.testing.records import a_completion, a_rollout
from leyden.tokentree import TokenTree, common_prefix, path, spell

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)
"""Few tokens, so that prefixes, branches and repetitions are common."""


def shape(tree: TokenTree) -> list[tuple[int, tuple[int, ...]]]:
    return [(node.start, tuple(node.token_ids)) for node in tree.walk()]


@given(SEQUENCES)
def test_a_path_spells_exactly_what_was_inserted(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    ends = [tree.insert(sequence) for sequence in sequences]  # later insertions split the nodes of earlier ones
    assert [spell(end) for end in ends] == sequences


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_the_order_of_insertion_does_not_matter(sequences: list[list[int]], rng: random.Random) -> None:
    shuffled = list(sequences)
    rng.shuffle(shuffled)
    first, second = TokenTree(), TokenTree()
    for sequence, other in zip(sequences, shuffled, strict=True):
        first.insert(sequence)
        second.insert(other)
    assert shape(first) == shape(second)


@given(SEQUENCES)
def test_nodes_hold_only_deltas(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    for sequence in sequences:
        tree.insert(sequence)
    distinct_prefixes = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)}
    assert sum(len(node.token_ids) for node in tree.walk()) == len(distinct_prefixes)
    for node in tree.walk():
        assert node.token_ids
        assert all(child.token_ids[0] == token for token, child in node.children.items())
        assert [part.start for part in path(node)] == [0, *(part.end for part in path(node)[:-1])]


@given(SEQUENCES)
def test_every_leaf_is_the_end_of_a_sequence(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    for sequence in sequences:
        tree.insert(sequence)
    spelled = [spell(leaf) for leaf in tree.leaves()]
    assert all(leaf in sequences for leaf in spelled)
    assert len(spelled) == len({tuple(leaf) for leaf in spelled})
    for sequence in sequences:
        assert any(leaf[: len(sequence)] == sequence for leaf in spelled)


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefix_is_the_longest(first: list[int], second: list[int]) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert length in (len(first), len(second)) or first[length] != second[length]


# ---- all calls of a rollout ---------------------------------------------------------------------------------------


def call(
    prompt: Sequence[int], *answers: Sequence[int], role: str = "A", start: int = 0, **changes: object
) -> Completion:
    """Return a call; its answers are its choices."""
    choices = [
        Choice(
            index=index, token_ids=list(answer), logprobs=[-1.0] * len(answer), finish_reason="stop", text=str(answer)
        )
        for index, answer in enumerate(answers)
    ]
    return a_completion(prompt=prompt, choices=choices, role=role, start_ns=start, span_id=f"s{start}", **changes)


def tree_of(*calls: Completion) -> CallTree:
    (found,) = call_trees(RolloutRecords(rollout=a_rollout(attempt=1), spans=[], completions=calls, rewards=[]))
    return found


def parts(found: CallTree) -> list[tuple[list[int], list[str]]]:
    """Each node's path, and who sampled its tokens."""
    return [
        (spell(node), [f"{one.completion.role}{one.turn}" for one in found.sampled.get(id(node), ())])
        for node in found.tree.walk()
    ]


def rows(calls: Sequence[Completion]) -> list[tuple[list[int], int]]:
    """The merged rows of the calls' samples, each with how many samples it trains."""
    samples = [
        Sample(
            prompt_token_ids=one.prompt_token_ids,
            token_ids=choice.token_ids,
            weights=weights,
            advantages=weights,
            logprobs=choice.logprobs,
        )
        for one in calls
        for choice in one.choices
        for weights in [[1.0] * len(choice.token_ids)]
    ]
    return [(list(row.token_ids), len(row.samples)) for row in merged(samples)]


def test_roles_that_take_turns_in_one_conversation_share_one_row() -> None:
    calls = [
        call([1], [2], role="A", start=0),
        call([1, 2, 3], [4], role="B", start=1),
        call([1, 2, 3, 4, 5], [6], role="A", start=2),
        call([1, 2, 3, 4, 5, 6, 7], [8], role="B", start=3),
    ]
    found = tree_of(*calls)
    assert [who for _, who in parts(found)] == [[], ["A0"], [], ["B0"], [], ["A1"], [], ["B1"]]
    assert (found.tokens, found.tokens_by_call) == (8, 2 + 4 + 6 + 8)
    assert rows(calls) == [([1, 2, 3, 4, 5, 6, 7, 8], 4)]


def test_roles_with_prompts_of_their_own_share_a_row_each() -> None:
    calls = [
        call([1], [2], role="A", start=0),
        call([9, 2], [4], role="B", start=1),
        call([1, 2, 4], [5], role="A", start=2),
        call([9, 2, 4, 5], [6], role="B", start=3),
    ]
    assert rows(calls) == [([1, 2, 4, 5], 2), ([9, 2, 4, 5, 6], 2)]


def test_a_branch_a_retry_and_choices_part_where_they_differ() -> None:
    calls = [
        call([1, 2], [3, 4], [3, 5], start=0),  # two choices that begin alike
        call([1, 2], [6], start=1),  # a retry
        call([1, 2, 3, 5, 7], [8], start=2),  # goes on from the second choice
        call([1, 2, 3, 5, 9], [8], start=3),  # and so does this
    ]
    assert parts(tree_of(*calls)) == [
        ([1, 2], []),
        ([1, 2, 3], ["A0", "A0"]),
        ([1, 2, 3, 4], ["A0"]),
        ([1, 2, 3, 5], ["A0"]),
        ([1, 2, 3, 5, 7], []),
        ([1, 2, 3, 5, 7, 8], ["A2"]),
        ([1, 2, 3, 5, 9], []),
        ([1, 2, 3, 5, 9, 8], ["A3"]),
        ([1, 2, 6], ["A1"]),
    ]
    assert sorted(rows(calls)) == [
        ([1, 2, 3, 4], 1),
        ([1, 2, 3, 5, 7, 8], 2),
        ([1, 2, 3, 5, 9, 8], 1),
        ([1, 2, 6], 1),
    ]


def test_a_retry_that_says_the_same_is_sampled_twice_and_stands_once() -> None:
    calls = [call([1, 2], [3], start=0), call([1, 2], [3], start=1)]
    assert parts(tree_of(*calls)) == [([1, 2], []), ([1, 2, 3], ["A0", "A1"])]
    assert rows(calls) == [([1, 2, 3], 2)]


def test_turns_are_those_that_credit_counts_whatever_was_sent_again_or_given_up() -> None:
    again = call([1], [3], start=0, http_attempt=1)
    calls = [
        call([1], [2], start=0),
        msgspec.structs.replace(again, start_ns=1),
        call([1, 3, 4], start=2),  # the engine saw it, and it has no answer
        call([1, 3, 4], [5], start=3),
        call([7], [8], start=-1, attempt=1),  # of an attempt of the rollout that was lost
    ]
    calls = [*(msgspec.structs.replace(one, attempt=2) for one in calls[:-1]), calls[-1]]
    records = RolloutRecords(rollout=a_rollout(attempt=2), spans=[], completions=calls, rewards=[])
    (found,) = call_trees(records)
    assert parts(found) == [([1], []), ([1, 2], ["A0"]), ([1, 3], ["A0"]), ([1, 3, 4], []), ([1, 3, 4, 5], ["A2"])]
    counted = turns(records)
    sources = [one for some in found.sampled.values() for one in some]
    assert len(sources) == 3 and all(one.turn == counted[one.completion.span_id].number for one in sources)


def test_parallel_calls_of_sub_agents_give_the_same_tree_in_any_order() -> None:
    calls = [
        call([1], [2, 3], role="lead", start=0),
        call([7, 1], [4], role="left", start=1),
        call([7, 2], [5], role="right", start=2),
        call([1, 2, 3, 4, 5], [6], role="lead", start=3),
    ]
    trees = [parts(tree_of(*(calls[index] for index in order))) for order in permutations(range(4))]
    assert all(tree == trees[0] for tree in trees)
    assert ([7, 1, 4], ["left0"]) in trees[0] and ([1, 2, 3, 4, 5, 6], ["lead1"]) in trees[0]
    assert sorted(rows(calls)) == [([1, 2, 3, 4, 5, 6], 2), ([7, 1, 4], 1), ([7, 2, 5], 1)]


def test_policies_have_a_tree_each_and_forks_stand_where_they_begin() -> None:
    fork = Fork(span_id="s0", position=2, cause=ForkCause.TEMPLATE, before="b", expected="e", found="f")
    calls = [
        call([1, 2], [3, 4], start=0),
        call([1, 2, 9], [5], start=1, fork=fork),
        call([1, 2], [3, 4], start=2, policy="other"),
    ]
    found = call_trees(RolloutRecords(rollout=a_rollout(attempt=1), spans=[], completions=calls, rewards=[]))
    assert [(one.policy, one.calls) for one in found] == sorted([(calls[0].policy, 2), ("other", 1)])
    (own,) = (one for one in found if one.policy != "other")
    assert [(spell(node), own.forks[id(node)]) for node in own.tree.walk() if id(node) in own.forks] == [
        ([1, 2, 9], [Forked(role="A", turn=1, fork=fork)])
    ]
    assert fork_counts(calls) == {"template": 1, "tokenisation": 0, "edit": 0}
