"""Layouts: the samples of a batch as rows of tokens.

One idea: a token's share of the loss stands in its sample, so samples may lie in rows in any way in which each token
sees exactly the tokens that its sample says; every layout has the same gradient. A row of several paths of the token
tree holds the tree's nodes depth first, so that whoever sees a token is one run of places behind it.
One trap: such a row saves positions, but attention may cost the square of its length; see `Attention`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from leyden.interfaces import Sample
from leyden.tokentree import Node, TokenTree, path, spell

Layout = Literal["calls", "merged", "packed", "auto"]
"""One row a call; one row a path of the token tree; rows of several paths, with the fewest positions; rows of one path
or several, whatever is estimated to cost least."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """T tokens computed as one sequence: a path of the token tree, or several that share what they begin with."""

    token_ids: Sequence[int]
    """Length T; parents first, depth first."""
    position_ids: Sequence[int]
    """Length T: how many tokens stand before each on its own path."""
    seen_until: Sequence[int] | None
    """Length T: the token at place k is seen from the places k to seen_until[k] - 1; `None`: to the row's end."""
    samples: Mapping[int, Sequence[int]]
    """Which of the samples given -> the place before each of its answer's tokens, where that token is predicted.

    Samples that repeat each other have the same places.
    """


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What attention costs beside the rest of the model; the unit is the rest's work on one position."""

    pair_cost: float
    """Of a query that looks at a key, in all layers."""
    mask_entries: int | None
    """Rows of several paths are computed with an explicit mask, T * T pairs whoever sees whom, and a mask may have so
    many entries; `None`: only pairs that see each other are computed, and rows may be of any length."""

    def of_one(self, length: int) -> float:
        """Return the cost of a row of one path, with its positions."""
        return length + self.pair_cost * _pairs(length)

    def of_several(self, length: int, pairs: int) -> float:
        """Return that of a row of several paths, in which so many pairs see each other."""
        return length + self.pair_cost * (pairs if self.mask_entries is None else length * length)


def lay_out(samples: Sequence[Sample], layout: Layout, attention: Attention, *, longest: int) -> list[Row]:
    """Lay samples out; every sample is in exactly one row.

    Args:
        samples: of one policy.
        layout: how.
        attention: what rows cost; for `auto`.
        longest: positions of a row of several paths at most.
    """
    if layout == "calls":
        return one_row_a_call(samples)
    if layout == "merged":
        return merged(samples)
    if layout == "packed":
        attention = replace(attention, pair_cost=0.0)
    return packed(samples, attention, longest=longest)


def one_row_a_call(samples: Sequence[Sample]) -> list[Row]:
    """Return one row a sample."""
    return [
        _path_row([*sample.prompt_token_ids, *sample.token_ids], {index: sample})
        for index, sample in enumerate(samples)
    ]


def merged(samples: Sequence[Sample]) -> list[Row]:
    """Return one row a root-to-leaf path of the samples' token tree: turns that extend each other share a row.

    Each sample goes with the first leaf below it.
    """
    return [_path_row(spell(leaf.node), leaf.samples) for leaf in _forest(samples).leaves]


def packed(samples: Sequence[Sample], attention: Attention, *, longest: int) -> list[Row]:
    """Return the rows of lowest estimated cost: paths of the token tree, or runs of neighbouring ones together.

    With a `pair_cost` of 0 it is those with the fewest positions.

    Args:
        samples: what is laid out.
        attention: what a row costs.
        longest: positions of a row of several paths at most; a longer path has its own row.
    """
    forest = _forest(samples)
    if attention.mask_entries is not None:
        longest = min(longest, math.isqrt(attention.mask_entries))
    return [
        _path_row(spell(forest.leaves[first].node), forest.leaves[first].samples)
        if first == last
        else _tree_row(forest, first, last)
        for first, last in _cheapest_runs(forest.leaves, attention, longest)
    ]


# ---- the tree of all samples -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    node: Node
    place: int
    """In the forest's nodes."""
    shared: int
    """How many tokens its path has in common with the leaf before."""
    samples: Mapping[int, Sample]
    """Those that end on its path and on that of no leaf before."""


@dataclass(frozen=True, kw_only=True)
class _Forest:
    nodes: Sequence[Node]
    """Depth first."""
    leaves: Sequence[_Leaf]


def _forest(samples: Sequence[Sample]) -> _Forest:
    tree = TokenTree()
    ending: dict[int, dict[int, Sample]] = defaultdict(dict)
    for index, sample in enumerate(samples):
        ending[id(tree.insert([*sample.prompt_token_ids, *sample.token_ids]))][index] = sample
    nodes = list(tree.walk())
    leaves: list[_Leaf] = []
    on_path: dict[int, Sample] = {}
    shared = 0
    for place, node in enumerate(nodes):
        on_path |= ending.get(id(node), {})
        if not node.children:
            leaves.append(_Leaf(node=node, place=place, shared=shared, samples=on_path))
            on_path = {}
            # Depth first, the next node hangs on the path that the next leaf shares with this one.
            shared = nodes[place + 1].start if place + 1 < len(nodes) else 0
    return _Forest(nodes=nodes, leaves=leaves)


def _cheapest_runs(leaves: Sequence[_Leaf], attention: Attention, longest: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last leaf of every row, of all ways to cut the leaves into runs the cheapest.

    Neighbours share most, so runs are enough; runs that share nothing are not tried, they save nothing.
    """
    positions, pairs = [0], [0]  # positions[last + 1] - positions[first + 1]: what the leaves after `first` add
    for leaf in leaves:
        positions.append(positions[-1] + leaf.node.end - leaf.shared)
        pairs.append(pairs[-1] + _pairs(leaf.node.end) - _pairs(leaf.shared))
    cheapest, firsts = [0.0], [0]
    for last, leaf in enumerate(leaves):
        best, chosen = cheapest[last] + attention.of_one(leaf.node.end), last
        first = last
        while leaves[first].shared:
            first -= 1
            stem = leaves[first].node.end
            length = stem + positions[last + 1] - positions[first + 1]
            if length > longest:
                break
            seen = _pairs(stem) + pairs[last + 1] - pairs[first + 1]
            cost = cheapest[first] + attention.of_several(length, seen)
            if cost < best:
                best, chosen = cost, first
        cheapest.append(best)
        firsts.append(chosen)
    end = len(leaves)
    while end:
        yield firsts[end], end - 1
        end = firsts[end]


def _pairs(length: int) -> int:
    """Return how many pairs see each other on a path: each token itself and all before it."""
    return length * (length + 1) // 2


# ---- rows ------------------------------------------------------------------------------------------------------


def _path_row(token_ids: Sequence[int], samples: Mapping[int, Sample]) -> Row:
    places = range(len(token_ids))
    return Row(
        token_ids=token_ids,
        position_ids=places,
        seen_until=None,
        samples={index: places[_predicting(sample)] for index, sample in samples.items()},
    )


def _tree_row(forest: _Forest, first: int, last: int) -> Row:
    """Lay out all nodes above the leaves `first` to `last`."""
    leaves = forest.leaves[first : last + 1]
    nodes = [*path(leaves[0].node), *forest.nodes[leaves[0].place + 1 : leaves[-1].place + 1]]
    starts: dict[int, int] = {}
    length = 0
    for node in nodes:
        starts[id(node)] = length
        length += len(node.token_ids)
    ends: dict[int, int] = {}  # of each node with everything below it
    for node in reversed(nodes):
        ends.setdefault(id(node), starts[id(node)] + len(node.token_ids))
        if node.parent is not None:
            ends.setdefault(id(node.parent), ends[id(node)])  # the last child comes first, and ends last
    places: dict[int, Sequence[int]] = {}
    for leaf in leaves:
        on_path = [starts[id(node)] + step for node in path(leaf.node) for step in range(len(node.token_ids))]
        places |= {index: on_path[_predicting(sample)] for index, sample in leaf.samples.items()}
    return Row(
        token_ids=[token for node in nodes for token in node.token_ids],
        position_ids=[position for node in nodes for position in range(node.start, node.end)],
        seen_until=[ends[id(node)] for node in nodes for _ in node.token_ids],
        samples=places,
    )


def _predicting(sample: Sample) -> slice:
    """Return which tokens of a sample's path come before one of its answer's."""
    first = len(sample.prompt_token_ids) - 1
    return slice(first, first + len(sample.token_ids))
