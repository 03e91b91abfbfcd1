"""`leyden prompts`: the tree and the changes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from leyden.cli import main
from leyden.sqlite import SQLiteStore
from leyden_plugins.algorithms.prompt import Candidate, SearchRecord


def a_candidate(number: int, parents: list[int], score: float, prompts: dict[str, str], *changed: str) -> Candidate:
    return Candidate(
        number=number, parents=parents, changed=list(changed), prompts=prompts, scores=[score, score], rollouts=number
    )


RECORD = SearchRecord(
    step=3,
    method="GEPA",
    feedback=[0],
    selection=[1, 2],
    budget=50,
    rollouts=40,
    rejected=7,
    unrewarded=2,
    reflection_calls=9,
    reflection_tokens=1234,
    reflection_errors=1,
    last_error="ConnectionError: down",
    ended="40 of its 50 rollouts are spent",
    winner=2,
    candidates=[
        a_candidate(0, [], 0.25, {"a": "Be brief.", "b": "Sing."}),
        a_candidate(1, [0], 0.5, {"a": "Be brief.\nBe kind.", "b": "Sing."}, "a"),
        a_candidate(2, [1], 0.75, {"a": "Be brief.\nBe kind.", "b": "Sing \x1b[31mloud."}, "b"),
        a_candidate(3, [0, 1], 0.75, {"a": "Be long.", "b": "Sing."}, "a"),
    ],
)


def store(run: Path, notes: dict[str, str]) -> None:
    async def write() -> None:
        async with await SQLiteStore.open(run / "store.db") as opened:
            for key, value in notes.items():
                await opened.put_meta(f"note/{key}", value)

    run.mkdir()
    asyncio.run(write())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    notes = {"prompts/searches": json.dumps([3]), "prompts/3": msgspec.json.encode(RECORD).decode()}
    store(tmp_path / "run", notes)
    return tmp_path / "run"


def test_the_tree_and_the_winner_s_changes_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printed.splitlines() == [
        "step 3, GEPA: 40 of 50 rollouts, 9 reflection calls (1,234 tokens), 4 candidates, 7 proposals rejected",
        "ended: 40 of its 50 rollouts are spent",
        "2 rollouts had no reward and count as 0",
        "1 reflection calls failed, the last: ConnectionError: down",
        "",
        "score on 2 selection tasks",
        "0: 0.250, as the roles spoke before, after 0 rollouts",
        "  1: 0.500, changes a, after 1 rollouts",
        "    2: 0.750, changes b, after 2 rollouts  <- best",
        "  3: 0.750, changes a, joined with 1, after 3 rollouts",
        "",
        "--- a before",
        "+++ a now",
        "@@ -1 +1,2 @@",
        " Be brief.",
        "+Be kind.",
        "--- b before",
        "+++ b now",
        "@@ -1 +1 @@",
        "-Sing.",
        "+Sing \\x1b[31mloud.",
    ]


def test_another_candidate_s_changes_can_be_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prompts", str(run), "--candidate", "3"])
    printed = capsys.readouterr().out
    assert "-Be brief.\n+Be long." in printed and "after 3 rollouts  <- shown" in printed
    main(["prompts", str(run), "--candidate", "0"])
    assert "candidate 0 is what the roles said before" in capsys.readouterr().out
    assert main(["prompts", str(run), "--candidate", "9"]) != 0
    assert "no candidate 9; it has 0 to 3" in capsys.readouterr().err


def test_a_folder_without_a_search_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", str(tmp_path)]) != 0
    assert "holds no run" in capsys.readouterr().err
    store(tmp_path / "run", {})
    assert main(["prompts", str(tmp_path / "run")]) != 0
    assert "has not searched for prompts" in capsys.readouterr().err
