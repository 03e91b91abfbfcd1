"""Compute the keys and values of many prompts together, beyond what the prefix cache holds of them.

One idea: the known prefixes of a batch end at one column and the new tokens begin there, padded on the right, so
prompts with hits of any length and with any LoRAs share one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leyden_plugins.engines.transformers.cache import Hit
from leyden_plugins.engines.transformers.networks import Network
from leyden_plugins.torch_models import FusedAdapter, GroupedAdapters

MAX_PREFILL_TOKENS = 16_384
"""Padded tokens a prefill batch: bounds its memory and how long running rows wait for it."""


class Prompt(NamedTuple):
    """What is prefilled once, whoever samples from it."""

    weights_id: int
    tokens: tuple[int, ...]
    """Without the prompt's last token."""


class Waiting(NamedTuple):
    """A prompt that the cache does not hold in full."""

    prompt: Prompt
    hit: Hit | None

    @property
    def known(self) -> int:
        """How many of its tokens the cache holds."""
        return self.hit.length if self.hit else 0

    @property
    def new(self) -> int:
        """How many tokens are to be computed."""
        return len(self.prompt.tokens) - self.known


def batches(waiting: Sequence[Waiting]) -> Iterator[list[Waiting]]:
    """Yield prompts to compute together: of similar length, so that little is padding, and not too many.

    Those of one version follow each other within a batch: its LoRA is then added to all of them at once.
    """
    left = sorted(waiting, key=lambda one: one.new)
    while left:
        batch = [left.pop()]
        new = batch[0].new
        while left and (len(batch) + 1) * new <= MAX_PREFILL_TOKENS and 2 * left[-1].new >= new:
            batch.append(left.pop())
        yield sorted(batch, key=lambda one: one.prompt.weights_id)


def prefill_batch(
    network: Network[Any],
    weights: object,
    batch: Sequence[Waiting],
    longest: int,
    adapters: Sequence[FusedAdapter | None],
) -> list[Tensor]:
    """Compute a batch: known prefixes end at one column, the new tokens begin there and are padded on the right."""
    known, new = [one.known for one in batch], [one.new for one in batch]
    before, after = max(known), max(new)
    device = network.device
    shape = (network.layers, 2, len(batch), network.kv_heads, before + after, network.head_dim)
    window = torch.zeros(shape, dtype=network.dtype, device=device)
    padded = []
    for place, one in enumerate(batch):
        if one.hit is not None:
            window[:, :, place, :, before - one.known : before] = one.hit.entry.keys_values[:, :, :, : one.known]
        padded.append([*one.prompt.tokens[one.known :], *([0] * (after - one.new))])
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
    grouped = GroupedAdapters.of(adapters, after) if any(adapters) else None
    network.prefill(weights, tokens, positions, window, mask, grouped)
    return [window[:, :, place, :, before - known[place] : before + new[place]] for place in range(len(batch))]
