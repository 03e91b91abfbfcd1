"""The token tree: token sequences merged on exact prefixes.

One idea: a node holds only the tokens that follow its parent's, so the calls of a rollout (turns, branches,
retries, sub-agents) share what they share, and a path from the root spells exactly what the engine saw.
One trap: inserting may split a node. The *lower* half keeps its identity, so a node returned by `insert` stays
the end of its sequence for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Node:
    """A run of tokens that every sequence through it shares."""

    __slots__ = ("children", "parent", "start", "token_ids")

    def __init__(self, token_ids: list[int], parent: Node | None, start: int) -> None:
        self.token_ids = token_ids
        """The delta: what follows the parent's tokens. Empty at the root only."""
        self.parent = parent
        self.start = start
        """How many tokens the path holds before this node's first."""
        self.children: dict[int, Node] = {}
        """By first token."""

    @property
    def end(self) -> int:
        """Tokens from the root to this node's last."""
        return self.start + len(self.token_ids)


class TokenTree:
    """A radix tree of token sequences; the same set of sequences gives the same tree in any order."""

    def __init__(self) -> None:
        self.root = Node([], None, 0)

    def insert(self, token_ids: Sequence[int]) -> Node:
        """Add a sequence; return the node at whose last token it ends."""
        node, rest = self.root, list(token_ids)
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                leaf = Node(rest, node, node.end)
                node.children[rest[0]] = leaf
                return leaf
            shared = common_prefix(child.token_ids, rest)
            node = child if shared == len(child.token_ids) else _split(child, shared)
            rest = rest[shared:]
        return node

    def walk(self) -> Iterator[Node]:
        """Yield every node but the root, parents first, children by first token."""
        stack = _ordered_children(self.root)
        while stack:
            node = stack.pop()
            yield node
            stack.extend(_ordered_children(node))

    def leaves(self) -> Iterator[Node]:
        """Yield the nodes that nothing follows, in the order of `walk`."""
        return (node for node in self.walk() if not node.children)


def path(node: Node) -> list[Node]:
    """Return the nodes from below the root to `node`."""
    nodes: list[Node] = []
    current = node
    while current.parent is not None:
        nodes.append(current)
        current = current.parent
    return nodes[::-1]


def spell(node: Node) -> list[int]:
    """Return the tokens from the root to the end of `node`."""
    return [token for part in path(node) for token in part.token_ids]


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many leading tokens, or characters, two sequences share."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:  # the common case, compared in C
        return shortest
    equal, differ = 0, shortest  # the first `equal` are equal, the first `differ` are not
    while differ - equal > 1:
        middle = (equal + differ) // 2
        if first[equal:middle] == second[equal:middle]:
            equal = middle
        else:
            differ = middle
    return equal


def _split(node: Node, length: int) -> Node:
    """Cut `node` after `length` tokens; return the new upper half."""
    parent = node.parent
    assert parent is not None  # the root is empty, so it is never split
    upper = Node(node.token_ids[:length], parent, node.start)
    parent.children[upper.token_ids[0]] = upper
    upper.children[node.token_ids[length]] = node
    node.token_ids, node.parent, node.start = node.token_ids[length:], upper, upper.end
    return upper


def _ordered_children(node: Node) -> list[Node]:
    """Return the children, last first, as a stack wants them."""
    return [node.children[token] for token in sorted(node.children, reverse=True)]
