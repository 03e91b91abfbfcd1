"""`scripts/setup.py` on machines of many kinds, none of which installs anything."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import setup
from scripts.setup import Interpreter, KeptTorch, Result, SetupError

PYPROJECT = '[project]\nname = "leyden"\n[project.optional-dependencies]\ntrain = ["torch>=2.6"]\n'
CONSTRAINTS = "numpy==2.0\ntorch==2.13.0\n"
OK = Result(0, "")
FAILED = Result(1, "it broke")


class Machine:
    """Play a machine: answer the commands that the set-up runs, and remember them."""

    def __init__(
        self,
        *,
        ensurepip: bool = True,
        pip: bool = True,
        outer_torch: str | None = None,
        gpu: bool = False,
        cpu_wheel: bool = True,
        version: str = "3.11.7",
    ) -> None:
        self.ensurepip = ensurepip
        self.pip = pip
        self.outer_torch = outer_torch
        self.gpu = gpu
        self.cpu_wheel = cpu_wheel
        self.version = version
        self.commands: list[str] = []
        self.said: list[str] = []
        self.interrupt_at = ""

    def run(self, arguments: list[str], env: dict[str, str] | None = None) -> Result:
        command = " ".join(arguments)
        self.commands.append(command)
        if self.interrupt_at and self.interrupt_at in command:
            raise KeyboardInterrupt
        for part, answer in self.answers().items():
            if part in command:
                return answer(arguments)
        raise AssertionError(f"unforeseen command {command}")

    def answers(self) -> dict[str, Callable[[list[str]], Result]]:
        return {
            "nvidia-smi": lambda _: OK if self.gpu else FAILED,
            "sys.version_info": lambda a: Result(0, "\n".join([a[0], *self.version.split("."), ""])),
            "find_spec('torch')": self.probe_torch,
            "get_path('purelib')": lambda a: Result(0, str(Path(a[0]).parents[1])),
            "-m venv": self.make_venv,
            "-m virtualenv": self.make_virtualenv,
            "-m pip --version": lambda a: OK if (Path(a[0]).parents[1] / "pip").exists() else FAILED,
            "--target": lambda _: OK if self.pip else FAILED,
            "torch==2.13.0+cpu": lambda _: OK if self.cpu_wheel else Result(1, "No matching distribution found"),
            "pip install": lambda _: OK,
        }

    def probe_torch(self, arguments: list[str]) -> Result:
        found = f"a warning\ntorch\n{self.outer_torch}\n/outer/site-packages\n" if self.outer_torch else ""
        return Result(0, found)

    def make_venv(self, arguments: list[str]) -> Result:
        make_venv(Path(arguments[-1]), version=self.version, pip=self.ensurepip)
        return OK if self.ensurepip else FAILED

    def make_virtualenv(self, arguments: list[str]) -> Result:
        make_venv(Path(arguments[-1]), version=self.version, pip=True)
        return OK

    def set_up(self, root: Path) -> None:
        self.commands.clear()
        setup.set_up(root, run=self.run, say=self.said.append)

    def installs(self) -> list[str]:
        return [c.partition("install -q ")[2] for c in self.commands if "pip install" in c]


def make_venv(venv: Path, *, version: str, pip: bool) -> None:
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    python = venv / "bin" / "python"
    python.write_text("")
    python.chmod(0o755)
    (venv / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    if pip:
        (venv / "pip").touch()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout on a Linux machine that shows no GPU device."""
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS)
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(setup, "has_gpu", lambda *, run: run(["nvidia-smi", "-L"]).returncode == 0)
    return tmp_path


def test_a_plain_machine_gets_the_cpu_build_and_then_leyden(root: Path) -> None:
    machine = Machine()
    machine.set_up(root)
    torch, leyden = machine.installs()
    assert torch.endswith(" torch==2.13.0+cpu")
    assert leyden.endswith(f"-e {root}[demo,dev]")
    assert f"-c {root}/.venv/leyden-constraints.txt" in leyden


def test_a_second_run_starts_no_process(root: Path) -> None:
    machine = Machine()
    machine.set_up(root)
    machine.set_up(root)
    assert machine.commands == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_input_installs_again_into_the_same_environment(root: Path, name: str) -> None:
    machine = Machine()
    machine.set_up(root)
    (root / name).write_text((root / name).read_text() + "# changed\n")
    machine.set_up(root)
    assert machine.installs()
    assert not any("-m venv" in command for command in machine.commands)


def test_a_moved_checkout_installs_again(root: Path) -> None:
    assert setup.fingerprint(root, "3.11.7") != setup.fingerprint(root / ".." / root.name, "3.11.7")


def test_another_python_makes_the_environment_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine().set_up(root)
    monkeypatch.setenv("PYTHON", sys.executable)
    machine = Machine(version="3.12.1")
    machine.set_up(root)
    assert any("-m venv" in command for command in machine.commands)
    assert setup.venv_version(root / ".venv") == "3.12.1"


@pytest.mark.parametrize("step", ["-m venv", "torch==2.13.0+cpu", "[demo,dev]"])
def test_an_interrupted_run_leaves_no_stamp_and_is_completed_by_the_next(root: Path, step: str) -> None:
    machine = Machine()
    machine.interrupt_at = step
    with pytest.raises(KeyboardInterrupt):
        machine.set_up(root)
    machine.interrupt_at = ""
    machine.set_up(root)
    assert machine.installs()
    machine.set_up(root)
    assert machine.commands == []


def test_an_interrupted_update_counts_as_unfinished_even_if_the_change_is_taken_back(root: Path) -> None:
    machine = Machine()
    machine.set_up(root)
    (root / "constraints.txt").write_text(CONSTRAINTS + "rich==1.0\n")
    machine.interrupt_at = "[demo,dev]"
    with pytest.raises(KeyboardInterrupt):
        machine.set_up(root)
    (root / "constraints.txt").write_text(CONSTRAINTS)
    machine.interrupt_at = ""
    machine.set_up(root)
    assert machine.installs()


def test_a_half_made_environment_is_replaced(root: Path) -> None:
    make_venv(root / ".venv", version="3.11.7", pip=False)
    (root / ".venv" / "leftover").touch()
    Machine().set_up(root)
    assert not (root / ".venv" / "leftover").exists()


def test_without_ensurepip_virtualenv_is_fetched_into_a_folder_of_its_own(root: Path) -> None:
    machine = Machine(ensurepip=False)
    machine.set_up(root)
    assert any("--target" in c and c.endswith(" virtualenv") for c in machine.commands)
    assert (root / ".venv" / "pip").exists()


def test_without_ensurepip_and_pip_the_apt_line_is_given(root: Path) -> None:
    machine = Machine(ensurepip=False, pip=False)
    with pytest.raises(SetupError, match=r"sudo apt install python3\.11-venv"):
        machine.set_up(root)
    assert not (root / ".venv").exists()


def test_a_usable_torch_of_the_interpreter_is_kept(root: Path) -> None:
    machine = Machine(outer_torch="2.9.1+cu130")
    machine.set_up(root)
    assert len(machine.installs()) == 1
    assert (root / ".venv" / "leyden-kept-torch.pth").read_text() == "/outer/site-packages\n"
    constraints = (root / ".venv" / "leyden-constraints.txt").read_text()
    assert constraints == "numpy==2.0\ntorch==2.9.1+cu130\n"


def test_a_torch_below_the_floor_is_not_kept(root: Path) -> None:
    machine = Machine(outer_torch="2.5.9")
    machine.set_up(root)
    assert machine.installs()[0].endswith(" torch==2.13.0+cpu")
    assert not (root / ".venv" / "leyden-kept-torch.pth").exists()


def test_without_cpu_build_and_gpu_it_stops_before_cuda_comes(root: Path) -> None:
    machine = Machine(cpu_wheel=False)
    with pytest.raises(SetupError, match="PIP_EXTRA_INDEX_URL"):
        machine.set_up(root)
    assert [i.rpartition(" ")[2] for i in machine.installs()] == ["torch==2.13.0+cpu"]
    assert not (root / ".venv" / "leyden-setup.stamp").exists()


def test_a_machine_with_a_gpu_gets_the_default_build(root: Path) -> None:
    machine = Machine(gpu=True)
    machine.set_up(root)
    assert machine.installs()[0].endswith(" torch==2.13.0")


def test_a_mac_gets_the_default_build(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    machine = Machine()
    machine.set_up(root)
    assert machine.installs()[0].endswith(" torch==2.13.0")


def test_a_failing_pip_shows_its_last_lines(tmp_path: Path) -> None:
    output = "\n".join(f"line {n}" for n in range(100))
    with pytest.raises(SetupError, match="line 99") as caught:
        setup.pip_install(tmp_path, ["x"], run=lambda arguments: Result(1, output))
    assert "line 10\n" not in str(caught.value)


def test_python_names_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = setup.choose_python(sys.executable, venv=Path("/x"), run=Machine().run)
    assert chosen == Interpreter(sys.executable, (3, 11, 7))


def test_the_python_of_an_environment_stands_for_the_one_it_was_made_from(tmp_path: Path) -> None:
    progress = setup.Progress()
    progress.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "made")])
    python = str(tmp_path / "made" / "bin" / "python")
    base = setup.choose_python(python, venv=tmp_path / "made", run=progress.run)
    assert not base.executable.startswith(str(tmp_path))
    other = setup.choose_python(python, venv=tmp_path / "other", run=progress.run)
    assert other.executable == python


def test_an_interpreter_that_does_not_run_is_refused_by_name() -> None:
    with pytest.raises(SetupError, match="PYTHON='/no/such/python'"):
        setup.choose_python("/no/such/python", venv=Path("/x"), run=Machine().run)


def test_an_old_interpreter_is_refused_with_its_version() -> None:
    with pytest.raises(SetupError, match=r"3\.9\.2; Leyden needs 3\.11"):
        setup.choose_python(sys.executable, venv=Path("/x"), run=Machine(version="3.9.2").run)


def test_the_kept_torch_replaces_the_pin_only(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\ntorchdata==1.0\n")
    path = setup.write_constraints(tmp_path, tmp_path, KeptTorch("2.9.1", "/outer"))
    assert path.read_text() == "torch==2.9.1\ntorchdata==1.0\n"


def test_versions_compare_by_their_numbers() -> None:
    assert setup.release("2.13.0+cpu") == (2, 13, 0)
    assert setup.release("2.13.0+cpu") > setup.release("2.6")


def test_a_command_runs_to_its_end_and_its_output_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "HEARTBEAT_SECONDS", 0.05)
    progress = setup.Progress()
    code = "import os, sys, time; time.sleep(0.2); print(os.environ['X']); sys.exit(3)"
    result = progress.run([sys.executable, "-c", code], env={**os.environ, "X": "seen"})
    assert result == Result(3, "seen\n")


def test_the_real_files_hold_a_pin_and_a_floor() -> None:
    assert setup.torch_pin(setup.ROOT).startswith("torch==")
    assert setup.release(setup.torch_pin(setup.ROOT)[7:]) >= setup.torch_floor(setup.ROOT) > (0,)
