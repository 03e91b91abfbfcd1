"""Activation checkpointing: of each layer only its input is kept, and its inside is computed again going backward.

One idea: Hugging Face's own switch works in training mode only, where dropout acts too, so the layers are wrapped here.
One trap: what is computed again must run as it ran first. Adapters are those that speak now, which is why the backward
pass stands inside `speaking()`; the kind of attention is set again for it.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", with one segment a layer: about a third more compute.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from leyden_plugins.torch_models.tree_masks import flex_attention


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that can be computed again, outermost ones only."""
    found: dict[str, nn.Module] = {}
    for name, module in model.base_model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not is_inside:
            found[name] = module
    return list(found.values())


def recompute_layers(model: PreTrainedModel) -> None:
    """Make every layer keep only its input."""
    for layer in layers_of(model):
        layer.forward = partial(_recomputed, model, layer.forward)


def _recomputed(model: PreTrainedModel, forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    uses_blocks = any(isinstance(value, BlockMask) for value in (*args, *kwargs.values()))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), flex_attention(model) if uses_blocks else nullcontext()

    # Without dropout there is no random state to restore.
    return checkpoint(
        partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
