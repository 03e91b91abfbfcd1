"""Hold the rows that decode together: those of one set of whole weights, with any LoRAs on it.

One idea: the cache keeps rotated keys, so a row's tokens may lie in any columns. All rows end at the same column;
a decode step writes one column for all of them, and a mask hides what lies before a row's first token.
One trap: a row's cache covers its prompt *without the last token*; that token is the input of its first decode
step. So identical prompts share one prefill whatever they sample, and prefill needs no logits.

Axes: B rows, W columns in use, S new tokens, L layers, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from leyden_plugins.engines.transformers.cache import PrefixCache
from leyden_plugins.engines.transformers.networks import ModuleNetwork, Network
from leyden_plugins.engines.transformers.prefill import Prompt, Waiting, batches, prefill_batch
from leyden_plugins.engines.transformers.sampling import Sampled
from leyden_plugins.torch_models import AdapterStack, FusedAdapter, RowAdapters

SPARE_COLUMNS = 64
"""Columns beyond the longest row: the cache is moved back once in so many steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """One version of a policy's weights, ready to run."""

    weights_id: int
    """Unique to what is computed with them: two names that serve the same share cached prompts."""
    lane_id: int
    """Whose rows decode together: the `weights_id` of the whole weights, which a LoRA's rows share with the base's."""
    weights: Any
    """What the network's `prepare` made."""
    adapter: FusedAdapter | None = None
    """The LoRA to add; `None` where there is none, or where it is merged into `weights`."""


@dataclass(eq=False, kw_only=True)
class Row(Sampled):
    """One choice being sampled: a place in the batch."""

    served: Served
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
    """Rows of one set of whole weights."""

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

    def forget(self) -> None:
        """Free what is kept of LoRAs that have no rows."""
        ...

    def scrub(self) -> None:
        """Remove what is not a number: rows that had it are gone, and others may take their places."""
        ...


class WindowLane(Generic[R]):
    """Rows that share one window of keys and values."""

    def __init__(self, network: Network[Any], weights: object, cache: PrefixCache, longest: int) -> None:
        self.network = network
        self.weights = weights
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
        self._stack = AdapterStack(())
        """Every LoRA that rows had since the last was forgotten: it need not be built anew when rows come and go."""
        self._adapters: RowAdapters | None = None

    def admit(self, rows: Sequence[R]) -> None:
        """Prefill each distinct prompt once, then copy its keys and values to the rows that asked."""
        groups: dict[Prompt, list[R]] = {}
        for row in rows:
            groups.setdefault(Prompt(row.served.weights_id, row.prompt[:-1]), []).append(row)
        adapters = {row.served.weights_id: row.served.adapter for row in rows}
        computed = self.prefill([prompt for prompt in groups if prompt.tokens], adapters)
        ordered = [row for group in groups.values() for row in group]
        self._make_room(len(self.rows) + len(rows), max(row.cached for row in ordered))
        at = len(self.rows)
        for prompt, group in groups.items():
            if prompt.tokens:
                target = self._window[:, :, at : at + len(group), :, self.end - len(prompt.tokens) : self.end]
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
        logits = self.network.decode(self.weights, tokens, self._positions, window, mask, self._adapters)
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

    def forget(self) -> None:
        """Free the stacked adapters; those of the rows are stacked anew at the next step."""
        self._stack = AdapterStack(())
        self._adapters = None
        self._changed = True

    def scrub(self) -> None:
        """Set what is not a number to 0: a masked column is multiplied by 0, which leaves a NaN a NaN."""
        self._window.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def prefill(self, prompts: Sequence[Prompt], adapters: Mapping[int, FusedAdapter | None]) -> dict[Prompt, Tensor]:
        """Return the keys and values (L, 2, K, T, D) of distinct prompts, computing what the cache lacks."""
        computed: dict[Prompt, Tensor] = {}
        waiting: list[Waiting] = []
        for prompt in prompts:
            hit = self.cache.find(prompt.weights_id, prompt.tokens)
            if hit is not None and hit.length == len(prompt.tokens):
                computed[prompt] = hit.entry.keys_values[:, :, :, : hit.length]
            else:
                waiting.append(Waiting(prompt, hit))
        for batch in batches(waiting):
            added = [adapters[one.prompt.weights_id] for one in batch]
            found = prefill_batch(self.network, self.weights, batch, self.longest, added)
            for one, keys_values in zip(batch, found, strict=True):
                computed[one.prompt] = keys_values
                self.cache.add(one.prompt.weights_id, one.prompt.tokens, keys_values)
        return computed

    def _row_adapters(self, adapters: Sequence[FusedAdapter | None]) -> RowAdapters | None:
        """Return what the passes need to know of the rows' LoRAs: nothing where they have none."""
        there = {id(adapter): adapter for adapter in adapters if adapter is not None}
        if not there:
            return None
        new = [adapter for adapter in there.values() if not self._stack.holds(adapter)]
        if new:
            self._stack = AdapterStack((*self._stack.adapters, *new))
        return RowAdapters.of(self._stack, adapters, self.network.device)

    def _index(self) -> None:
        """Recompute what depends on which rows are here."""
        lengths = [row.cached for row in self.rows]
        self.first = self.end - max(lengths)
        self._is_ragged = min(lengths) != max(lengths)
        device = self.network.device
        self._positions = torch.tensor(lengths, dtype=torch.long, device=device)
        self._starts = (max(lengths) - self._positions)[:, None]
        self._columns = torch.arange(self._window.shape[4] + 1, device=device)
        self._adapters = self._row_adapters([row.served.adapter for row in self.rows])
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

    def forget(self) -> None:
        """Do nothing: a LoRA is merged into weights of its own here."""

    def scrub(self) -> None:
        """Do nothing: a row's cache went with it."""
