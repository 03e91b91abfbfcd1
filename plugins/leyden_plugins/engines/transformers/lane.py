"""Hold the rows that decode together: those of one version of weights.

One idea: the cache keeps rotated keys, so a row's tokens may lie in any columns. All rows end at the same column;
a decode step writes one column for all of them, and a mask hides what lies before a row's first token.
One trap: a row's cache covers its prompt *without the last token*; that token is the input of its first decode
step. So identical prompts share one prefill whatever they sample, and prefill needs no logits.

Axes: B rows, W columns in use, S new tokens, L layers, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from leyden_plugins.engines.transformers.cache import Hit, PrefixCache
from leyden_plugins.engines.transformers.networks import ModuleNetwork, Network
from leyden_plugins.engines.transformers.sampling import Sampled

SPARE_COLUMNS = 64
"""Columns beyond the longest row: the cache is moved back once in so many steps."""

MAX_PREFILL_TOKENS = 16_384
"""Padded tokens a prefill batch: bounds its memory and how long running rows wait for it."""


@dataclass(eq=False, kw_only=True)
class Row(Sampled):
    """One choice being sampled: a place in the batch."""

    prompt: tuple[int, ...]

    @property
    def cached(self) -> int:
        """How many of its tokens the cache holds."""
        return len(self.prompt) + len(self.token_ids) - 1

    @property
    def last_token(self) -> int:
        """The token whose successor is sampled next."""
        return self.token_ids[-1] if self.token_ids else self.prompt[-1]


R = TypeVar("R", bound=Row)


class Lane(Protocol[R]):
    """Rows of one version of weights."""

    @property
    def rows(self) -> Sequence[R]: ...

    def admit(self, rows: Sequence[R]) -> None:
        """Prefill and add rows behind those that are there."""
        ...

    def decode(self) -> Tensor:
        """Return the logits (B, V) of every row's next token."""
        ...

    def remove(self, gone: Sequence[int]) -> None:
        """Take rows out, by place; others may change places."""
        ...


class WindowLane(Generic[R]):
    """Rows that share one window of keys and values."""

    def __init__(
        self, network: Network[Any], weights: object, weights_id: int, cache: PrefixCache, longest: int
    ) -> None:
        self.network = network
        self.weights = weights
        self.weights_id = weights_id
        self.cache = cache
        self.longest = longest
        self.rows: list[R] = []
        self.end = 0
        """The column that the next decode step writes."""
        self.first = 0
        """The first column in use."""
        self._window = self._blank(1, SPARE_COLUMNS)
        self._changed = True
        self._positions = self._starts = torch.empty(0, dtype=torch.long)
        self._columns = torch.empty(0, dtype=torch.long)
        self._is_ragged = False

    def admit(self, rows: Sequence[R]) -> None:
        """Prefill each distinct prompt once, then copy its keys and values to the rows that asked."""
        groups: dict[tuple[int, ...], list[R]] = {}
        for row in rows:
            groups.setdefault(row.prompt[:-1], []).append(row)
        prompts = [prompt for prompt in groups if prompt]
        computed = prefill(self.network, self.weights, self.weights_id, self.cache, prompts, self.longest)
        ordered = [row for group in groups.values() for row in group]
        self._make_room(len(self.rows) + len(rows), max(row.cached for row in ordered))
        at = len(self.rows)
        for prompt, group in groups.items():
            if prompt:
                target = self._window[:, :, at : at + len(group), :, self.end - len(prompt) : self.end]
                target.copy_(computed[prompt].unsqueeze(2))
            at += len(group)
        self.rows.extend(ordered)
        self._changed = True

    def decode(self) -> Tensor:
        """Run every row's last token; see `Lane.decode`."""
        if self.end == self._window.shape[4]:
            self._make_room(len(self.rows), 0)
        if self._changed:
            self._index()
        count, width = len(self.rows), self.end + 1 - self.first
        window = self._window[:, :, :count, :, self.first : self.end + 1]
        mask: Tensor | None = None
        if self._is_ragged:
            hidden = self._columns[:width] < self._starts
            mask = torch.zeros(count, width, dtype=self.network.dtype, device=self.network.device)
            mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        device = self.network.device
        tokens = torch.tensor([row.last_token for row in self.rows], dtype=torch.long, device=device)
        logits = self.network.decode(self.weights, tokens, self._positions, window, mask)
        self._positions = self._positions + 1
        self.end += 1
        return logits

    def remove(self, gone: Sequence[int]) -> None:
        """Fill the gaps with rows from the end, so that rows stay dense."""
        left_out = set(gone)
        left = len(self.rows) - len(left_out)
        movers = (place for place in range(left, len(self.rows)) if place not in left_out)
        for gap in sorted(place for place in left_out if place < left):
            mover = next(movers)
            row = self.rows[mover]
            used = slice(self.end - row.cached, self.end)
            self._window[:, :, gap, :, used] = self._window[:, :, mover, :, used]
            self.rows[gap] = row
        del self.rows[left:]
        if not self.rows:
            self.end = 0
        self._changed = True

    def _index(self) -> None:
        """Recompute what depends on which rows are here."""
        lengths = [row.cached for row in self.rows]
        self.first = self.end - max(lengths)
        self._is_ragged = min(lengths) != max(lengths)
        device = self.network.device
        self._positions = torch.tensor(lengths, dtype=torch.long, device=device)
        self._starts = (max(lengths) - self._positions)[:, None]
        self._columns = torch.arange(self._window.shape[4] + 1, device=device)
        self._changed = False

    def _make_room(self, count: int, length: int) -> None:
        """Have places for `count` rows of up to `length` tokens and a free column; move what is there."""
        used = max((row.cached for row in self.rows), default=0)
        needed = max(used, length)
        places, columns = self._window.shape[2], self._window.shape[4]
        if count <= places and needed <= self.end < columns:
            return
        kept = self._window[:, :, : len(self.rows), :, self.end - used : self.end]
        if count > places or needed + SPARE_COLUMNS // 2 > columns:
            grown = max(columns, needed + max(SPARE_COLUMNS, needed // 4))
            self._window = self._blank(max(places, 1 << (count - 1).bit_length()), grown)
        else:
            kept = kept.clone()  # source and target may overlap
        self.end = needed
        self._window[:, :, : len(self.rows), :, needed - used : needed] = kept
        self._changed = True

    def _blank(self, places: int, columns: int) -> Tensor:
        # Zeros, not uninitialised memory: a masked column is multiplied by 0, which leaves a NaN a NaN.
        network = self.network
        shape = (network.layers, 2, places, network.kv_heads, columns, network.head_dim)
        return torch.zeros(shape, dtype=network.dtype, device=network.device)


class SoloLane(Generic[R]):
    """Rows of a model whose cache cannot be shared: each brings its own and decodes alone."""

    def __init__(self, network: ModuleNetwork, weights: dict[str, Tensor]) -> None:
        self.network = network
        self.weights = weights
        self.rows: list[R] = []
        self._caches: list[Cache] = []

    def admit(self, rows: Sequence[R]) -> None:
        """Prefill each distinct prompt once."""
        prefilled: dict[tuple[int, ...], Cache] = {}
        for row in rows:
            prompt = row.prompt[:-1]
            if prompt not in prefilled:
                prefilled[prompt] = DynamicCache(config=self.network.model.config)
                if prompt:
                    tokens = torch.tensor([prompt], device=self.network.device)
                    self.network.extend(self.weights, tokens, prefilled[prompt])
            self.rows.append(row)
            self._caches.append(copy.deepcopy(prefilled[prompt]))

    def decode(self) -> Tensor:
        """Run every row's last token, row by row."""
        logits = []
        for row, cache in zip(self.rows, self._caches, strict=True):
            tokens = torch.tensor([[row.last_token]], device=self.network.device)
            logits.append(self.network.extend(self.weights, tokens, cache))
        return torch.cat(logits)

    def remove(self, gone: Sequence[int]) -> None:
        """Take rows out."""
        for place in sorted(set(gone), reverse=True):
            del self.rows[place], self._caches[place]


def prefill(
    network: Network[Any],
    weights: object,
    weights_id: int,
    cache: PrefixCache,
    prompts: Sequence[tuple[int, ...]],
    longest: int,
) -> dict[tuple[int, ...], Tensor]:
    """Return the keys and values (L, 2, K, T, D) of distinct prompts, computing what `cache` lacks."""
    computed: dict[tuple[int, ...], Tensor] = {}
    waiting: list[tuple[tuple[int, ...], Hit | None]] = []
    for prompt in prompts:
        hit = cache.find(weights_id, prompt)
        if hit is not None and hit.length == len(prompt):
            computed[prompt] = hit.entry.keys_values[:, :, :, : hit.length]
        else:
            waiting.append((prompt, hit))
    # By the number of tokens to compute, so that little of a batch is padding.
    waiting.sort(key=lambda item: len(item[0]) - (item[1].length if item[1] else 0))
    while waiting:
        batch = [waiting.pop()]
        new = len(batch[0][0]) - (batch[0][1].length if batch[0][1] else 0)
        while waiting and (len(batch) + 1) * new <= MAX_PREFILL_TOKENS:
            prompt, hit = waiting[-1]
            if 2 * (len(prompt) - (hit.length if hit else 0)) < new:
                break
            batch.append(waiting.pop())
        for (prompt, _), keys_values in zip(batch, prefill_batch(network, weights, batch, longest), strict=True):
            computed[prompt] = keys_values
            cache.add(weights_id, prompt, keys_values)
    return computed


def prefill_batch(
    network: Network[Any],
    weights: object,
    batch: Sequence[tuple[tuple[int, ...], Hit | None]],
    longest: int,
) -> list[Tensor]:
    """Compute a batch: known prefixes end at one column, the new tokens begin there and are padded on the right."""
    known = [hit.length if hit else 0 for _, hit in batch]
    new = [len(prompt) - length for (prompt, _), length in zip(batch, known, strict=True)]
    before, after = max(known), max(new)
    device = network.device
    shape = (network.layers, 2, len(batch), network.kv_heads, before + after, network.head_dim)
    window = torch.zeros(shape, dtype=network.dtype, device=device)
    padded = []
    for place, ((prompt, hit), length) in enumerate(zip(batch, known, strict=True)):
        if hit is not None:
            window[:, :, place, :, before - length : before] = hit.entry.keys_values[:, :, :, :length]
        padded.append([*prompt[length:], *([0] * (after - new[place]))])
    tokens = torch.tensor(padded, dtype=torch.long, device=device)
    lengths = torch.tensor(known, dtype=torch.long, device=device)[:, None]
    places = torch.arange(after, device=device)
    positions = (lengths + places).clamp_(max=longest - 1)
    mask: Tensor | None = None
    if before:
        columns = torch.arange(before + after, device=device)
        hidden = (columns < before - lengths)[:, None] | (columns > before + places[:, None])[None]
        mask = torch.zeros(hidden.shape, dtype=network.dtype, device=device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None]
    network.prefill(weights, tokens, positions, window, mask)
    return [window[:, :, place, :, before - known[place] : before + new[place]] for place in range(len(batch))]
