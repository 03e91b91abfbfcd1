"""Micro-batches: samples laid out in rows, rows sorted by length, cut by a budget.

One idea: rows with one prompt (a group's samples) share its positions, so the prompt is computed once; each token
sees exactly the tokens before it in its own row, so the gradient is that of the samples one by one.
One trap: rows that share need a mask and positions of their own, rows that share nothing are faster without; the two
never stand in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from leyden.errors import ConfigurationError
from leyden.interfaces import Sample
from leyden.layouts import Attention, Layout, Row, lay_out
from leyden_plugins.torch_models.tree_masks import BLOCK, uses_blocks

STRETCH = 1.25
"""The longest row of a micro-batch is at most this many times its shortest: the rest would be padding."""

MASK_BYTES = 256 * 2**20
"""An explicit mask is at most so large; in float32 that is one row of 8192 positions."""

FLOAT32_MASKS = Attention(pair_cost=0.0, mask_entries=MASK_BYTES // 4)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B rows padded to T positions, and the N tokens trained in them."""

    input_ids_B_T: Tensor
    position_ids_B_T: Tensor | None
    seen_until_B_T: Tensor | None
    """See `Row.seen_until`; `None`: causal, nothing is shared."""
    source_N: Tensor
    """Where in the flattened batch each trained token is predicted: at the token before it."""
    token_ids_N: Tensor
    temperature_N: Tensor
    sampled_logprobs_N: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    reference_logprobs_N: Tensor | None
    returns_N: Tensor | None
    values_N: Tensor | None
    sample_N: Tensor
    """Which of the samples given each trained token is of; a sample's tokens stay together and in order."""
    padding: int
    """Positions that hold no token."""


def attention_of(model: PreTrainedModel) -> Attention:
    """Estimate what attention costs a model, in multiply-adds: a pair's over a position's.

    Forward, a pair takes 2 * width multiply-adds a layer (query by key, weight by value), and a position takes one a
    parameter behind the embedding; the backward pass is twice either. Of a mixture of experts too many parameters
    are counted, which makes sharing look better than it is.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    embedding = next(model.get_input_embeddings().parameters())
    parameters = sum(one.numel() for one in model.base_model.parameters()) - embedding.numel()
    return Attention(
        pair_cost=2 * width * config.num_hidden_layers / max(parameters, 1),
        mask_entries=None if uses_blocks(model) else MASK_BYTES // embedding.element_size(),
    )


def micro_batches(
    samples: Sequence[Sample],
    *,
    budget: int,
    layout: Layout,
    attention: Attention = FLOAT32_MASKS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Iterator[MicroBatch]:
    """Yield micro-batches of at most `budget` positions, padding included; a longer path goes alone.

    Raises:
        ConfigurationError: a sample has no prompt, so that nothing predicts its first token, or a temperature of 0.
    """
    for sample in samples:
        if sample.temperature <= 0 or not sample.prompt_token_ids:
            raise ConfigurationError(
                f"a sample with temperature {sample.temperature!r} and a prompt of {len(sample.prompt_token_ids)!r} "
                "tokens has no log-probabilities: the temperature must be above 0, and the prompt not empty"
            )
    rows = lay_out(samples, layout, attention, longest=budget)
    rows.sort(key=lambda row: (row.seen_until is not None, len(row.token_ids)))
    batch: list[Row] = []
    for row in rows:
        if batch and not _fits(row, batch, budget, attention.mask_entries):
            yield _collate(samples, batch, attention, dtype, device)
            batch = []
        batch.append(row)
    if batch:
        yield _collate(samples, batch, attention, dtype, device)


def _fits(row: Row, batch: Sequence[Row], budget: int, mask_entries: int | None) -> bool:
    """Say whether a row, not shorter than any of the batch, may join it."""
    length, count = len(row.token_ids), len(batch) + 1
    is_shared = row.seen_until is not None
    return (
        is_shared == (batch[0].seen_until is not None)
        and length * count <= budget
        and length <= STRETCH * len(batch[0].token_ids)
        and not (is_shared and mask_entries is not None and length * length * count > mask_entries)
    )


def _collate(
    samples: Sequence[Sample], rows: Sequence[Row], attention: Attention, dtype: torch.dtype, device: str
) -> MicroBatch:
    """Pad the rows on the right and gather their trained tokens."""
    is_shared = rows[0].seen_until is not None
    length = max(len(row.token_ids) for row in rows)
    if is_shared and attention.mask_entries is None:
        length = max(2, -(-length // BLOCK)) * BLOCK  # a single block would be compiled separately
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    # Padding sees itself: a query with nothing to look at is NaN, which spreads backwards.
    seen_until = torch.arange(1, length + 1).repeat(len(rows), 1)
    source: list[int] = []
    trained: list[int] = []
    for number, row in enumerate(rows):
        own = slice(len(row.token_ids))
        input_ids[number, own] = torch.tensor(row.token_ids)
        position_ids[number, own] = torch.tensor(row.position_ids)
        if row.seen_until is not None:
            seen_until[number, own] = torch.tensor(row.seen_until)
        for index, places in row.samples.items():
            source += [number * length + place for place in places]
            trained.append(index)
    chosen = [samples[index] for index in trained]

    def joined(values: Iterable[Sequence[float] | None]) -> Tensor:
        # A sample without such values takes no part in the terms that need them: NaN says so.
        nothing = float("nan")
        flat = [
            value
            for sample, own in zip(chosen, values, strict=True)
            for value in (own if own is not None else [nothing] * len(sample.token_ids))
        ]
        return torch.tensor(flat, dtype=dtype, device=device)

    def optional(values: Sequence[Sequence[float] | None]) -> Tensor | None:
        return None if all(own is None for own in values) else joined(values)

    token_ids = [token for sample in chosen for token in sample.token_ids]
    return MicroBatch(
        input_ids_B_T=input_ids.to(device),
        position_ids_B_T=position_ids.to(device) if is_shared else None,
        seen_until_B_T=seen_until.to(device) if is_shared else None,
        source_N=torch.tensor(source, dtype=torch.long, device=device),
        token_ids_N=torch.tensor(token_ids, dtype=torch.long, device=device),
        temperature_N=joined([[sample.temperature] * len(sample.token_ids) for sample in chosen]),
        sampled_logprobs_N=joined([sample.logprobs for sample in chosen]),
        old_logprobs_N=joined([sample.old_logprobs or sample.logprobs for sample in chosen]),
        advantages_N=joined([sample.advantages for sample in chosen]),
        weights_N=joined([sample.weights for sample in chosen]),
        reference_logprobs_N=optional([sample.reference_logprobs for sample in chosen]),
        returns_N=optional([sample.returns for sample in chosen]),
        values_N=optional([sample.values for sample in chosen]),
        sample_N=torch.tensor(
            [index for index in trained for _ in samples[index].token_ids], dtype=torch.long, device=device
        ),
        padding=input_ids.numel() - sum(len(row.token_ids) for row in rows),
    )
