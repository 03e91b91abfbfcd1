"""Trackio: a run's curves in a local dashboard, `trackio show`.

One trap: Trackio knows a run by its name, so the name holds random digits that lie in the run folder; and it keeps
every point, so a step that a resumed run does again stands there twice, the later one behind.
"""

from __future__ import annotations

from collections.abc import Mapping

from leyden.extras import extra
from leyden_plugins.observers.tracking import TrackerSink, configuration, identity, totals

with extra("trackio"):
    import trackio


class TrackioSink(TrackerSink):
    """Logs metrics every step; notices become texts, numbers of the summary metrics."""

    def __init__(self, project: str = "leyden", **options: object) -> None:
        """Choose where.

        Args:
            project: of Trackio.
            options: for `trackio.init`, for example `group` or `space_id`. CPU and GPU are logged only where asked
                for (`auto_log_cpu=True`).
        """
        super().__init__()
        self._project = project
        self._options = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False, **options}

    def _begin(self, info: Mapping[str, object]) -> None:
        run = identity(info, "trackio")
        self._run = trackio.init(
            project=self._project,
            config=configuration(info),
            **{"name": run.name, "resume": "never" if run.is_new else "allow", **self._options},
        )

    def _log(self, values: Mapping[str, object], *, step: int) -> None:
        # Trackio takes a mapping apart in place.
        self._run.log(dict(values), step=step)

    def _note(self, text: str, *, step: int) -> None:
        # An alert would be printed once more.
        self._log({"notice": trackio.Markdown(text)}, step=step)

    def _end(self, summary: Mapping[str, object]) -> None:
        self._log(totals(summary), step=self._step)
        self._run.finish()
