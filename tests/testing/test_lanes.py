"""Environments of the framework tests: made once from their lock file, and anew only when what they hold changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import environments
from scripts.setup import Result

PROJECT = '[project]\nname = "leyden"\ndependencies = []\n[project.entry-points.leyden]\nbuiltin = "leyden_plugins"\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with one lane."""
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "constraints.txt").write_text("openai==2.0\n")
    locks = tmp_path / environments.LOCKS
    locks.mkdir(parents=True)
    (locks / "newest.txt").write_text("openai==3.0\n")
    return tmp_path


class Machine:
    """Runs nothing; notes what it was asked to run."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def run(self, arguments: list[str], env: dict[str, str] | None = None) -> Result:
        self.commands.append(arguments)
        if arguments[1:3] == ["-m", "venv"]:
            (Path(arguments[3]) / "bin").mkdir(parents=True)
            (Path(arguments[3]) / "bin" / "python").touch()
        return Result(0, "")

    @property
    def installs(self) -> list[list[str]]:
        """What pip was told, without its own options."""
        return [command[6:] for command in self.commands if "install" in command]


def test_a_lane_holds_its_lock_file_and_leyden_alone(root: Path) -> None:
    machine = Machine()
    python = environments.lane("newest", root=root, run=machine.run)
    assert python.is_file()
    assert [install[-2:] for install in machine.installs] == [
        ["-r", str(root / environments.LOCKS / "newest.txt")],
        ["-e", str(root)],
    ]
    assert all("--no-deps" in install for install in machine.installs)


def test_a_second_call_is_free(root: Path) -> None:
    machine = Machine()
    python = environments.lane("newest", root=root, run=machine.run)
    machine.commands.clear()
    assert environments.lane("newest", root=root, run=machine.run) == python
    assert machine.commands == []


def test_a_lane_outlives_changes_of_leyden_s_own_requirements(root: Path) -> None:
    before = environments.lane_folder("newest", root)
    (root / "pyproject.toml").write_text(PROJECT.replace("[]", '["pluggy"]'))
    (root / "constraints.txt").write_text("openai==2.1\n")
    assert environments.lane_folder("newest", root) == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (f"{environments.LOCKS}/newest.txt", "openai==3.1\n"),
        ("pyproject.toml", PROJECT.replace("builtin =", "other =")),
    ],
    ids=["lock file", "entry points"],
)
def test_a_lane_is_made_anew_when_what_it_holds_changes(root: Path, file: str, text: str) -> None:
    machine = Machine()
    before = environments.lane("newest", root=root, run=machine.run)
    (root / file).write_text(text)
    after = environments.lane("newest", root=root, run=machine.run)
    assert after != before
    assert not before.exists(), "the old one is gone"


def test_an_unfinished_lane_is_made_again(root: Path) -> None:
    machine = Machine()
    python = environments.lane("newest", root=root, run=machine.run)
    (python.parents[1] / environments.STAMP).unlink()
    machine.commands.clear()
    environments.lane("newest", root=root, run=machine.run)
    assert len(machine.installs) == 2


def test_an_environment_of_extras_leaves_others_with_a_longer_name_alone(root: Path) -> None:
    longer = environments.environment(["gateway", "langchain"], root=root, run=Machine().run)
    environments.environment(["gateway"], root=root, run=Machine().run)
    assert longer.exists()


def test_an_environment_of_extras_follows_the_requirements(root: Path) -> None:
    before = environments.environment_folder(["gateway"], root)
    (root / "constraints.txt").write_text("openai==2.1\n")
    assert environments.environment_folder(["gateway"], root) != before


def test_every_lock_pins_every_package() -> None:
    assert environments.lanes() == ["newest", "openai1", "together"]
    for name in environments.lanes():
        lock = environments.ROOT / environments.LOCKS / f"{name}.txt"
        assert lock.with_suffix(".in").is_file(), "what was asked for"
        lines = lock.read_text().split()
        assert lines and all("==" in line for line in lines)
