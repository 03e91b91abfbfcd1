"""What turns rows into gradients and gradients into weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from leyden.interfaces.engine import Weights
from leyden.roles import Policy


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One row of a batch. Every sequence but `token_ids` is aligned with it and of the same length T.

    Position t holds the values of *token t itself* (its log-probability given tokens before it).
    """

    token_ids: Sequence[int]
    mask: Sequence[bool]
    """True where the token was sampled by the policy and is trained here."""
    weights: Sequence[float]
    """1 / (Z * N) of DESIGN's "loss weights before layout"; 0 where not trained."""
    advantages: Sequence[float]
    logprobs: Sequence[float]
    """As recorded when sampled; 0 where not trained."""
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A named loss with its parameters; the learner knows the name, the algorithm chose it."""

    name: str
    """`policy_gradient_clip` (PPO/GRPO surrogate) or `cross_entropy` (weighted negative log-likelihood)."""
    options: Mapping[str, float] = field(default_factory=dict)


class Learner(Protocol):
    """Turns rows into gradients and gradients into weights, for several policies. Blocking; called off the loop."""

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        """Load the base weights once a trainable policy; refuse options that cannot be honoured.

        Raises:
            ConfigurationError: names the option.
        """
        ...

    def forward_backward(self, policy: str, rows: Sequence[TrainingRow], loss: Loss) -> Mapping[str, float]:
        """Add the gradient of the summed loss over `rows` to the policy's gradients; return summed metrics.

        Rows may be cut into micro-batches in any way: their weights already hold every normalisation.
        """
        ...

    def logprobs(self, policy: str, rows: Sequence[TrainingRow]) -> Sequence[Sequence[float]]:
        """Return log-softmax(logits / temperature) of every masked token, row by row in order; no gradient."""
        ...

    def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
        """Clip the gradient, step the optimizer, clear the gradient; return `gradient_norm` and `learning_rate`."""
        ...

    def weights(self, policy: str) -> Weights:
        """Return the current weights, for `Engine.publish`."""
        ...

    def export(self, policy: str, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (weights, config, tokenizer)."""
        ...

    def save(self, folder: Path) -> None:
        """Write every policy's weights, optimizer and RNG state, enough for a bit-equal `load`."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ConfigurationError: the folder's policies differ from the open ones.
        """
        ...

    def close(self) -> None: ...
