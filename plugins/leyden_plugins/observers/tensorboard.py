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
from leyden_plugins.observers.tracking import TrackerSink, configuration, totals

with extra("tensorboard"):
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardSink(TrackerSink):
    """Writes scalars every step; configuration, notices and the summary as text."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Choose where.

        Args:
            folder: of all runs' event files, one folder a run in it; `None`: `tensorboard/` in the run folder.
        """
        super().__init__()
        self._folder = None if folder is None else Path(folder)
        self._writer: EventFileWriter | None = None
        self._is_first = True
        """No step of this part is written."""

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics; they are on disk when this returns."""
        if self._is_first:
            self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            self._is_first = False
        super().step_finished(step, metrics)

    def _begin(self, info: Mapping[str, object]) -> None:
        """Open an event file beside those of earlier parts; one that a failed part left open is closed."""
        self._close()
        self._is_first = True
        run = note_path(info)
        folder = run / "tensorboard" if self._folder is None else self._folder / run.resolve().name
        self._writer = EventFileWriter(str(folder))
        self._text("configuration", _readable(configuration(info)), step=0)

    def _log(self, values: Mapping[str, float], *, step: int) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _note(self, text: str, *, step: int) -> None:
        self._text("notices", text, step=step)

    def _end(self, summary: Mapping[str, object]) -> None:
        self._log(totals(summary), step=self._step)
        self._text("summary", _readable(summary), step=self._step)
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _text(self, name: str, text: str, *, step: int) -> None:
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=name, metadata=metadata, tensor=tensor)
        self._add(Event(step=step, summary=Summary(value=[value])))

    def _add(self, event: Event) -> None:
        if self._writer is not None:
            event.wall_time = time.time()
            self._writer.add_event(event)
            self._writer.flush()


def _readable(value: object) -> str:
    """Return JSON as a block of code, which TensorBoard's Markdown leaves as it is."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    return "\n".join("    " + line for line in text.splitlines())
