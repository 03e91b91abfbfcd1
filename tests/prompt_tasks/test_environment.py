"""The environment of Agent Lightning: made once from its lock file, and nothing else in it."""

from __future__ import annotations

import re
from pathlib import Path

from scripts import environments
from scripts.setup import Result

ROOT = Path(__file__).parents[2]


def test_it_holds_what_its_lock_file_pins_and_is_made_anew_when_that_changes(tmp_path: Path) -> None:
    installs: list[list[str]] = []

    def run(arguments: list[str], env: dict[str, str] | None = None) -> Result:
        if arguments[1:3] == ["-m", "venv"]:
            (Path(arguments[3]) / "bin").mkdir(parents=True)
            (Path(arguments[3]) / "bin" / "python").touch()
        if "install" in arguments:
            installs.append(arguments[6:])
        return Result(0, "")

    lock = tmp_path / environments.AGENT_LIGHTNING_LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text("agentlightning==0.3.0\n")
    before = environments.agent_lightning(root=tmp_path, run=run)
    assert environments.agent_lightning(root=tmp_path, run=run) == before
    assert installs == [["--no-deps", "-r", str(lock)]]
    lock.write_text("agentlightning==0.3.1\n")
    assert environments.agent_lightning(root=tmp_path, run=run) != before
    assert len(installs) == 2


def test_the_lock_file_pins_everything_exactly() -> None:
    lines = (ROOT / environments.AGENT_LIGHTNING_LOCK).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "agentlightning==0.3.0" in lines
