"""What the report shows, as one JSON value: figures, curves, tables, and a bounded choice of rollouts.

One idea: texts are kept once and referred to by number, because the calls of a run repeat the same prompts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec

from leyden.interfaces import RolloutRecords, Store
from leyden.show import printable, task_text
from leyden.spans import FINISHED, Kind, Mode, Rollout
from leyden.spantree import Node, answer_of, as_text, attributes_of, model_calls, nodes, prompt_of, token_counts
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import RUN, STORE, SUMMARY, read_json
from leyden_plugins.observers.jsonl import read_metrics
from leyden_plugins.observers.metrics import CHARTS, METRICS, base_name, matches, unit_of

ROLLOUT_BYTES = 4_500_000
"""Of JSON for rollouts; with everything else the page stays near 5 MB."""
LONGEST_TEXT = 4_000
TRAINING_ROLLOUTS_A_STEP = 4
CHUNK = 50
"""Rollouts read from the store at a time."""
MISFITS = 5
"""Rollouts that do not fit before the rest is left out."""


class Texts:
    """Every text once, by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.bytes = 0
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Return the number of `text`, cut at `LONGEST_TEXT`."""
        if len(text) > LONGEST_TEXT:
            text = f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT} more characters)"
        text = printable(text)
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
            self.bytes += _page_bytes(text)
        return self._numbers[text]

    def cut(self, count: int) -> None:
        """Forget all but the first `count` texts."""
        for text in self.texts[count:]:
            del self._numbers[text]
            self.bytes -= _page_bytes(text)
        del self.texts[count:]


def _page_bytes(text: str) -> int:
    """Estimate what a text takes in the page, where each of `<`, `>` and `&` is written as six characters."""
    return len(text.encode()) + 5 * sum(map(text.count, "<>&")) + 3


async def report_data(run_folder: Path, summary: Mapping[str, object] | None = None) -> dict[str, object]:
    """Read a run folder; what is missing is left out.

    Args:
        run_folder: of a run that has ended or still goes on.
        summary: of the run, where `summary.json` is not written yet.

    Raises:
        ConfigurationError: a file of the run is damaged.
        StoreError: the store cannot be read.
    """
    run = read_json(run_folder / RUN) if (run_folder / RUN).exists() else {}
    if summary is None:
        summary = read_json(run_folder / SUMMARY) if (run_folder / SUMMARY).exists() else {}
    texts = Texts()
    async with await SQLiteStore.open(run_folder / STORE, read_only=True) as store:
        every = await store.rollouts()
        rollouts = await _rollouts(store, every, texts)
    return {
        "title": run_folder.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        "summary": summary,
        "run": run,
        "charts": charts(read_metrics(run_folder), summary),
        "texts": texts.texts,
        "rollouts": rollouts,
        "rollouts_in_all": len(every),
    }


# ---- curves ----------------------------------------------------------------------------------------------------


def charts(metrics: Mapping[int, Mapping[str, float]], summary: Mapping[str, object]) -> list[dict[str, object]]:
    """Return the charts that have points, then idle ones, then one for each metric of no chart."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    points = {name: [[step, values[name]] for step, values in metrics.items() if name in values] for name in names}
    held_out = _held_out(summary, last_step=max(metrics, default=0))
    for name, ends in held_out.items():
        known = {point[0] for point in ends}
        middle = [point for point in points.get(name, []) if point[0] not in known]
        points[name] = sorted([*ends, *middle], key=lambda point: point[0])
    found: list[dict[str, object]] = []
    idle: list[dict[str, object]] = []
    used: set[str] = set()
    for chart in CHARTS:
        chosen = [name for pattern in chart.metrics for name in points if matches(pattern, name)]
        if len(chosen) >= chart.least:
            is_idle = chart.is_idle_at_zero and not any(point[1] for name in chosen for point in points[name])
            (idle if is_idle else found).append(_chart(chart.title, chosen, points, is_extra=is_idle))
        used.update(chosen)
    extra = [_chart(name, [name], points, is_extra=True) for name in points if name not in used]
    return found + idle + extra


def _chart(
    title: str, names: Sequence[str], points: Mapping[str, list[list[float]]], *, is_extra: bool
) -> dict[str, object]:
    known = [base_name(name) for name in names]
    return {
        "title": title,
        "unit": unit_of(names[0]),
        "is_extra": is_extra,
        "series": [
            {"name": name, "meaning": METRICS[base].meaning if base else "", "points": points[name]}
            for name, base in zip(names, known, strict=True)
        ],
    }


def _held_out(summary: Mapping[str, object], *, last_step: int) -> dict[str, list[list[float]]]:
    """Return the evaluations before and after as points with their intervals: step, mean, low, high."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    evaluations = summary.get("evaluations")
    steps = summary.get("steps")
    last = steps if isinstance(steps, int) else last_step
    for when, step in (("before", 0), ("after", last)):
        table = evaluations.get(when) if isinstance(evaluations, Mapping) else None
        for name, one in (table or {}).items():
            values = [one.get(key) for key in ("mean", "low", "high")]
            if all(isinstance(value, int | float) for value in values):
                found[f"evaluation/{name}"].append([step, *values])
    return found


# ---- rollouts --------------------------------------------------------------------------------------------------


async def _rollouts(store: Store, every: Sequence[Rollout], texts: Texts) -> list[dict[str, object]]:
    """Return the chosen rollouts that fit: late steps first, evaluations before training."""
    place = {
        rollout.rollout_id: (-rollout.step, rollout.mode is not Mode.EVALUATE, index)
        for index, rollout in enumerate(every)
    }
    found: dict[str, dict[str, object]] = {}
    spent = misfits = 0
    async for records in _read(store, choose(every)):
        known = len(texts.texts)
        one = rollout_view(records, texts)
        size = len(msgspec.json.encode(one))
        if spent + size + texts.bytes <= ROLLOUT_BYTES:
            spent += size
            found[records.rollout.rollout_id] = one
            continue
        # One huge rollout must not keep out the others, nor make us read the whole store.
        texts.cut(known)
        misfits += 1
        if misfits == MISFITS:
            break
    return [found[rollout_id] for rollout_id in sorted(found, key=lambda one: place[one])]


async def _read(store: Store, rollout_ids: Sequence[str]) -> AsyncIterator[RolloutRecords]:
    for start in range(0, len(rollout_ids), CHUNK):
        for records in await store.records(rollout_ids[start : start + CHUNK]):
            yield records


def choose(every: Sequence[Rollout]) -> list[str]:
    """Return rollout ids by importance: the last evaluation, some of each training step, the first evaluation.

    Of a step come the best, the worst and then others in order; steps take turns, so that a cut thins all of them.
    """
    finished = [rollout for rollout in every if rollout.state in FINISHED]
    evaluated: dict[int, list[str]] = defaultdict(list)
    trained: dict[int, list[Rollout]] = defaultdict(list)
    others: list[str] = []
    for rollout in finished:
        if rollout.mode is Mode.EVALUATE:
            evaluated[rollout.step].append(rollout.rollout_id)
        elif rollout.mode is Mode.TRAIN:
            trained[rollout.step].append(rollout)
        else:
            others.append(rollout.rollout_id)
    evaluations = [evaluated[step] for step in sorted(evaluated)]
    picks = [_some(rollouts) for _, rollouts in sorted(trained.items())]
    turns = [pick[turn] for turn in range(TRAINING_ROLLOUTS_A_STEP) for pick in picks if turn < len(pick)]
    last = evaluations[-1] if evaluations else []
    first = evaluations[0] if len(evaluations) > 1 else []
    return [*last, *turns, *first, *others]


def _some(rollouts: Sequence[Rollout]) -> list[str]:
    ranked = sorted(rollouts, key=lambda one: -float("inf") if one.reward is None else one.reward)
    order = [ranked[-1], ranked[0], *ranked[1:-1]]
    return list(dict.fromkeys(one.rollout_id for one in order))[:TRAINING_ROLLOUTS_A_STEP]


def rollout_view(records: RolloutRecords, texts: Texts) -> dict[str, object]:
    """Return one rollout with its spans; texts as numbers."""
    rollout = records.rollout
    walked = nodes(records)
    error = f"{rollout.error_type or 'error'}: {rollout.error or ''}" if rollout.error_type or rollout.error else None
    began = min((node.span.start_ns for node in walked), default=rollout.started_ns)
    ended = max((node.span.end_ns for node in walked), default=rollout.ended_ns)
    return {
        "id": printable(rollout.rollout_id),
        "mode": rollout.mode.value,
        "step": rollout.step,
        "state": rollout.state.value,
        "reward": rollout.reward,
        "task": texts.number(task_text(rollout.task)),
        "whole_task": texts.number(as_text(rollout.task)),
        "output": None if rollout.output is None else texts.number(as_text(rollout.output)),
        "error": None if error is None else texts.number(error),
        "versions": {printable(name): version for name, version in rollout.versions.items()},
        "ms": round((ended - began) / 1e6, 2),
        "calls": model_calls(records),
        "rewards": [
            [texts.number(reward.name), reward.value, texts.number(reward.target_role or "")]
            for reward in records.rewards
            if reward.target_span is None
        ],
        "spans": [_span_view(node, began, texts) for node in walked],
    }


def _span_view(node: Node, began_ns: int, texts: Texts) -> dict[str, object]:
    span = node.span
    view: dict[str, object] = {
        "depth": node.depth,
        "kind": span.kind.value,
        "name": texts.number(span.name),
        "role": texts.number(span.role),
        "start": round((span.start_ns - began_ns) / 1e6, 2),
        "ms": round((span.end_ns - span.start_ns) / 1e6, 2),
        "status": span.status.value,
    }
    counts = token_counts(node)
    if counts:
        view["tokens"] = list(counts)
    if span.error:
        view["error"] = texts.number(span.error)
    if node.completions:
        last = node.completions[-1]
        view["policy"] = texts.number(last.policy)
        view["version"] = last.version
        view["finish"] = texts.number(", ".join(choice.finish_reason for choice in last.choices))
        view["attempts"] = len(node.completions)
    if node.rewards:
        view["rewards"] = [[texts.number(reward.name), reward.value] for reward in node.rewards]
    if span.kind is Kind.MODEL_CALL:
        view["prompt"] = [[texts.number(one.role), texts.number(one.text)] for one in prompt_of(span)]
        view["answer"] = [[texts.number(one.role), texts.number(one.text)] for one in answer_of(node)]
    else:
        view["attributes"] = [[texts.number(name), texts.number(as_text(value))] for name, value in attributes_of(span)]
    return view
