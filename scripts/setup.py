"""Make `.venv`: an environment with Leyden, what its demo needs and its development tools.

    python3 scripts/setup.py            # or: PYTHON=/path/to/python3 python3 scripts/setup.py

Only the standard library is used, and the file parses on old interpreters, so that the first thing a
newcomer sees is a sentence and not a traceback. Running it again is free: a stamp, written last, holds a hash
of all that decides the outcome. Whatever was interrupted is repaired by running it again.

The one trap is torch: on Linux the default wheel brings gigabytes of CUDA libraries. A torch that the chosen
interpreter already has is kept; a machine without a GPU gets the CPU build or a clear stop, never CUDA.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple  # noqa: UP035 - parses on interpreters that are too old to go on

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "demo,dev"
OLDEST_PYTHON = (3, 11)
HEARTBEAT_SECONDS = 20.0
TAIL_LINES = 25

CPU_INDEX_HELP = (
    "{requirement} was not found, and the default wheel would bring gigabytes of CUDA libraries to this "
    "machine, which has no GPU.\nLet pip see PyTorch's CPU index and run this again, for example by setting "
    "PIP_EXTRA_INDEX_URL to the address that pytorch.org gives for CPU;\nor install any torch>={floor} into "
    "{python} yourself: it will be kept."
)


class SetupError(Exception):
    """Say what stopped the set-up and what to do about it."""


class Result(NamedTuple):
    """Hold how a command ended."""

    returncode: int
    output: str
    """Standard output and standard error together."""


Run = Callable[..., Result]
"""`run(arguments, env=None) -> Result`: run a command to its end, whatever its status."""


class Interpreter(NamedTuple):
    """Describe the Python that the environment is made from."""

    executable: str
    version: tuple[int, int, int]


class KeptTorch(NamedTuple):
    """Describe a torch that the chosen interpreter already has."""

    version: str
    folder: str
    """The site-packages folder it lies in."""


def main() -> int:
    """Set up `.venv`; return the exit status."""
    progress = Progress()
    try:
        set_up(ROOT, run=progress.run, say=progress.say)
    except SetupError as error:
        print(f"\nset-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def set_up(root: Path, *, run: Run, say: Callable[[str], None]) -> None:
    """Bring `root/.venv` up to date, doing nothing where it is.

    Raises:
        SetupError: a step failed; the message says what to do.
    """
    venv = root / ".venv"
    stamp = venv / "leyden-setup.stamp"
    wanted = os.environ.get("PYTHON")
    if wanted is None and is_current(root, stamp):
        say(f"{venv.name} is up to date")
        return
    python = choose_python(wanted, venv=venv, run=run)
    if is_current(root, stamp, python=python):
        say(f"{venv.name} is up to date")
        return
    remove_if_present(stamp)
    kept = find_torch(python, floor=torch_floor(root), run=run)
    ensure_venv(venv, python, run=run, say=say)
    constraints = write_constraints(root, venv, kept)
    link_kept_torch(venv, kept, run=run)
    if kept:
        say(f"keeping torch {kept.version} of {python.executable}")
    else:
        install_torch(root, venv, python, run=run, say=say)
    say(f"installing leyden[{EXTRAS}] and what it needs")
    pip_install(venv, ["-c", str(constraints), "-e", f"{root}[{EXTRAS}]"], run=run)
    stamp.write_text(fingerprint(root, venv_version(venv)) + "\n")
    say(f"{venv.name} is ready")


# The stamp


def fingerprint(root: Path, python_version: str) -> str:
    """Hash all that decides what the environment holds. Its place counts: an editable install is absolute."""
    digest = hashlib.sha256()
    for part in (python_version, EXTRAS, str(root)):
        digest.update(part.encode() + b"\0")
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def is_current(root: Path, stamp: Path, *, python: Interpreter | None = None) -> bool:
    """Tell, starting no process, whether the environment is complete and made with `python` if given."""
    venv = stamp.parent
    version = venv_version(venv)
    if python is not None and version != ".".join(map(str, python.version)):
        return False
    if not stamp.is_file() or not os.access(venv / "bin" / "python", os.X_OK):
        return False
    return stamp.read_text().strip() == fingerprint(root, version)


def venv_version(venv: Path) -> str:
    """Read the Python version of an environment from its `pyvenv.cfg`; empty where there is none."""
    config = venv / "pyvenv.cfg"
    if not config.is_file():
        return ""
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+\.\d+)", config.read_text(), re.MULTILINE)
    return found.group(1) if found else ""


# The interpreter


def choose_python(wanted: str | None, *, venv: Path, run: Run) -> Interpreter:
    """Return `wanted`, or this interpreter, or the newest Python on the path that is new enough.

    The environment's own Python stands for the one it was made from: it may be about to be deleted.

    Raises:
        SetupError: there is none.
    """
    if wanted is not None:
        python = probe_python(wanted, venv=venv, run=run)
        if python is None:
            raise SetupError(f"PYTHON={wanted!r} is no Python that runs; give the path of one, at least 3.11")
        if python.version < OLDEST_PYTHON:
            raise SetupError(f"PYTHON={wanted!r} is {'.'.join(map(str, python.version))}; Leyden needs 3.11")
        return python
    names = [sys.executable, "python3.13", "python3.12", "python3.11"]
    for name in names:
        python = probe_python(name, venv=venv, run=run)
        if python is not None and python.version >= OLDEST_PYTHON:
            return python
    tried = ", ".join(names)
    raise SetupError(f"no Python 3.11 or newer was found (tried {tried}); name one with PYTHON=...")


def probe_python(name: str, *, venv: Path, run: Run) -> Interpreter | None:
    """Ask an interpreter who it is, or which one it is made from if it is `venv`'s; None where it fails."""
    if not shutil.which(name):
        return None
    code = (
        "import os, sys\n"
        "ours = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])\n"
        "print(sys._base_executable if ours else sys.executable, *sys.version_info[:3], sep='\\n')\n"
    )
    result = run([name, "-c", code, str(venv)])
    lines = result.output.split("\n")
    if result.returncode != 0 or len(lines) < 4:
        return None
    return Interpreter(lines[0], (int(lines[1]), int(lines[2]), int(lines[3])))


# The environment


def ensure_venv(venv: Path, python: Interpreter, *, run: Run, say: Callable[[str], None]) -> None:
    """Make the environment, or keep a healthy one; a half-made or foreign one is made anew.

    Raises:
        SetupError: this interpreter has neither `ensurepip` nor `pip`.
    """
    version = ".".join(map(str, python.version))
    if venv.exists():
        if venv_version(venv) == version and has_pip(venv, run=run):
            return
        say(f"removing {venv.name}: unfinished, or made with another Python")
        shutil.rmtree(venv)
    say(f"making {venv.name} with Python {version} ({python.executable})")
    run([python.executable, "-m", "venv", str(venv)])
    if has_pip(venv, run=run):
        return
    say("this Python cannot make one by itself; fetching virtualenv")
    shutil.rmtree(venv, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        # `--target` writes into a folder of our own, which is why it works where the system's Python refuses
        # installs (PEP 668).
        pip = [python.executable, "-m", "pip", "install", "-q", "--target", folder, "virtualenv"]
        if run(pip).returncode == 0:
            env = {**os.environ, "PYTHONPATH": folder}
            run([python.executable, "-m", "virtualenv", "-q", str(venv)], env=env)
    if not has_pip(venv, run=run):
        major, minor, _ = python.version
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(
            f"{python.executable} has neither ensurepip nor a working pip; on Debian and Ubuntu:\n"
            f"    sudo apt install python{major}.{minor}-venv"
        )


def has_pip(venv: Path, *, run: Run) -> bool:
    """Tell whether the environment's interpreter runs and has pip."""
    python = venv / "bin" / "python"
    return python.exists() and run([str(python), "-m", "pip", "--version"]).returncode == 0


def pip_install(venv: Path, arguments: list[str], *, run: Run) -> None:
    """Install into the environment.

    Raises:
        SetupError: pip failed; the message ends with its last lines.
    """
    result = run(pip_command(venv, arguments))
    if result.returncode != 0:
        raise SetupError(f"pip failed; its last lines:\n{tail(result.output)}")


def pip_command(venv: Path, arguments: list[str]) -> list[str]:
    """Spell one quiet `pip install`."""
    python = str(venv / "bin" / "python")
    return [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]


# Torch


def find_torch(python: Interpreter, *, floor: tuple[int, ...], run: Run) -> KeptTorch | None:
    """Return the torch that `python` already has, if it imports and is at least `floor`."""
    code = (
        "import importlib.util as u, os\n"
        "if u.find_spec('torch'):\n"
        "    import torch\n"
        "    print('torch', torch.__version__, os.path.dirname(os.path.dirname(torch.__file__)), sep='\\n')\n"
    )
    result = run([python.executable, "-c", code])
    lines = result.output.strip().split("\n")
    if result.returncode != 0 or len(lines) < 3 or lines[-3] != "torch":
        return None
    if release(lines[-2]) < floor:
        return None
    return KeptTorch(lines[-2], lines[-1])


def link_kept_torch(venv: Path, kept: KeptTorch | None, *, run: Run) -> None:
    """Let the environment see the folder of a kept torch, behind its own packages.

    `--system-site-packages` is not enough: where `python` is itself in a virtual environment, it shows the
    system's packages and not that environment's.
    """
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    result = run([str(venv / "bin" / "python"), "-c", code])
    link = Path(result.output.strip()) / "leyden-kept-torch.pth"
    if kept:
        link.write_text(kept.folder + "\n")
    else:
        remove_if_present(link)


def install_torch(root: Path, venv: Path, python: Interpreter, *, run: Run, say: Callable[[str], None]) -> None:
    """Install the pinned torch: on Linux without a GPU the CPU build, elsewhere the default one.

    Raises:
        SetupError: pip failed, or the CPU build is not to be found. The CUDA build is never the way out.
    """
    pin = torch_pin(root)
    if not sys.platform.startswith("linux") or has_gpu(run=run):
        say(f"installing {pin}")
        pip_install(venv, [pin], run=run)
        return
    requirement = f"{pin}+cpu"
    say(f"installing {requirement}")
    # Without the constraints: next to them, pip calls a build that is not there a conflict of versions.
    result = run(pip_command(venv, [requirement]))
    if result.returncode == 0:
        return
    if "No matching distribution" in result.output:
        floor = ".".join(map(str, torch_floor(root)))
        raise SetupError(CPU_INDEX_HELP.format(requirement=requirement, floor=floor, python=python.executable))
    raise SetupError(f"pip failed; its last lines:\n{tail(result.output)}")


def has_gpu(*, run: Run) -> bool:
    """Tell whether this machine has an NVIDIA GPU that the driver sees."""
    if Path("/dev/nvidia0").exists():
        return True
    return bool(shutil.which("nvidia-smi")) and run(["nvidia-smi", "-L"]).returncode == 0


def torch_pin(root: Path) -> str:
    """Read "torch==X" from the constraints.

    Raises:
        SetupError: there is no such line.
    """
    found = re.search(r"^torch==[\w.]+$", (root / "constraints.txt").read_text(), re.MULTILINE)
    if not found:
        raise SetupError("constraints.txt holds no line torch==VERSION")
    return found.group(0)


def torch_floor(root: Path) -> tuple[int, ...]:
    """Read the oldest torch that Leyden works with from pyproject.toml."""
    found = re.search(r'"torch>=([\d.]+)"', (root / "pyproject.toml").read_text())
    return release(found.group(1)) if found else (0,)


def release(version: str) -> tuple[int, ...]:
    """Read the numbers in front of a version: "2.13.0+cpu" is (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in found.group(0).split(".")) if found else (0,)


def write_constraints(root: Path, venv: Path, kept: KeptTorch | None) -> Path:
    """Write the constraints to install with; a kept torch takes the place of the pin."""
    text = (root / "constraints.txt").read_text()
    if kept:
        text = re.sub(r"^torch==.*$", f"torch=={kept.version}", text, flags=re.MULTILINE)
    path = venv / "leyden-constraints.txt"
    path.write_text(text)
    return path


# Running and telling


class Progress:
    """Run commands and tell how far the set-up is, with the time since its start."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def run(self, arguments: list[str], env: dict[str, str] | None = None) -> Result:
        """Run a command and keep its output; a long one shows a sign of life now and then."""
        process = subprocess.Popen(
            arguments,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=HEARTBEAT_SECONDS)
                    return Result(process.returncode, output)
                except subprocess.TimeoutExpired:
                    self.say("  still at it")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def tail(output: str) -> str:
    """Return the last lines of a command's output, indented."""
    return "\n".join("    " + line for line in output.rstrip().split("\n")[-TAIL_LINES:])


def remove_if_present(path: Path) -> None:
    """Delete a file that may not be there."""
    if path.exists():
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
