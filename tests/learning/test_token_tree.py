"""The token tree merges on exact prefixes and forgets nothing."""

import random

from hypothesis import given
from hypothesis import strategies as st

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
