"""What a run measures about itself: tokens, calls, CPU seconds, memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from leyden.interfaces import Store
from leyden.spans import Completion, Kind, Record, Span
from leyden.usage import Usage, load_average, usage

WINDOW_SECONDS = 10.0
"""Tokens per second are averaged over this long."""


class Meter:
    """Counts records on their way to the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self._policy_calls = 0
        self._model_calls = 0
        self._at_last_step = (time.monotonic(), 0)

    async def record(self, records: Sequence[Record]) -> None:
        """Store, then count: a batch that is refused and tried again counts once."""
        await self._store.add_records(records)
        tokens = 0
        for record in records:
            if isinstance(record, Completion):
                self._policy_calls += 1
                tokens += sum(len(choice.token_ids) for choice in record.choices)
            elif isinstance(record, Span) and record.kind is Kind.MODEL_CALL:
                self._model_calls += 1
        if tokens:
            self._tokens += tokens
            self._recent.append((time.monotonic(), tokens))

    def tokens_per_second(self) -> float:
        """Return the policies' sampled tokens a second over the last seconds."""
        now = time.monotonic()
        while self._recent and now - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()
        if not self._recent:
            return 0.0
        return sum(tokens for _, tokens in self._recent) / max(0.5, now - self._recent[0][0])

    def step_fields(self) -> dict[str, float]:
        """Return the tokens sampled since the last call, and their pace."""
        now = time.monotonic()
        then, before = self._at_last_step
        self._at_last_step = (now, self._tokens)
        tokens = self._tokens - before
        return {
            "tokens/sampled": float(tokens),
            "throughput/tokens_per_second": tokens / max(1e-9, now - then),
        }

    def fields(self) -> dict[str, object]:
        """Return the totals for the summary."""
        return {
            "model_calls": self._model_calls,
            "policy_calls": self._policy_calls,
            "tokens_sampled": self._tokens,
        }


class Timing:
    """Wall and CPU seconds of a run, over all its processes."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._load = load_average()
        self._train_began = self._train_ended = self._began
        self._cpu_began = self._cpu_ended = 0.0

    def training_begins(self, others: Sequence[Usage]) -> None:
        self._train_began, self._cpu_began = time.monotonic(), cpu_seconds(others)

    def training_ends(self, others: Sequence[Usage]) -> None:
        self._train_ended, self._cpu_ended = time.monotonic(), cpu_seconds(others)

    def fields(self, others: Sequence[Usage]) -> dict[str, object]:
        """Return the times for the summary; `train_*` is the algorithm's part, evaluations inside it included."""
        return {
            "train_seconds": self._train_ended - self._train_began,
            "total_seconds": time.monotonic() - self._began,
            "train_cpu_seconds": self._cpu_ended - self._cpu_began,
            "total_cpu_seconds": cpu_seconds(others),
            "peak_memory_bytes": usage().peak_memory_bytes + sum(one.peak_memory_bytes for one in others),
            "load_before": self._load,
        }


def cpu_seconds(others: Sequence[Usage]) -> float:
    """Return the CPU seconds of this process and the others."""
    return usage().cpu_seconds + sum(one.cpu_seconds for one in others)
