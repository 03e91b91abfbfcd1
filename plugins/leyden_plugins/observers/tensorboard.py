"""TensorBoard: a run's curves as event files, `tensorboard --logdir runs`.

One idea: names stay Leyden's own; TensorBoard groups them by what stands before the first slash.
One trap: a resumed run does some steps again. The first event of every part says from which step on it counts, so
TensorBoard drops what the part before wrote behind it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from leyden.extras import extra
from leyden.training.runfolder import note_path
from leyden_plugins.observers.tracking import configuration, held_out_ends, totals

with extra("tensorboard"):
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardSink:
    """Writes scalars every step; configuration, notices and the summary as text."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Choose where.

        Args:
            folder: of all runs' event files, one folder a run in it; `None`: `tensorboard/` in the run folder.
        """
        self._folder = None if folder is None else Path(folder)
        self._writer: EventFileWriter | None = None
        self._early: list[str] = []
        """Notices from before the run started."""
        self._step: int | None = None
        """The last step this part has written; `None` before its first."""

    def run_started(self, info: Mapping[str, object]) -> None:
        """Open an event file beside those of earlier parts; one that a failed part left open is closed."""
        if self._writer is not None:
            self._writer.close()
        self._step = None
        run = note_path(info)
        folder = run / "tensorboard" if self._folder is None else self._folder / run.resolve().name
        self._writer = EventFileWriter(str(folder))
        self._text("configuration", _readable(configuration(info)), step=0)
        for text in self._early:
            self.notice(text)
        self._early.clear()
        self._writer.flush()

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics; they are on disk when this returns."""
        if self._writer is None:
            return
        if self._step is None:
            self._writer.add_event(
                Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
            )
        self._step = step
        self._scalars(step, metrics)
        self._writer.flush()

    def progress(self, info: Mapping[str, object]) -> None:
        """Keep nothing: a step's metrics come when it is finished."""

    def notice(self, text: str) -> None:
        """Write a line under `notices`, at the last finished step."""
        if self._writer is None:
            self._early.append(text)
        else:
            self._text("notices", text, step=self._step or 0)

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Write both ends of the held-out curves and the summary; close the file."""
        if self._writer is None:
            return
        for step, values in held_out_ends(summary).items():
            self._scalars(step, values)
        self._scalars(self._step or 0, totals(summary))
        self._text("summary", _readable(summary), step=self._step or 0)
        self._writer.close()
        self._writer, self._step = None, None

    def _scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])

    def _text(self, name: str, text: str, *, step: int) -> None:
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(step, [Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        if self._writer is not None and values:
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def _readable(value: object) -> str:
    """Return JSON as a block of code, which TensorBoard's Markdown leaves as it is."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    return "\n".join("    " + line for line in text.splitlines())
