"""Attention masks of rows that hold several paths of a token tree: explicit ones, and FlexAttention's blocks.

One idea: a row holds the tree depth first, so a query q sees a key k exactly when k <= q < seen_until[k]: one number a
token says who sees it, and whole blocks are decided by the smallest and largest number in them.
One trap: FlexAttention is only fast compiled, which needs CUDA; elsewhere it would build the explicit mask itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from leyden.extras import extra

with extra("train"):
    import torch
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.modeling_utils import PreTrainedModel

BLOCK = 128
"""Positions a block, FlexAttention's own; rows for it are padded to whole ones."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key) -> whether the query sees the key."""


def uses_blocks(model: PreTrainedModel) -> bool:
    """Say whether the model computes shared rows with FlexAttention rather than with an explicit mask."""
    return model.device.type == "cuda" and model._supports_flex_attn


def additive_mask(seen_until_B_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [B, 1, T, T]: 0 where a query (third axis) sees a key (fourth), minus infinity elsewhere.

    It is made once for all layers; of a mask of booleans each layer would make, and keep, its own.
    """
    place = torch.arange(seen_until_B_T.shape[1], device=seen_until_B_T.device)
    query, key_end = place[:, None], seen_until_B_T[:, None, None, :]
    hidden = (place > query) | (query >= key_end)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def mask_mod(seen_until_B_T: Tensor) -> MaskMod:
    """Return the same for FlexAttention, place by place."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < seen_until_B_T[row, key])

    return sees


def block_mask(seen_until_B_T: Tensor) -> BlockMask:
    """Return the same in blocks: which to leave out, which to compute whole, which to ask `mask_mod` about.

    Unlike FlexAttention's own builder it never looks at the T * T pairs.

    Args:
        seen_until_B_T: T is a multiple of `BLOCK`.
    """
    by_block = seen_until_B_T.view(len(seen_until_B_T), -1, BLOCK)
    latest_B_1_K, earliest_B_1_K = by_block.amax(-1)[:, None, :], by_block.amin(-1)[:, None, :]
    number = torch.arange(by_block.shape[1], device=seen_until_B_T.device)
    query = number[:, None]  # a block of queries begins at query * BLOCK
    before = number < query
    whole = before & (earliest_B_1_K >= (query + 1) * BLOCK)
    some = (before & (latest_B_1_K > query * BLOCK) & ~whole) | (number == query)
    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod(seen_until_B_T)
    )


def _listed(chosen_B_Q_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block of queries how many blocks of keys are chosen, and their numbers, those first."""
    chosen = chosen_B_Q_K.unsqueeze(1).int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(stable=True, dim=-1, descending=True).int()


@contextmanager
def flex_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make a model compute with FlexAttention inside the block."""
    config = model.config
    usual = config._attn_implementation
    config._attn_implementation = "flex_attention"
    try:
        yield
    finally:
        config._attn_implementation = usual
