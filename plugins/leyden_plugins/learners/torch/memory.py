"""The memory that training takes, planned from a model's configuration and the policies before anything is loaded.

One idea: weights, gradients and optimizer are counted exactly; activations and logits are those of the largest
micro-batch, by what a decoder layer keeps for its backward pass.
One trap: that formula is of the Llama family (Qwen, Mistral and the like; attention whose scores are never stored). For
other layers it is an estimate, and nothing counts what an allocator wastes, so only what fails without any activations
is refused.

Letters: P parameters, H hidden size, A heads times head size, K key-value heads times head size, I inner size of the
MLP, e bytes of a value.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch.batching import MASK_BYTES
from leyden_plugins.learners.torch.head import BLOCKS_AT_ONCE, block_elements, is_plain
from leyden_plugins.torch_models.adapters import is_linear, last_name, sizes

GIB = 2**30
SHARE = 0.9
"""Of free memory that a plan may fill; the rest is for fragments and the kernels' own."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a learner decides how much memory it takes."""

    dtype: str
    positions: int
    """Of the largest micro-batch."""
    device: str
    masks: bool
    """Rows may hold several paths, under explicit masks."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes."""

    weights: int
    """That models compute with: a copy a policy with full weights, one for all adapters, and these."""
    masters: int
    """Float32 behind weights in bfloat16."""
    optimizer: int
    """AdamW's two moments, in float32."""
    gradients: int
    """In float32, of the policy that has most; policies are updated one after the other."""
    activations: int
    """Kept from the forward pass, all layers."""
    recomputed: int
    """The same when each layer keeps its input alone, and is computed again one by one."""
    working: int
    """While a layer's backward pass runs: gradients of half of what it kept (the rest is gone by then), and those of
    the largest weight before they are added up."""
    logits: int

    @property
    def kept(self) -> int:
        """What is there throughout an update, whatever the batch."""
        return self.weights + self.masters + self.optimizer + self.gradients

    def total(self, *, recompute: bool) -> int:
        """Return the most there is at once."""
        return self.kept + (self.recomputed if recompute else self.activations) + max(self.working, self.logits)


def plan_of(model: PreTrainedModel, policies: Sequence[Policy], settings: Settings) -> Plan:
    """Return what training these policies takes.

    Args:
        model: of the right shapes; values are not looked at.
        policies: trainable ones.
        settings: the learner's.
    """
    size = 4 if settings.dtype == "float32" else 2
    parameters = [one.numel() for one in model.parameters()]
    whole, full = sum(parameters), [policy for policy in policies if policy.lora is None]
    factors = [_factors(model, policy.lora) for policy in policies if policy.lora is not None]
    trained = whole * len(full) + sum(factors)
    layers = [_layer_bytes(model, size, settings, lora=policy.lora) for policy in policies]
    count = int(model.config.get_text_config().num_hidden_layers)
    inputs = count * size * model.config.get_text_config().hidden_size
    largest = max(layers, default=0)
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return Plan(
        weights=size * (whole * (len(full) + bool(factors)) + sum(factors)),
        masters=0 if size == 4 else 4 * trained,
        optimizer=8 * trained,
        gradients=4 * max([whole] * bool(full) + factors, default=0),
        activations=settings.positions * count * largest + _mask_bytes(settings, size),
        recomputed=settings.positions * (inputs + largest) + _mask_bytes(settings, size),
        working=settings.positions * largest // 2 + (size * max(parameters) * (2 if is_tied else 1) if full else 0),
        logits=_logits_bytes(model, settings, size) if policies else 0,
    )


def device_memory(device: str) -> tuple[int, int] | None:
    """Return the bytes that are free now, and all; `None` where the system does not say."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):  # a system without these names
        return None


def _factors(model: PreTrainedModel, lora: LoRA) -> int:
    """Return how many values an adapter has."""
    targets = set(lora.targets)
    chosen = [one for name, one in model.base_model.named_modules() if last_name(name) in targets and is_linear(one)]
    return sum(lora.rank * sum(sizes(one)) for one in chosen)


def _layer_bytes(model: PreTrainedModel, size: int, settings: Settings, *, lora: LoRA | None) -> int:
    """Return what one layer keeps of one position.

    A norm computes in float32 and keeps its input so (4 H), its output (e H) and, to train its own scale, what it
    scales (e H). Attention keeps queries, keys, values and output (e (2 A + 2 K)), and one number a head; keys and
    values are repeated for all heads under an explicit mask. The MLP keeps gate, its activation, up, and their product
    (4 e I). An adapter keeps the output of A in each layer it targets.
    """
    config = model.config.get_text_config()
    names = {last_name(name) for name, _ in model.base_model.named_modules()}
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    head_size = getattr(config, "head_dim", None) or hidden // heads
    attended = heads * head_size
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_size
    experts = getattr(config, "num_experts_per_tok", None)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts:
        inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
    norm = 4 + (size if lora is None else 0)
    of_norms = 2 * (norm + size) * hidden + (norm * (attended + keys) if "q_norm" in names else 0)
    of_attention = size * (2 * attended + 2 * (attended if settings.masks else keys)) + 4 * heads
    of_adapter = 0 if lora is None else size * lora.rank * len(names & set(lora.targets))
    return int(of_norms + of_attention + 4 * size * inner + of_adapter)


def _mask_bytes(settings: Settings, size: int) -> int:
    return min(MASK_BYTES, size * settings.positions**2) if settings.masks else 0


def _logits_bytes(model: PreTrainedModel, settings: Settings, size: int) -> int:
    """Return what the head's logits take, forward and backward, if every position is trained."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # untyped upstream
    elements = settings.positions * int(model.config.get_text_config().vocab_size)
    if isinstance(head, nn.Module) and is_plain(head):
        elements = min(elements, block_elements(torch.device(settings.device)))
    return elements * (4 * BLOCKS_AT_ONCE + size)
