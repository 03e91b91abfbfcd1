"""Show a run in the terminal: one live bar while it goes on, tables when it has ended.

One idea: where nobody watches (a pipe, a log of a build) the bar becomes a plain line every few seconds. One trap:
what agents wrote is never read as markup and its control characters are spelled out.
"""

from __future__ import annotations

import atexit
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from leyden.extras import extra
from leyden.rewards import DEFAULT_REWARD
from leyden.show import one_line, printable, program, task_text
from leyden.training.runfolder import REPORT

with extra("train"):
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.table import Table
    from rich.text import Text

LINE_SECONDS = 3.0
"""Least time between two plain lines."""
PLAIN_WIDTH = 110
WIDTH_OF_INTERVALS = 97
"""Columns that the table of held-out rewards takes with each interval beside its mean."""
OUTPUT_CHARACTERS = 300
LABEL_CHARACTERS = 30
SHOWN = ("reward", "accuracy", "signal", "failed", "unrewarded", "overlong", "pace", "left")
"""The parts of a step's line, in order; empty ones are left out."""
HEAD_WIDTH = len("before reward 1")


class TerminalSink:
    """Shows progress and, at the end, what came of the run."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _console()
        self._is_live = self._console.is_terminal and not self._console.is_jupyter
        self._progress: Progress | None = None
        self._total = 0
        self._status: dict[str, str] = {}
        self._began: float | None = None
        self._done = 0
        """Steps finished by this process."""
        self._last_line = float("-inf")
        self._last_phase = ""

    def run_started(self, info: Mapping[str, object]) -> None:
        """Say what is trained, and start the bar."""
        self._total = int(cast("int", info.get("total_steps") or 0))
        self._print(f"run {info.get('run_folder')}: {_plan(info)}")
        if self._is_live:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._progress.add_task("starting", total=max(1, self._total), status="")
            self._progress.start()
            # A run that dies by an exception must still give the terminal its cursor back.
            atexit.register(self._stop)

    def notice(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text)

    def progress(self, info: Mapping[str, object]) -> None:
        """Move the bar."""
        phase, step = str(info.get("phase", "")), int(cast("int", info.get("step") or 0))
        done, of = int(cast("int", info.get("done") or 0)), int(cast("int", info.get("of") or 0))
        if phase != "evaluation" and step and self._began is None:
            self._began = time.monotonic()
        pace = info.get("tokens_per_second")
        if isinstance(pace, int | float):
            self._status["pace"] = f"{pace:,.0f} tokens/s"
        what = "held-out evaluation" if phase == "evaluation" else f"step {step}/{self._total}"
        if self._progress is not None:
            moved = step if phase == "evaluation" else step - 1 + (done / of if of else 0.0)
            self._update(f"{what} · {done}/{of} rollouts", completed=max(0.0, moved))
        elif phase == "evaluation" and self._last_phase != phase:
            self._print(f"{what} after step {step}: {of} tasks")
        self._last_phase = phase

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the step's figures."""
        self._done += 1
        for key, name, label in (
            ("reward", "reward/mean", "reward"),
            ("accuracy", "evaluation/reward", "held-out"),
        ):
            if name in metrics:
                self._status[key] = f"{label} {metrics[name]:.3f}"
        if "reward/mean" not in metrics and "loss/loss" in metrics:  # nothing was sampled
            self._status["reward"] = f"loss {metrics['loss/loss']:.3f}"
        self._status |= _warnings(metrics)
        if metrics.get("throughput/tokens_per_second"):
            self._status["pace"] = f"{metrics['throughput/tokens_per_second']:,.0f} tokens/s"
        self._status["left"] = self._time_left(step)
        if self._progress is not None:
            self._update(f"step {step}/{self._total}", completed=step)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS or step == self._total:
            self._last_line = now
            self._print(f"step {step}/{self._total}  {self._status_text('  ')}")

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Print the tables and what to try next."""
        self._stop()
        for table in (_evaluations(summary, self._console.width), _roles(summary)):
            if table is not None:
                self._console.print(table)
        for text in (*_examples(summary), *_facts(summary), *_next(summary)):
            self._console.print(text, soft_wrap=True)

    def _status_text(self, between: str) -> str:
        shown = map(self._status.get, SHOWN)
        return between.join(text for text in shown if text)

    def _update(self, description: str, *, completed: float) -> None:
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, description=description, completed=completed, status=self._status_text(" · "))

    def _time_left(self, step: int) -> str:
        if self._began is None or self._total <= step:
            return ""
        seconds = (time.monotonic() - self._began) / self._done * (self._total - step)
        return f"{_clock(seconds)} left"

    def _print(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self._stop)


def _console() -> Console:
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=PLAIN_WIDTH)


def _warnings(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what a step's figures should be read with: groups that taught nothing, failures, answers cut off."""
    total, silent = (metrics.get(f"groups/{name}", 0.0) for name in ("total", "without_signal"))
    failed, unrewarded = (metrics.get(f"rollouts/{name}_share", 0.0) for name in ("failed", "unrewarded"))
    overlong = max((value for name, value in metrics.items() if name.endswith("lengths/overlong_share")), default=0.0)
    return {
        "signal": f"{total - silent:.0f}/{total:.0f} groups differ" if total else "",
        "failed": f"{failed:.0%} failed" if failed else "",
        "unrewarded": f"{unrewarded:.0%} without reward" if unrewarded else "",
        "overlong": f"{overlong:.0%} cut off" if overlong else "",
    }


def _plan(info: Mapping[str, object]) -> str:
    policies = info.get("policies")
    roles = (
        ", ".join(f"{name} ({', '.join(map(str, patterns))})" for name, patterns in policies.items())
        if isinstance(policies, Mapping)
        else ""
    )
    steps = info.get("total_steps")
    counted = "1 step" if steps == 1 else f"{steps} steps"
    is_grouped = roles and info.get("tasks") != 0  # neither a search for prompts alone nor stored rollouts
    facts = [
        f"{counted} of {info.get('tasks_per_step', '?')} tasks x {info.get('group_size', '?')}"
        if is_grouped
        else counted,
        f"{info.get('tasks', '?')} tasks, {info.get('val_tasks', 0)} held out" if info.get("tasks") != 0 else "",
        f"policies {roles}" if roles else "",
    ]
    return "; ".join(fact for fact in facts if fact)


# ---- the end ---------------------------------------------------------------------------------------------------


def _evaluations(summary: Mapping[str, object], width: int) -> Table | None:
    """Return held-out rewards before and after, a row a name; on a narrow screen intervals get their own line."""
    found = _mapping(summary.get("evaluations"))
    before, after, gain = (_mapping(found.get(when)) for when in ("before", "after", "gain"))
    if not before and not after:
        return None
    table = _table("Held-out, mean with 95 % interval", ("reward", "before", "after", "gain", "tasks"))
    for name in sorted({**before, **after}, key=lambda name: name != DEFAULT_REWARD):
        last = _mapping(after.get(name) or before.get(name))
        estimates = (interval(_mapping(before.get(name))), interval(_mapping(after.get(name))))
        cells = [*estimates, interval(_mapping(gain.get(name)), sign="+")]
        if width < WIDTH_OF_INTERVALS:
            cells = [cell.replace(" [", "\n[") for cell in cells]
        table.add_row(_text(name), *cells, _text(last.get("n", "")))
    return table


def interval(estimate: Mapping[str, object], *, sign: str = "") -> str:
    """Return `mean [low, high]`; a dash for nothing."""
    mean, low, high = (estimate.get(key) for key in ("mean", "low", "high"))
    if not isinstance(mean, int | float):
        return "-"
    text = f"{mean:{sign}.3f}"
    if isinstance(low, int | float) and isinstance(high, int | float):
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return text


def _roles(summary: Mapping[str, object]) -> Table | None:
    roles = _mapping(summary.get("roles"))
    if not roles:
        return None
    header = ("role", "policy", "calls", "calls a rollout", "reward when it spoke")
    table = _table("By role, in the last held-out evaluation", header)
    for role, value in roles.items():
        facts = _mapping(value)
        numbers = (_number(facts.get("calls_per_rollout"), ".2f"), _number(facts.get("reward_when_spoken"), ".3f"))
        policy = facts.get("policy") or "none: its own endpoint"
        table.add_row(*map(_text, (role, policy, facts.get("calls", ""), *numbers)))
    return table


def _examples(summary: Mapping[str, object]) -> list[Text]:
    """Return a few tasks with what was answered before and after."""
    lines: list[Text] = []
    for facts in _example_facts(summary):
        lines.append(Text("\n" + one_line(task_text(facts.get("task")), OUTPUT_CHARACTERS), style="bold"))
        sides = [_mapping(facts.get(when)) for when in ("before", "after")]
        outputs = differing(*(side.get("output") for side in sides))
        for when, side, output in zip(("before", "after"), sides, outputs, strict=True):
            head = f"{when:6} reward {_number(side.get('reward'), 'g')}"
            for label, text in labelled(output):
                lines.append(Text(f"  {head:{HEAD_WIDTH}}  {label}{text}".rstrip()))
                head = ""
    return lines


def _example_facts(summary: Mapping[str, object]) -> list[Mapping[str, object]]:
    found = summary.get("examples")
    return [_mapping(one) for one in found] if isinstance(found, Sequence) and not isinstance(found, str) else []


def labelled(output: object) -> list[tuple[str, str]]:
    """Return an output as lines with their labels; fields of one value share a line, a lone value has no label."""
    if not isinstance(output, Mapping) or not output:
        return [("", one_line("" if output is None else output, OUTPUT_CHARACTERS))]
    names: dict[str, list[str]] = {}
    for name, value in output.items():
        names.setdefault(one_line(value, OUTPUT_CHARACTERS), []).append(one_line(name, LABEL_CHARACTERS))
    return [(", ".join(same) + ": ", text) for text, same in names.items()]


def differing(before: object, after: object) -> tuple[object, object]:
    """Return what to show of two outputs: of two mappings only where they differ; nothing for `None`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)] or list(after)
        if len(names) == 1:
            return before.get(names[0], ""), after.get(names[0], "")
        return {name: before.get(name) for name in names}, {name: after.get(name) for name in names}
    return ("" if before is None else before), ("" if after is None else after)


def _facts(summary: Mapping[str, object]) -> list[Text]:
    failures = _mapping(summary.get("failures"))
    by_type = ", ".join(f"{name} {count}" for name, count in sorted(failures.items())) or "none"
    lines = [f"\nfailures: {by_type}; {summary.get('retries', 0)} attempts made again after infrastructure failures"]
    since = summary.get("resumed_after")
    counts = [
        f"{_number(summary.get(key), ',')} {label}"
        for key, label in (
            ("rollouts", "rollouts" if since is None else "rollouts in all"),
            ("model_calls", "model calls" if since is None else f"model calls since the resume after step {since}"),
            ("tokens_sampled", "tokens sampled"),
        )
        if key in summary
    ]
    times = [
        f"{label} {_number(summary.get(key), '.0f')} {unit}"
        for key, label, unit in (
            ("train_seconds", "training", "s"),
            ("train_cpu_seconds", "its CPU time", "s"),
            ("total_seconds", "all", "s"),
        )
        if key in summary
    ]
    memory = summary.get("peak_memory_bytes")
    if isinstance(memory, int | float) and memory:
        times.append(f"peak memory {memory / 2**30:.2f} GiB")
    lines += [", ".join(part) for part in (counts, times) if part]
    return [Text(printable(line)) for line in lines]


def _next(summary: Mapping[str, object]) -> list[Text]:
    """Return commands that can be copied as they stand."""
    run = summary.get("run_folder")
    if run is None:
        return []
    folder, leyden = shlex.quote(str(run)), program()
    shown = [str(_mapping(one.get("after")).get("rollout") or "") for one in _example_facts(summary)[:1]]
    rows = [(f"{leyden} resume {folder}", f"go on after step {summary['steps']}")] if _is_cut_short(summary) else []
    if summary.get("rollouts") != 0:
        rows += [
            (f"{leyden} rollouts {folder}", "every rollout"),
            (" ".join([leyden, "show", folder, *map(shlex.quote, filter(None, shown))]), "one of them: who said what"),
        ]
    if summary.get("policies") == {}:
        rows.append((f"{leyden} prompts {folder}", "the search, and what has changed"))
    elif summary.get("checkpoint"):
        rows.append((f"{leyden} serve {shlex.quote(str(summary['checkpoint']))}", "the trained model, OpenAI style"))
    if summary.get("checkpoint"):
        rows.append((f"{leyden} export {folder} exported", "a folder for your app"))
    width = max(len(command) for command, _ in rows)
    page = f"\ncurves, table and rollouts in a browser: {Path(str(run)).resolve() / REPORT}"
    return [Text(printable(line)) for line in (page, "\nTry next", *(f"  {one:{width}}  # {two}" for one, two in rows))]


def _is_cut_short(summary: Mapping[str, object]) -> bool:
    steps, wanted = summary.get("steps"), summary.get("total_steps")
    return isinstance(steps, int) and isinstance(wanted, int) and steps < wanted


def _table(title: str, header: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 and name != "before" else "right")
    return table


def _text(value: object) -> Text:
    return Text(one_line(value, 60))


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
