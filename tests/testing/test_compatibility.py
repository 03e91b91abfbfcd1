"""The table of compatibility: a row a framework, version and mode, with exactly the columns that readers rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from integration_tests.frameworks.contract import Verdict
from scripts import compatibility

PYTHON = Path("/env/bin/python")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A contract in which `autogen` fails, and costs of 0.25 ms; gives the commands that measured them."""
    commands: list[list[str]] = []

    def contract(framework: str, *_: object) -> list[Verdict]:
        if framework == "crewai":
            raise RuntimeError("it ended with 1")
        verdict = Verdict(framework, "1.0", "async", calls=300)
        if framework == "autogen":
            verdict.blame("open_spans", "a team was left open")
        return [verdict]

    def run_in(command: list[str], *, timeout_seconds: float) -> None:
        commands.append(command)
        modes = ["async", "async-stream"] if "--tokens" in command else ["async"]
        cost = {"plain_ms": 5.0, "added_ms": 0.251}
        Path(command[command.index("--out") + 1]).write_text(json.dumps(dict.fromkeys(modes, cost)))

    monkeypatch.setattr(compatibility, "run_contract", contract)
    monkeypatch.setattr(compatibility, "run_in", run_in)
    return commands


def rows(framework: str, faults: list[str]) -> list[dict[str, Any]]:
    return compatibility.rows_of(framework, PYTHON, "http://control", faults)


@pytest.mark.usefixtures("measured")
def test_a_row_has_exactly_the_columns() -> None:
    faults: list[str] = []
    (row,) = rows("langchain", faults)
    assert tuple(row) == compatibility.COLUMNS
    assert (row["calls"], row["open_spans"], row["cpu_ms_per_call"]) == (300, 0, 0.25)
    assert faults == []


@pytest.mark.usefixtures("measured")
def test_a_fault_is_told_with_its_framework_version_and_mode() -> None:
    faults: list[str] = []
    (row,) = rows("autogen", faults)
    assert row["open_spans"] == 1
    assert faults == ["autogen 1.0 async: open_spans: a team was left open"]


@pytest.mark.usefixtures("measured")
def test_a_framework_that_cannot_run_is_a_fault_and_not_the_end() -> None:
    faults: list[str] = []
    assert rows("crewai", faults) == []
    assert faults == ["it ended with 1"]


def test_large_answers_are_measured_apart(measured: list[list[str]]) -> None:
    large = compatibility.large_rows(PYTHON, "http://control", "3.54.0")
    assert [(row["client"], row["mode"]) for row in large] == [
        ("openai 3.54.0", "async"),
        ("openai 3.54.0", "async-stream"),
    ]
    assert measured[0][measured[0].index("--tokens") + 1] == "2000"


@pytest.mark.usefixtures("measured")
def test_the_page_holds_both_tables() -> None:
    page = compatibility.document(rows("langchain", []), compatibility.large_rows(PYTHON, "c", "3.54.0"))
    assert "| langchain | 1.0 | async | 300 | 0 | 0 | 0 | 0 | 0 | 0 | 0.25 |" in page
    assert "|---|---|---|--:|--:|" in page
    assert "| openai 3.54.0 | async-stream | 5.00 | 0.25 |" in page
