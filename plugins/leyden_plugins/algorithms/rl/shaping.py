"""What is taken off a call's value before advantages are computed: too much length, and distance from the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leyden.errors import ConfigurationError
from leyden.interfaces import Transition


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """Soft punishment of long answers (DAPO, Yu et al. 2025, equation 13), per call.

    Raises:
        ConfigurationError: a margin that is not within the length.
    """

    longest: int
    """L_max, in tokens: from here on the punishment is -1."""
    margin: int
    """L_cache, in tokens: over so many before `longest` it falls linearly from 0."""

    def __post_init__(self) -> None:
        if not 0 < self.margin <= self.longest:
            raise ConfigurationError(
                f"Overlong(longest={self.longest!r}, margin={self.margin!r}): 0 < margin <= longest, both in tokens"
            )

    def punishment(self, length: int) -> float:
        """Return what is added to the value of a call of `length` answer tokens, in [-1, 0]."""
        return max(-1.0, min(0.0, (self.longest - self.margin - length) / self.margin))


def punish_length(transitions: Sequence[Transition], overlong: Overlong) -> list[Transition]:
    """Return the transitions with the punishment in their values."""
    return [shaped(one, overlong.punishment(len(one.token_ids))) for one in transitions]


def subtract_divergence(
    transitions: Sequence[Transition], reference_logprobs: Sequence[Sequence[float]], coefficient: float
) -> list[Transition]:
    """Take coefficient * sum over a call's tokens of log mu - log pi_ref off its value.

    This is k1 (Schulman 2020), as a reward: its score-function gradient is the divergence's own, which that of k2 or
    k3 as a reward is not (Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL").
    """
    return [
        shaped(one, -coefficient * (math.fsum(one.logprobs) - math.fsum(reference)))
        for one, reference in zip(transitions, reference_logprobs, strict=True)
    ]


def shaped(transition: Transition, amount: float) -> Transition:
    """Add to a call's value, and note that it is this call's own: an estimator over time must not pass it on."""
    return replace(transition, value=transition.value + amount, shaping=transition.shaping + amount)
