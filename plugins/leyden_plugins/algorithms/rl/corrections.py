"""Corrections of samples that are stale, or whose engine computes other log-probabilities than the learner.

One idea: such a sample was drawn from mu, and the update begins at pi_old; w = pi_old / mu, limited, multiplies its
share of the loss, and the loss's own ratio starts at pi_old (the decoupled objective of Hilton et al. 2022 and of
AReaL, Fu et al. 2025). Without that split, a clip around mu would cut what staleness moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from leyden.errors import ConfigurationError
from leyden.interfaces import Transition

LARGEST_EXPONENT = 700.0
"""exp of more is no float."""


@dataclass(frozen=True, kw_only=True)
class ImportanceSampling:
    """Weigh tokens by w = pi_old / mu, truncated or masked.

    Raises:
        ConfigurationError: a value outside its range.
    """

    level: Literal["token", "sequence"] = "token"
    """`token`: each its own w, little variance, biased; `sequence`: the product over a call's tokens, for all of
    them."""
    mode: Literal["truncate", "mask"] = "truncate"
    """`truncate`: w is brought into [floor, cap] (Espeholt et al. 2018, V-trace, section 4.1; Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"); `mask`: tokens whose w is outside are left
    out."""
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence") or self.mode not in ("truncate", "mask"):
            raise ConfigurationError(
                f"ImportanceSampling(level={self.level!r}, mode={self.mode!r}): level is 'token' or 'sequence', mode "
                "'truncate' or 'mask'"
            )
        if not 0 <= self.floor <= 1 <= self.cap:
            raise ConfigurationError(
                f"ImportanceSampling(cap={self.cap!r}, floor={self.floor!r}): an on-policy token has weight 1, which "
                "must lie between floor (at least 0) and cap"
            )

    def weights(self, old_logprobs: Sequence[float], sampled_logprobs: Sequence[float]) -> list[float]:
        """Return one weight a token of one call, from log pi_old and log mu."""
        log_ratios = [old - sampled for old, sampled in zip(old_logprobs, sampled_logprobs, strict=True)]
        if self.level == "sequence":
            log_ratios = [math.fsum(log_ratios)] * len(log_ratios)
        ratios = [math.exp(min(one, LARGEST_EXPONENT)) for one in log_ratios]
        if self.mode == "truncate":
            return [min(max(ratio, self.floor), self.cap) for ratio in ratios]
        return [ratio if self.floor <= ratio <= self.cap else 0.0 for ratio in ratios]

    def correct(self, transition: Transition, old_logprobs: Sequence[float]) -> Transition:
        """Return the transition with its corrections and the log-probabilities its ratio starts from."""
        return replace(
            transition,
            old_logprobs=old_logprobs,
            corrections=self.weights(old_logprobs, transition.logprobs),
        )
