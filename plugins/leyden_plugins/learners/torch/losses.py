"""The losses a learner knows by name, each a sum over tokens.

A token's weight holds every normalisation already, so losses of micro-batches only add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leyden.errors import ConfigurationError
from leyden.interfaces import Loss


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The trained tokens of a micro-batch, one an element."""

    logprobs: Tensor
    """Under the weights as they are now; carries the gradient."""
    sampled_logprobs: Tensor
    """As recorded when sampled."""
    advantages: Tensor
    weights: Tensor


def policy_gradient_clip(tokens: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """Sum -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r the ratio (PPO, Schulman et al. 2017, eq. 7)."""
    ratio = (tokens.logprobs - tokens.sampled_logprobs).exp()
    gain = torch.minimum(ratio * tokens.advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * tokens.advantages)
    return -(tokens.weights * gain).sum()


def cross_entropy(tokens: Tokens) -> Tensor:
    """Sum -w log p."""
    return -(tokens.weights * tokens.logprobs).sum()


LOSSES: dict[str, tuple[Callable[..., Tensor], frozenset[str]]] = {
    "policy_gradient_clip": (policy_gradient_clip, frozenset({"clip_low", "clip_high"})),
    "cross_entropy": (cross_entropy, frozenset()),
}
"""Name -> the function and the options it must be given."""


def loss_function(loss: Loss) -> Callable[[Tokens], Tensor]:
    """Return the named loss with its options filled in.

    Raises:
        ConfigurationError: an unknown name, or options that are not exactly the loss's own.
    """
    if loss.name not in LOSSES:
        raise ConfigurationError(f"loss {loss.name!r} is unknown to this learner; it has {sorted(LOSSES)!r}")
    function, options = LOSSES[loss.name]
    if set(loss.options) != options:
        raise ConfigurationError(
            f"loss {loss.name!r} takes exactly the options {sorted(options)!r}, got {sorted(loss.options)!r}"
        )
    return lambda tokens: function(tokens, **loss.options)


class Statistics:
    """Sums what `forward_backward` reports over micro-batches."""

    def __init__(self, options: Mapping[str, float]) -> None:
        self._low = 1 - options.get("clip_low", float("inf"))
        self._high = 1 + options.get("clip_high", float("inf"))
        self._loss = 0.0
        self._ratio_max = 0.0
        self._tokens = 0
        self._places = 0
        self._padding = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    @torch.no_grad()
    def add(self, tokens: Tokens, loss: Tensor, *, places: int, padding: int) -> None:
        """Count a micro-batch of `places` computed positions, `padding` of them empty."""
        log_ratio = (tokens.logprobs - tokens.sampled_logprobs).double()
        ratio = log_ratio.exp()
        clipped = torch.where(tokens.advantages > 0, ratio > self._high, ratio < self._low)
        parts = (ratio, clipped.double(), -tokens.logprobs.double(), ratio - 1 - log_ratio)
        self._sums += torch.stack([part.sum() for part in parts]).cpu()
        self._ratio_max = max(self._ratio_max, float(ratio.max()))
        self._loss += float(loss)
        self._tokens += len(ratio)
        self._places += places
        self._padding += padding

    def metrics(self) -> dict[str, float]:
        """Return the metrics of one `forward_backward`.

        Sums: `loss/loss`, `loss/tokens` (trained), `loss/positions` (computed, padding included). Averages over
        trained tokens: `loss/ratio_mean`, `loss/clip_fraction` (tokens whose gradient the clip removes),
        `loss/entropy` (mean -log p of the sampled tokens), `loss/kl` (to the weights that sampled; the k3
        estimator, Schulman 2020). `loss/ratio_max` is a maximum, `loss/padding_fraction` a share of positions.
        """
        ratio, clipped, surprise, kl = (self._sums / max(self._tokens, 1)).tolist()
        return {
            "loss/loss": self._loss,
            "loss/tokens": float(self._tokens),
            "loss/positions": float(self._places),
            "loss/ratio_mean": ratio,
            "loss/ratio_max": self._ratio_max,
            "loss/clip_fraction": clipped,
            "loss/entropy": surprise,
            "loss/kl": kl,
            "loss/padding_fraction": self._padding / max(self._places, 1),
        }
