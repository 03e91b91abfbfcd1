"""Keep the keys and values of prompts by weights and exact tokens.

One idea: an entry answers for every prefix of itself. A chain of hashes over blocks of tokens finds the longest
one in time linear in the prompt; the tokens themselves are compared before anything is reused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK = 16
"""Tokens a link of the chain: prefixes are found in steps of this, and at an entry's full length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """The keys and values of one prompt under one version of weights."""

    weights_id: int
    tokens: tuple[int, ...]
    keys_values: Tensor
    """(L, 2, K, T, D), T the number of tokens."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A usable prefix."""

    entry: Entry
    length: int
    """How many of the entry's tokens are shared, from the first."""


class PrefixCache:
    """Entries by least recent use, up to a number of tokens; 0 keeps none."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._entries: OrderedDict[tuple[int, tuple[int, ...]], Entry] = OrderedDict()
        self._by_prefix: dict[int, Hit] = {}

    def find(self, weights_id: int, tokens: tuple[int, ...]) -> Hit | None:
        """Return the longest known prefix of `tokens` under these weights."""
        best: Hit | None = None
        for length, link in links(weights_id, tokens):
            hit = self._by_prefix.get(link)
            if hit is not None and hit.length == length and hit.entry.weights_id == weights_id:
                best = hit
        if best is None or best.entry.tokens[: best.length] != tokens[: best.length]:
            return None
        self._entries.move_to_end((weights_id, best.entry.tokens))
        return best

    def add(self, weights_id: int, tokens: tuple[int, ...], keys_values: Tensor) -> None:
        """Keep a copy of `keys_values`, dropping the least recently used entries beyond the limit."""
        key = (weights_id, tokens)
        if len(tokens) > self.max_tokens or key in self._entries:
            return
        entry = Entry(weights_id=weights_id, tokens=tokens, keys_values=keys_values.clone())
        self._entries[key] = entry
        self.tokens += len(tokens)
        for length, link in links(weights_id, tokens):
            self._by_prefix[link] = Hit(entry=entry, length=length)
        while self.tokens > self.max_tokens:
            self._remove(next(iter(self._entries.values())))

    def drop(self, weights_id: int) -> None:
        """Forget everything computed with these weights."""
        for entry in [entry for entry in self._entries.values() if entry.weights_id == weights_id]:
            self._remove(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._by_prefix.clear()
        self.tokens = 0

    def _remove(self, entry: Entry) -> None:
        del self._entries[(entry.weights_id, entry.tokens)]
        self.tokens -= len(entry.tokens)
        for _, link in links(entry.weights_id, entry.tokens):
            hit = self._by_prefix.get(link)
            if hit is not None and hit.entry is entry:
                del self._by_prefix[link]


def links(weights_id: int, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (length, hash) of each block-aligned prefix and of the whole."""
    link = hash(weights_id)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        link = hash((link, tuple(tokens[end - BLOCK : end])))
        yield end, link
    if len(tokens) % BLOCK:
        yield len(tokens), hash((link, tuple(tokens[len(tokens) - len(tokens) % BLOCK :])))
