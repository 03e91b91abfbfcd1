"""Tell every sink and observer how a run goes. What they raise is logged, never passed on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from leyden.interfaces import MetricSink
from leyden.metrics import CollapseWatch
from leyden.plugins import Plugins
from leyden.training.parts import Parts

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.1
"""Least time between two progress calls."""


class Sinks:
    """The run's sinks, named or given."""

    def __init__(self, chosen: Sequence[str | MetricSink], plugins: Plugins) -> None:
        self._sinks: list[MetricSink] = [plugins.get("sink", s)() if isinstance(s, str) else s for s in chosen]
        self._observers = plugins.hook
        self._last_progress = 0.0
        self._watch = CollapseWatch()

    def run_started(self, info: Mapping[str, object]) -> None:
        self._each("run_started", info)

    def notice(self, text: str) -> None:
        self._each("notice", text)

    def progress(self, parts: Parts, info: Mapping[str, object]) -> None:
        now = time.monotonic()
        if now - self._last_progress < PROGRESS_SECONDS and info["done"] != info["of"]:
            return
        self._last_progress = now
        self._each("progress", {**info, "tokens_per_second": parts.meter.tokens_per_second()})

    def step_finished(self, parts: Parts, step: int, metrics: Mapping[str, float]) -> None:
        tally = parts.runner.tally
        found = {
            **metrics,
            **parts.meter.step_fields(),
            "rollouts/total": float(tally.rollouts),
            "rollouts/failed": float(sum(tally.failures.values())),
            **{f"rollouts/failed/{kind}": float(count) for kind, count in sorted(tally.failures.items())},
            "rollouts/retried": float(tally.retries),
        }
        self._each("step_finished", step, found)
        self._observers.step_finished(step=step, metrics=found)
        for line in self._watch.step_finished(step, found):
            self.notice(line)

    def run_finished(self, summary: Mapping[str, object]) -> None:
        self._each("run_finished", summary)

    def _each(self, method: str, *arguments: object) -> None:
        for sink in self._sinks:
            try:
                getattr(sink, method)(*arguments)
            except Exception:
                log.exception("sink %s failed in %s; the run goes on", type(sink).__name__, method)
