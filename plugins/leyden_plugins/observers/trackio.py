"""Trackio: a run's curves in a local dashboard, `trackio show`.

One trap: Trackio knows a run by its name, so the name holds random digits that lie in the run folder; and it keeps
every point, so a step that a resumed run does again stands there twice, the later one behind.
"""

from __future__ import annotations

from collections.abc import Mapping

from leyden.extras import extra
from leyden_plugins.observers.tracking import configuration, held_out_ends, identity, totals

with extra("trackio"):
    import trackio


class TrackioSink:
    """Logs metrics every step; notices become texts, numbers of the summary metrics."""

    def __init__(self, project: str = "leyden", **options: object) -> None:
        """Choose where.

        Args:
            project: of Trackio.
            options: for `trackio.init`, for example `group` or `space_id`. CPU and GPU are logged only where asked
                for (`auto_log_cpu=True`).
        """
        self._project = project
        self._options = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False, **options}
        self._run: trackio.Run | None = None
        self._early: list[str] = []
        """Notices from before the run started."""
        self._step = 0

    def run_started(self, info: Mapping[str, object]) -> None:
        """Begin the run, or go on with it."""
        run = identity(info, "trackio")
        self._run = trackio.init(
            project=self._project,
            config=configuration(info),
            **{"name": run.name, "resume": "never" if run.is_new else "allow", **self._options},
        )
        for text in self._early:
            self.notice(text)
        self._early.clear()

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics; a thread of Trackio's writes them."""
        self._step = step
        self._log(metrics, step=step)

    def progress(self, info: Mapping[str, object]) -> None:
        """Keep nothing: a step's metrics come when it is finished."""

    def notice(self, text: str) -> None:
        """Log a line as the text `notice`, at the last finished step. (An alert would be printed once more.)"""
        if self._run is None:
            self._early.append(text)
        else:
            self._log({"notice": trackio.Markdown(text)}, step=self._step)

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Log both ends of the held-out curves and the summary's numbers; wait until all is written."""
        if self._run is None:
            return
        for step, values in held_out_ends(summary).items():
            self._log(values, step=step)
        self._log(totals(summary), step=self._step)
        self._run.finish()
        self._run = None

    def _log(self, metrics: Mapping[str, object], *, step: int) -> None:
        # Trackio takes a mapping apart in place.
        if self._run is not None:
            self._run.log(dict(metrics), step=step)
