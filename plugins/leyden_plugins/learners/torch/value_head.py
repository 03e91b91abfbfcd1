"""The value head: a linear layer on the last hidden state that predicts the return before each token.

One idea: it begins at 0, so until it has learned something it neither moves the trunk nor favours any state.
One trap: it is no part of the policy's weights: it is saved with checkpoints, never published and never exported.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

LEARNING_RATE_FACTOR = 10.0
"""The head learns this much faster than its policy: it begins from nothing, and critics are commonly given ten times
the actor's rate (verl's defaults are 1e-5 and 1e-6)."""


def new_value_head(model: PreTrainedModel) -> nn.Linear:
    """Return a head of zeros for `model`, in float32 whatever the model's type."""
    embedding = cast(nn.Module, model.get_output_embeddings())  # type: ignore[no-untyped-call]  # untyped upstream
    weight = next(embedding.parameters())
    head = nn.Linear(weight.shape[1], 1, dtype=torch.float32, device=weight.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def predicted_values(head: nn.Linear, hidden_N_H: Tensor) -> Tensor:
    """Return one value a token; its gradient reaches the trunk."""
    return cast(Tensor, head(hidden_N_H.to(head.weight.dtype))).squeeze(-1)
