"""Float32 weights behind those that a model computes with in bfloat16.

One idea: a bfloat16 weight near 0.1 can only change in steps of 0.0005, so most updates of a small learning rate would
round to nothing. Gradients add up in float32, AdamW steps float32 masters, and the model gets them rounded anew.
One trap: a gradient leaves the model's parameter as soon as it is complete, so that at no time all of them stand there
in bfloat16 too; look for gradients at the masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


def masters_of(computed: Mapping[str, nn.Parameter], exact: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return what the optimizer is to step: a float32 parameter itself, for any other a master that gets its gradient.

    Args:
        computed: what the model computes with.
        exact: the same weights as they were before rounding; needed for those that are not float32.
    """
    masters = {}
    for name, parameter in computed.items():
        masters[name] = parameter
        if parameter.dtype != torch.float32:
            masters[name] = nn.Parameter(exact[name].detach().to(parameter.device, torch.float32, copy=True))
            hook = partial(_hand_on, masters[name])
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # untyped upstream
    return masters


@torch.no_grad()
def refresh(computed: Mapping[str, nn.Parameter], masters: Mapping[str, nn.Parameter]) -> None:
    """Round the masters into what the model computes with."""
    for name, parameter in computed.items():
        if masters[name] is not parameter:
            parameter.copy_(masters[name])


def _hand_on(master: nn.Parameter, parameter: Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None  # it has just been made
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)
    parameter.grad = None
