"""A policy being trained: its own parameters, their optimizer, and its value head.

One idea: a policy with full weights and one with an adapter differ in where their parameters lie and how they are
stored, in nothing else.
One trap: parameters must be read and run inside `speaking()`, which makes a shared model that policy's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from leyden.interfaces import Weights
from leyden.layouts import Layout
from leyden.roles import Policy
from leyden_plugins.learners.torch.masters import masters_of, refresh
from leyden_plugins.learners.torch.value_head import LEARNING_RATE_FACTOR, new_value_head
from leyden_plugins.torch_models.loading import canonical_tensors, load_tokenizer, quiet, read_tensors


class Trainee(ABC):
    """What both kinds have in common.

    Args:
        policy: whose weights these are.
        model: what computes.
        computed: what is trained of it, under the names in which it is published.
        exact: the same weights before they were rounded; needed where `computed` is not float32.
        layout: of its micro-batches.
    """

    def __init__(
        self,
        policy: Policy,
        model: PreTrainedModel,
        *,
        computed: Mapping[str, nn.Parameter],
        exact: Mapping[str, Tensor],
        layout: Layout,
    ) -> None:
        self.policy = policy
        self.model = model
        self.computed = computed
        self.parameters: Mapping[str, nn.Parameter] = masters_of(computed, exact)
        """What the optimizer steps, in float32: `computed` itself or, where that is rounded, what stands behind it."""
        self.layout = layout
        self.head: nn.Linear | None = None
        """Made by `value_head` when it is first asked for."""
        self.optimizer = _optimizer(policy, list(self.parameters.values()))

    @abstractmethod
    def speaking(self) -> AbstractContextManager[object]:
        """Make `model` compute with this policy's weights inside the block."""

    def nudged(self) -> AbstractContextManager[object]:
        """Make the policy's weights matter inside the block, where new ones do not; see `preflight`."""
        return nullcontext()

    @abstractmethod
    def weights(self) -> Weights:
        """Return the live tensors; the caller copies what it keeps."""

    @abstractmethod
    def write(self, folder: Path, *, exact: bool = False) -> None:
        """Write the policy, without head and optimizer: what is published or, `exact`, the float32 behind it."""

    @abstractmethod
    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """Return what `write` wrote, under the names of `parameters`.

        Raises:
            ConfigurationError: it is another policy's: names, shapes or settings differ.
        """

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these weights in place of its own."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        refresh(self.computed, self.parameters)

    def step(self) -> None:
        """Step the optimizer, clear the gradient, and compute with the result from now on."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        refresh(self.computed, self.parameters)

    def trained(self) -> Iterator[nn.Parameter]:
        """Yield everything the optimizer steps."""
        yield from self.parameters.values()
        if self.head is not None:
            yield from self.head.parameters()

    def value_head(self) -> nn.Linear:
        """Return the head; a new one gets its own group in the optimizer."""
        if self.head is None:
            self.head = new_value_head(self.model)
            self.optimizer.add_param_group({"params": list(self.head.parameters()), "weight_decay": 0.0})
        return self.head

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set it for the next step; the head's is `LEARNING_RATE_FACTOR` times as high."""
        heads = [] if self.head is None else list(self.head.parameters())
        for group in self.optimizer.param_groups:
            is_head = any(one is parameter for one in heads for parameter in group["params"])
            group["lr"] = learning_rate * (LEARNING_RATE_FACTOR if is_head else 1.0)

    def forget(self) -> None:
        """Drop optimizer state, waiting gradients and the head."""
        self.head = None
        self.optimizer = _optimizer(self.policy, list(self.parameters.values()))
        self.optimizer.zero_grad()


class FullTrainee(Trainee):
    """A policy that trains a full copy of the weights."""

    def __init__(
        self, policy: Policy, model: PreTrainedModel, *, exact: Mapping[str, Tensor], source: str, layout: Layout
    ) -> None:
        super().__init__(policy, model, computed=dict(model.named_parameters()), exact=exact, layout=layout)
        self._source = source

    def speaking(self) -> AbstractContextManager[object]:
        return nullcontext()

    def weights(self) -> Weights:
        """Return what the model computes with: it is that which an engine must sample from."""
        return Weights(tensors={name: parameter.detach() for name, parameter in self.computed.items()})

    def write(self, folder: Path, *, exact: bool = False) -> None:
        """Write a Hugging Face folder: weights, config, tokenizer."""
        tensors = {name: one.detach() for name, one in self.parameters.items()} if exact else None
        with quiet():
            self.model.save_pretrained(folder, state_dict=tensors)
        load_tokenizer(self._source).save_pretrained(folder)

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        return canonical_tensors(self.model, read_tensors(folder))


def _optimizer(policy: Policy, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Return fused AdamW; weight decay is for matrices, not for norms and biases."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": policy.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=policy.learning_rate, betas=policy.betas, fused=True)
