"""The entropy of each token's next-token distribution, with its gradient, in chunks.

One idea: the gradient has a closed form in the logits, so nothing of the vocabulary's size but the logits themselves
is kept between forward and backward.
One trap: it is the entropy of softmax(logits / temperature), the distribution that was sampled from.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""How many logits are widened at once; 64 MiB in float32."""


def token_entropies(logits_N_V: Tensor, temperature_N: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits / temperature), a token, in at least float32."""
    return cast(Tensor, _Entropies.apply(logits_N_V, temperature_N))  # type: ignore[no-untyped-call]  # untyped upstream


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits_N_V: Tensor, temperature_N: Tensor) -> Tensor:
        found = [
            -(logprobs.exp() * logprobs).sum(-1)
            for logprobs in (_logprobs(logits_N_V, temperature_N, rows) for rows in _chunks(logits_N_V))
        ]
        entropy_N = torch.cat(found) if found else logits_N_V.new_zeros(0)
        context.save_for_backward(logits_N_V, temperature_N, entropy_N)
        return entropy_N

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """With z = logits / T: dH / dz_j = -p_j (log p_j + H)."""
        logits_N_V, temperature_N, entropy_N = context.saved_tensors
        scale_N = -gradients[0] / temperature_N
        gradient_N_V = torch.empty_like(logits_N_V)
        for rows in _chunks(logits_N_V):
            logprobs = _logprobs(logits_N_V, temperature_N, rows)
            slope = logprobs.exp() * (logprobs + entropy_N[rows].unsqueeze(-1))
            gradient_N_V[rows] = (slope * scale_N[rows].unsqueeze(-1)).to(logits_N_V.dtype)
        return gradient_N_V, None


def _chunks(logits_N_V: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, logits_N_V.shape[1]))
    return [slice(first, first + step) for first in range(0, logits_N_V.shape[0], step)]


def _logprobs(logits_N_V: Tensor, temperature_N: Tensor, rows: slice) -> Tensor:
    logits = logits_N_V[rows]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature_N[rows].unsqueeze(-1), -1)
