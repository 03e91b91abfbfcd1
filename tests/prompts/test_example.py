"""The example of `examples/prompts`: three roles improve together, offline."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leyden
from examples.prompts import agent, train


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "none")  # which puts back what the example sets
    agent.client.cache_clear()
    yield
    agent.client.cache_clear()
    leyden.uninstrument()


def test_the_example_improves_what_it_scores_on_held_out_letters_and_uses_it_in_the_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--run", str(tmp_path / "run"), "--budget", "200"])
    train.main()
    printed = capsys.readouterr().out
    before, after = map(float, re.findall(r"held out, 40 letters: (\S+) -> (\S+)", printed)[0])
    assert before < 0.4 and after > before + 0.3
    assert "--- writer before" in printed and "\n+Give the ticket number." in printed
    page = (tmp_path / "run" / "exported" / "PROMPTS.md").read_text()
    assert "Give the ticket number." in page
    assert re.search(r"Your ticket is T-\d+", printed.partition("under leyden.deploy")[2])
