"""How long a run is, how much a step takes, how fast it learns, and where a step's seconds went."""

from __future__ import annotations

from dataclasses import dataclass, field

from leyden.roles import Policy


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, how much, how often."""

    total_steps: int
    tasks_per_step: int
    evaluate_every: int | None
    """Held-out evaluation every so many steps; `None`: only before and after."""
    checkpoint_every: int
    keep_checkpoints: int
    seed: int
    mask_overlong: bool = False
    max_staleness: int = 0
    """Updates of its policy that a sample may be behind when it is trained; 0 samples between updates."""


@dataclass
class Clock:
    """Seconds by phase of the step under way."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def learning_rate(policy: Policy, step: int, total_steps: int) -> float:
    """Return the policy's learning rate at `step`: linear from its start value to its final fraction."""
    progress = (step - 1) / max(1, total_steps - 1)
    return policy.learning_rate * (1 - progress * (1 - policy.final_learning_rate_fraction))
