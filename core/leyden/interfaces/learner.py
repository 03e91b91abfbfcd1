"""What turns samples into gradients and gradients into weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from leyden.interfaces.engine import Weights
from leyden.roles import Policy

KLEstimator = Literal["k1", "k2", "k3"]
"""Schulman 2020, "Approximating KL divergence": -log r, (log r)^2 / 2, r - 1 - log r, with r = p_reference / p."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call as a learner sees it: a prompt, and an answer of T tokens that is trained.

    Every sequence but the prompt has length T; position t holds the values of answer token t *itself* (its
    log-probability given all tokens before it). A sequence-level ratio is taken over one sample.
    """

    prompt_token_ids: Sequence[int]
    """At least one."""
    token_ids: Sequence[int]
    weights: Sequence[float]
    """A token's share of the loss, 1 / (Z * N) of DESIGN's "loss weights before layout", corrections included."""
    advantages: Sequence[float]
    logprobs: Sequence[float]
    """As recorded when sampled."""
    old_logprobs: Sequence[float] | None = None
    """Under the learner's weights when the update began; `None`: the recorded ones."""
    reference_logprobs: Sequence[float] | None = None
    """Under the base weights, for a divergence term; `None`: there is none."""
    returns: Sequence[float] | None = None
    """What the value head should predict before each token; `None`: it is not trained."""
    values: Sequence[float] | None = None
    """What the value head predicted when the update began, for its clip."""
    temperature: float = 1.0
    """Above 0."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A named surrogate and the terms added to it; the learner knows the name, the algorithm chose it."""

    name: str
    options: Mapping[str, float] = field(default_factory=dict)
    """The surrogate's own, such as `clip_low`."""
    kl_coefficient: float = 0.0
    """Times the divergence from the reference, a token; needs `Sample.reference_logprobs`."""
    kl_estimator: KLEstimator = "k3"
    entropy_coefficient: float = 0.0
    """Times the entropy of the next-token distribution, which is rewarded."""
    value_coefficient: float = 0.0
    """Times the value head's squared error; needs `Sample.returns`."""
    value_clip: float | None = None
    """How far a value may move from `Sample.values` (PPO); `None`: any."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Samples and the loss they are trained with; the gradients of an optimizer batch's objectives add up."""

    loss: Loss
    samples: Sequence[Sample]


Batch = Sequence[Objective]
"""What one optimizer step is made from."""


class Learner(Protocol):
    """Turns samples into gradients and gradients into weights, for several policies. Blocking; called off the loop.

    How samples are laid out in rows and cut into micro-batches is the learner's own business: every normalisation
    stands in their weights, so any layout gives the same gradient.
    """

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        """Load the base weights for the trainable policies; refuse options that cannot be honoured.

        Raises:
            ConfigurationError: names the option.
        """
        ...

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        """Add the gradient of the batch's summed losses to the policy's gradients; return metrics."""
        ...

    def logprobs(self, policy: str, samples: Sequence[Sample], *, reference: bool = False) -> Sequence[Sequence[float]]:
        """Return log-softmax(logits / temperature) of every answer token, sample by sample in order; no gradient.

        Args:
            policy: whose weights.
            samples: prompts and answers.
            reference: under the base weights that the policy started from, instead of its own.
        """
        ...

    def values(self, policy: str, samples: Sequence[Sample]) -> Sequence[Sequence[float]]:
        """Return the value head's prediction before every answer token, sample by sample in order; no gradient.

        The head is made, predicting 0, when it is first asked for.
        """
        ...

    def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
        """Clip the gradient, step the optimizer, clear the gradient; return `gradient_norm` and `learning_rate`."""
        ...

    def weights(self, policy: str) -> Weights:
        """Return the current weights, for `Engine.publish`."""
        ...

    def export(self, policy: str, folder: Path) -> None:
        """Write the policy: a Hugging Face folder (weights, config, tokenizer), or a LoRA folder in PEFT's format."""
        ...

    def save(self, folder: Path) -> None:
        """Write every policy's weights, value head, optimizer and RNG state, enough for a bit-equal `load`."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ConfigurationError: the folder's policies differ from the open ones.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class ReleasesMemory(Protocol):
    """A learner that can give back memory which it keeps for later, so that an engine on the same device can use it."""

    def release_memory(self) -> None:
        """Free what is cached; weights and optimizer stay."""
        ...


@runtime_checkable
class Announces(Protocol):
    """A learner that has something to tell the user before the first step, such as the memory it will take."""

    def notes(self) -> Sequence[str]:
        """Return lines; called once it is open."""
        ...
