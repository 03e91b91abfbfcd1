"""What the output head says of answers: log-probabilities and entropies, without the whole logits where they are many.

One idea: the vocabulary is cut into blocks. Going forward, a block's logits only feed running sums and are dropped;
going backward they are computed again. Cutting the vocabulary rather than the tokens gives each row of the head's
gradient from one product over all tokens, so that nothing of the head's size is ever added up.
One trap: the plain way is quicker (it multiplies once less), so few logits take it. A head that is not exactly a linear
layer, such as one with an adapter, always does. One in bfloat16 never does: it would round its logits, those between
16 and 32 to multiples of 0.125, more than a ratio near 1 moves (MiniMax-M1, 2025, gave its head float32 for this).

Axes: N tokens, H hidden size, V vocabulary, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from leyden_plugins.learners.torch.entropies import token_entropies
from leyden_plugins.torch_models.logprobs import logits_of, token_logprobs

BLOCK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""How many logits there are at once, by device; 64 and 256 MiB in float32."""

BLOCKS_AT_ONCE = 4
"""Tensors of a block's size, in float32, that the backward pass holds at once."""

WIDENS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch can multiply bfloat16 into float32 on a GPU; from 2.8 on."""

ALIGNMENT = 64
"""Columns of a block are a multiple of it, for the matrix units of GPUs."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One element a token; both carry the gradient into hidden states and head."""

    logprobs: Tensor
    """log-softmax(logits / temperature) of the token."""
    entropies: Tensor | None
    """In nats, of the distribution the token was drawn from; `None` where not asked for."""


def answer_scores(
    model: PreTrainedModel,
    hidden_N_H: Tensor,
    token_ids_N: Tensor,
    temperature_N: Tensor,
    *,
    entropies: bool = False,
    elements: int | None = None,
) -> Scores:
    """Return what the model's head makes of hidden states, in at least float32.

    Args:
        model: whose head it is.
        hidden_N_H: the last hidden state before each token.
        token_ids_N: the tokens.
        temperature_N: above 0.
        entropies: also return them.
        elements: how many logits there may be at once; `None` is that of the device, `BLOCK_ELEMENTS`.
    """
    most = block_elements(hidden_N_H.device) if elements is None else elements
    head = cast(nn.Module, model.get_output_embeddings())  # type: ignore[no-untyped-call]  # untyped upstream
    keeps_precision = hidden_N_H.dtype != torch.bfloat16
    if not is_plain(head) or (keeps_precision and hidden_N_H.shape[0] * head.weight.shape[0] <= most):
        logits_N_V = logits_of(model, hidden_N_H)
        return Scores(
            logprobs=token_logprobs(logits_N_V, token_ids_N, temperature_N),
            entropies=token_entropies(logits_N_V, temperature_N) if entropies else None,
        )
    columns = max(1, most // max(1, hidden_N_H.shape[0]))
    columns = columns // ALIGNMENT * ALIGNMENT or columns
    found = _Blockwise.apply(  # type: ignore[no-untyped-call]  # untyped upstream
        hidden_N_H, head.weight, head.bias, token_ids_N, temperature_N, columns, entropies
    )
    return Scores(logprobs=found[0], entropies=found[1] if entropies else None)


def is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a head is a product with its weight, plus its bias, and nothing else."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def block_elements(device: torch.device) -> int:
    """Return how many logits there may be at once."""
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"])


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden_N_H: Tensor,
        weight_V_H: Tensor,
        bias_V: Tensor | None,
        token_ids_N: Tensor,
        temperature_N: Tensor,
        columns: int,
        entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        """Keep, a token, the largest z, the sum of exp(z - largest), and that of exp(z - largest) (z - largest)."""
        wide = torch.promote_types(hidden_N_H.dtype, torch.float32)
        largest_N = hidden_N_H.new_full((hidden_N_H.shape[0],), torch.finfo(wide).min, dtype=wide)
        total_N, product_N, own_N = (torch.zeros_like(largest_N) for _ in range(3))
        for block in _blocks(weight_V_H, columns):
            z_N_C = _scaled_logits(hidden_N_H, weight_V_H, bias_V, temperature_N, block)
            is_here_N, column_N = _place(token_ids_N, block)
            own_N = torch.where(is_here_N, z_N_C.gather(-1, column_N)[:, 0], own_N)
            higher_N = torch.maximum(largest_N, z_N_C.amax(-1))
            moved_N = largest_N - higher_N
            shrink_N = moved_N.exp()
            z_N_C -= higher_N.unsqueeze(-1)
            exponential_N_C = z_N_C.exp()
            if entropies:
                product_N = shrink_N * (product_N + total_N * moved_N) + z_N_C.mul_(exponential_N_C).sum(-1)
            total_N = shrink_N * total_N + exponential_N_C.sum(-1)
            largest_N = higher_N
        logprob_N = own_N - largest_N - total_N.log()
        entropy_N = total_N.log() - product_N / total_N
        context.columns, context.entropies = columns, entropies
        context.save_for_backward(
            hidden_N_H, weight_V_H, bias_V, token_ids_N, temperature_N, largest_N + total_N.log(), entropy_N
        )
        if not entropies:
            context.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, by_logprob_N: Tensor, by_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        """With z = logits / T: d log p / dz_j = [j is the token] - p_j, and dH / dz_j = -p_j (log p_j + H)."""
        hidden_N_H, weight_V_H, bias_V, token_ids_N, temperature_N, normaliser_N, entropy_N = context.saved_tensors
        needs_hidden, needs_weight, needs_bias = context.needs_input_grad[:3]
        by_hidden_N_H = torch.zeros_like(hidden_N_H, dtype=normaliser_N.dtype) if needs_hidden else None
        by_weight_V_H = torch.empty_like(weight_V_H) if needs_weight else None
        by_bias_V = torch.empty_like(bias_V) if needs_bias else None
        for block in _blocks(weight_V_H, context.columns):
            z_N_C = _scaled_logits(hidden_N_H, weight_V_H, bias_V, temperature_N, block)
            z_N_C -= normaliser_N.unsqueeze(-1)
            by_z_N_C = z_N_C.exp()
            if context.entropies:
                z_N_C.add_(entropy_N.unsqueeze(-1)).mul_(by_entropy_N.unsqueeze(-1)).add_(by_logprob_N.unsqueeze(-1))
                by_z_N_C *= z_N_C.neg_()
            else:
                by_z_N_C *= -by_logprob_N.unsqueeze(-1)
            is_here_N, column_N = _place(token_ids_N, block)
            by_z_N_C.scatter_add_(-1, column_N, (by_logprob_N * is_here_N).unsqueeze(-1))
            by_z_N_C /= temperature_N.unsqueeze(-1)
            by_logits_N_C = by_z_N_C.to(weight_V_H.dtype)
            if by_hidden_N_H is not None:
                by_hidden_N_H += by_logits_N_C @ weight_V_H[block]
            if by_weight_V_H is not None:
                by_weight_V_H[block] = by_logits_N_C.T @ hidden_N_H
            if by_bias_V is not None:
                by_bias_V[block] = by_z_N_C.sum(0).to(by_bias_V.dtype)
        by_hidden = None if by_hidden_N_H is None else by_hidden_N_H.to(hidden_N_H.dtype)
        return by_hidden, by_weight_V_H, by_bias_V, None, None, None, None


def _blocks(weight_V_H: Tensor, columns: int) -> Iterator[slice]:
    size = weight_V_H.shape[0]
    return (slice(first, min(first + columns, size)) for first in range(0, size, columns))


def _scaled_logits(
    hidden_N_H: Tensor, weight_V_H: Tensor, bias_V: Tensor | None, temperature_N: Tensor, block: slice
) -> Tensor:
    """Return logits / temperature of a block in a new tensor, in at least float32 and never rounded to less."""
    wide = torch.promote_types(hidden_N_H.dtype, torch.float32)
    weight_C_H = weight_V_H[block]
    if wide == hidden_N_H.dtype:
        logits_N_C = hidden_N_H @ weight_C_H.T
    elif hidden_N_H.device.type == "cuda":
        logits_N_C = torch.mm(hidden_N_H, weight_C_H.T, out_dtype=wide) if WIDENS else hidden_N_H @ weight_C_H.T
    else:
        logits_N_C = hidden_N_H.to(wide) @ weight_C_H.to(wide).T
    logits_N_C = logits_N_C.to(wide)
    if bias_V is not None:
        logits_N_C += bias_V[block]
    return logits_N_C.div_(temperature_N.unsqueeze(-1))


def _place(token_ids_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return which tokens are in a block, and their columns [N, 1] there; 0 for the others."""
    is_here_N = (token_ids_N >= block.start) & (token_ids_N < block.stop)
    return is_here_N, ((token_ids_N - block.start) * is_here_N).unsqueeze(-1)
