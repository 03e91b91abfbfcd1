"""What the suite has measured: the differences of log-probabilities by kind of call, pushes, restarts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

CLOSE = 1e-4
"""Nats: the most that vLLM and the learner may differ in float32."""


@dataclass
class Figures:
    """Collected over all tests of a session."""

    differences: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    pushes: int = 0
    restarts: int = 0
    servers: int = 0
    started: float = field(default_factory=time.monotonic)

    def compare(self, kind: str, recorded: Sequence[float], expected: Sequence[float]) -> None:
        """Note how far log-probabilities are from what they should be, and fail where that is too far."""
        assert len(recorded) == len(expected) > 0, kind
        differences = [abs(one - other) for one, other in zip(recorded, expected, strict=True)]
        assert max(differences) < CLOSE, (kind, max(differences))
        self.differences[kind] += differences

    def table(self) -> list[str]:
        """Return lines to print."""
        lines = [f"{'log-probabilities against':<44}{'tokens':>8}{'largest':>12}{'mean':>12}"]
        every = [difference for found in self.differences.values() for difference in found]
        for kind, found in [*sorted(self.differences.items()), ("all", every)]:
            if found:
                lines.append(f"{kind:<44}{len(found):>8}{max(found):>12.1e}{sum(found) / len(found):>12.1e}")
        seconds = time.monotonic() - self.started
        lines.append(f"{self.servers} servers started, {self.pushes} pushes, {self.restarts} restarts, {seconds:.0f} s")
        return lines
