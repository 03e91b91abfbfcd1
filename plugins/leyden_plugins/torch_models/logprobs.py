"""Log-probabilities as Leyden means them everywhere: log-softmax(logits / temperature) of the sampled token.

Taken before top-k, top-p, min-p, penalties, bias and masks. Engines record it when they sample, learners recompute it.
"""

from __future__ import annotations

from typing import cast

from leyden.extras import extra

with extra("train"):
    import torch
    from torch import Tensor, nn
    from transformers.modeling_utils import PreTrainedModel


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
    visible_B_1_T_T: Tensor | None = None,
) -> Tensor:
    """Return the next-token logits at chosen places of a batch; the full [B, T, V] logits never exist.

    Args:
        index_N: places in the flattened batch, b * T + t.
        visible_B_1_T_T: True where a query (third axis) may look at a key (fourth); `None` is causal, which is
            right for rows padded on the right.
    """
    output = model.base_model(
        input_ids=input_ids_B_T,
        attention_mask=visible_B_1_T_T,
        position_ids=position_ids_B_T,
        use_cache=False,
    )
    hidden_N_H = cast(Tensor, output.last_hidden_state).flatten(0, 1)[index_N]
    head = cast(nn.Module, model.get_output_embeddings())  # type: ignore[no-untyped-call]  # untyped upstream
    return cast(Tensor, head(hidden_N_H))
