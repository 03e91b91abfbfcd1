"""What shows or keeps a run's progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class MetricSink(Protocol):
    """Shows or keeps a run's progress. What it raises is logged, never passed on."""

    def run_started(self, info: Mapping[str, object]) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def progress(self, info: Mapping[str, object]) -> None:
        """Called often during a step: rollouts done, of how many, tokens/s."""
        ...

    def notice(self, text: str) -> None:
        """Called with a line that the user should read: the preflight, a resume, a warning."""
        ...

    def run_finished(self, summary: Mapping[str, object]) -> None: ...
