"""The report of a run: one HTML file that needs no network.

One idea: the page's script writes every text with `textContent`, and the data stands in the page as JSON in which
no `<` is left, so nothing an agent wrote can become markup. A content security policy that names the hash of our
own script stops every other one.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError
from leyden.looping import LoopThread
from leyden.redaction import Redactor
from leyden.training.runfolder import REPORT, STORE, note_path
from leyden_plugins.observers.report_data import report_data


class ReportSink:
    """Writes `report.html` when the run has ended."""

    def run_started(self, info: Mapping[str, object]) -> None:
        """Do nothing: there is nothing to report yet."""

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing: `leyden report` shows a run that still goes on."""

    def progress(self, info: Mapping[str, object]) -> None:
        """Do nothing."""

    def notice(self, text: str) -> None:
        """Do nothing."""

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Write the page."""
        write_report(note_path(summary), summary=summary)


def write_report(run_folder: str | os.PathLike[str], *, summary: Mapping[str, object] | None = None) -> Path:
    """Write `report.html` into a run folder, whole or not at all; return its path. Blocks.

    Args:
        run_folder: of a run that has ended or still goes on.
        summary: in place of `summary.json`.

    Raises:
        ConfigurationError: the folder holds no run.
        StoreError: its store cannot be read.
    """
    folder = Path(run_folder)
    if not (folder / STORE).is_file():
        raise ConfigurationError(f"{str(folder)!r} is not a run folder: it holds no {STORE}")
    # A loop of its own: this may be called from inside one.
    loop = LoopThread("leyden-report")
    try:
        data = loop.submit(report_data(folder, summary)).result()
    finally:
        loop.close()
    path = folder / REPORT
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(data), encoding="utf-8")
    os.replace(partial, path)
    return path


def page(data: Mapping[str, object]) -> str:
    """Return the page for `data`."""
    style, script, template = (_asset(f"report.{kind}") for kind in ("css", "js", "html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pieces = {
        "TITLE": html.escape(f"{data.get('title', 'run')} · Leyden"),
        "SCRIPT_HASH": digest,
        "STYLE": style,
        "DATA": embedded(data),
        "SCRIPT": script,
    }
    # Cut at the marks rather than replaced one after the other: data may hold what looks like a mark.
    cut = template.split("%%")
    return "".join(pieces[part] if index % 2 else part for index, part in enumerate(cut))


def embedded(data: Mapping[str, object]) -> str:
    """Return JSON that may stand inside a script element; keys that were caught late are taken out."""
    encoded = msgspec.json.encode(data)
    redactor = Redactor.from_environment()
    if redactor.suspects(encoded):
        encoded = msgspec.json.encode(redactor.clean(msgspec.json.decode(encoded)))
    text = encoded.decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def report_command(arguments: Sequence[str]) -> int:
    """Run `leyden report`; return the exit status.

    Raises:
        ConfigurationError: the folder holds no run.
    """
    parser = argparse.ArgumentParser(prog="leyden report", description="Write a run's report.html again.")
    parser.add_argument("run", help="run folder")
    print(f"wrote {write_report(parser.parse_args(arguments).run)}")
    return 0


def _asset(name: str) -> str:
    return (resources.files(__package__ or "") / name).read_text(encoding="utf-8")
