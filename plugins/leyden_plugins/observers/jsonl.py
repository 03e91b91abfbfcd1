"""`metrics.jsonl`: one line of JSON a step, for any tool to read.

One trap: a resumed run does some steps again, and a kill may leave half a line. Lines are only ever appended, so
of several lines of one step the last one counts, and `read_metrics` leaves out what is not a line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from leyden.training.runfolder import METRICS, note_path


class JsonlSink:
    """Appends the metrics of every step to `metrics.jsonl` in the run folder."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def run_started(self, info: Mapping[str, object]) -> None:
        """Open the file, and end what a killed run left half written."""
        path = note_path(info) / METRICS
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("ab", buffering=0)
        if torn:
            self._file.write(b"\n")

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a value that is not finite becomes null."""
        if self._file is not None:
            line = {"step": step, "time": time.time(), **metrics}
            self._file.write(msgspec.json.encode(line) + b"\n")

    def progress(self, info: Mapping[str, object]) -> None:
        """Keep nothing: a step's line comes when it is finished."""

    def notice(self, text: str) -> None:
        """Keep nothing."""

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(run_folder: Path) -> dict[int, dict[str, float]]:
    """Return step -> metrics, in order of steps; empty where there is no file."""
    path = run_folder / METRICS
    found: dict[int, dict[str, float]] = {}
    if not path.exists():
        return found
    for line in path.read_bytes().splitlines():
        try:
            values = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.MsgspecError:
            continue
        step = values.pop("step", None)
        values.pop("time", None)
        if isinstance(step, int):
            found[step] = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    return dict(sorted(found.items()))
