"""Log-probabilities as Leyden means them everywhere: log-softmax(logits / temperature) of the sampled token.

Taken before top-k, top-p, min-p, penalties, bias and masks. Engines record it when they sample, learners recompute it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

from leyden.extras import extra

with extra("train"):
    import torch
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.modeling_utils import PreTrainedModel

    from leyden_plugins.torch_models.tree_masks import additive_mask, block_mask, flex_attention, uses_blocks


def token_logprobs(logits_N_V: Tensor, token_ids_N: Tensor, temperature_N: Tensor | float = 1.0) -> Tensor:
    """Return log-softmax(logits / temperature) of one token a row, in at least float32.

    Args:
        logits_N_V: N: tokens, V: vocabulary.
        temperature_N: above 0; one for all or one a token.
    """
    if isinstance(temperature_N, Tensor):
        temperature_N = temperature_N.unsqueeze(-1)
    wide = logits_N_V if logits_N_V.dtype == torch.float64 else logits_N_V.float()
    return -nn.functional.cross_entropy(wide / temperature_N, token_ids_N, reduction="none")


def logits_at(
    model: PreTrainedModel,
    input_ids_B_T: Tensor,
    index_N: Tensor,
    *,
    position_ids_B_T: Tensor | None = None,
    seen_until_B_T: Tensor | None = None,
) -> Tensor:
    """Return the next-token logits at chosen places of a batch; the full [B, T, V] logits never exist.

    Args:
        index_N: places in the flattened batch, b * T + t.
        position_ids_B_T: how many tokens stand before each on its own path; `None`: its place in the row.
        seen_until_B_T: the token at place k is seen from the places k to seen_until - 1; `None` is causal, which is
            right for rows of one path padded on the right.
    """
    hidden_N_H = hidden_at(
        model, input_ids_B_T, index_N, position_ids_B_T=position_ids_B_T, seen_until_B_T=seen_until_B_T
    )
    return logits_of(model, hidden_N_H)


def logits_of(model: PreTrainedModel, hidden_N_H: Tensor) -> Tensor:
    """Return what the output head makes of last hidden states."""
    head = cast(nn.Module, model.get_output_embeddings())  # type: ignore[no-untyped-call]  # untyped upstream
    return cast(Tensor, head(hidden_N_H))


def hidden_at(
    model: PreTrainedModel,
    input_ids_B_T: Tensor,
    index_N: Tensor,
    *,
    position_ids_B_T: Tensor | None = None,
    seen_until_B_T: Tensor | None = None,
) -> Tensor:
    """Return the last hidden states at chosen places of a batch; the arguments are those of `logits_at`."""
    mask: Tensor | BlockMask | None = None
    attention: AbstractContextManager[None] = nullcontext()
    if seen_until_B_T is not None and uses_blocks(model):
        mask, attention = block_mask(seen_until_B_T), flex_attention(model)
    elif seen_until_B_T is not None:
        mask = additive_mask(seen_until_B_T, model.dtype)
    with attention:
        output = model.base_model(
            input_ids=input_ids_B_T, attention_mask=mask, position_ids=position_ids_B_T, use_cache=False
        )
    return cast(Tensor, output.last_hidden_state).flatten(0, 1)[index_N]
