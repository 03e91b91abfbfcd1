"""A sink of a third party: it keeps what it is told."""

from collections.abc import Mapping


class AcmeSink:
    """Keep the metrics of every step."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def run_started(self, info: Mapping[str, object]) -> None:
        """Do nothing."""

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a copy."""
        self.metrics[step] = dict(metrics)

    def progress(self, info: Mapping[str, object]) -> None:
        """Do nothing."""

    def notice(self, text: str) -> None:
        """Do nothing."""

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Do nothing."""
