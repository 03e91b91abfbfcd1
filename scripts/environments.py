"""Make environments beside `.venv`, for tests of what users have installed.

    python scripts/environments.py langchain       # Leyden with some of its extras alone; prints the interpreter
    python scripts/environments.py --lanes         # every lane of the framework tests
    python scripts/environments.py --vllm          # a vLLM server for the CPU; prints the interpreter
    python scripts/environments.py --agent-lightning  # Agent Lightning 0.3, for the benchmark of prompts; likewise
    python scripts/environments.py --traces phoenix autogen  # for tests of traces: a Phoenix server, a traced app

An environment of extras shows what `pip install leyden[...]` brings. A lane holds exactly what its lock file pins:
many frameworks at once, in versions that were resolved together. The vLLM server's, Agent Lightning's and those
of traces hold no Leyden: they are started as programs.

They lie in `build/environments/` under a hash of all that decides what they hold, so a second call is free. Leyden
itself is installed in place: its sources may change without an environment being made anew, and for a lane, which
takes none of Leyden's own requirements, so may everything in pyproject.toml but the entry points.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from scripts.setup import (  # noqa: E402 - after the path
    Interpreter,
    Progress,
    Run,
    SetupError,
    ensure_venv,
    pip_install,
    torch_pin,
)

STAMP = "leyden-environment.stamp"
LOCKS = "integration_tests/frameworks/environments"
"""Folder of the lock files; the `.in` beside each says what was asked for."""

VLLM_LOCK = "integration_tests/vllm/environment/vllm.txt"

AGENT_LIGHTNING_LOCK = "benchmarks/prompt_tasks/agent_lightning.txt"

TRACES_LOCKS = "integration_tests/traces"
"""Folder of the lock files of programs that tests of traces run."""

DIGEST_LENGTH = 12


def environment(extras: Sequence[str], *, root: Path = ROOT, run: Run | None = None) -> Path:
    """Return the interpreter of an environment that holds `leyden[extras]` alone, made where it is missing.

    Raises:
        SetupError: it cannot be made; the message says why.
    """
    name = f"leyden[{','.join(extras)}]"
    install = ["-c", str(root / "constraints.txt"), "-e", f"{root}[{','.join(extras)}]"]
    return make(environment_folder(extras, root), f"{name} and what it needs", [install], run=run)


def lane(name: str, *, root: Path = ROOT, run: Run | None = None) -> Path:
    """Return the interpreter of a lane, made where it is missing.

    Raises:
        SetupError: it cannot be made; the message says why.
    """
    lock = root / LOCKS / f"{name}.txt"
    installs = [["--no-deps", "-r", str(lock)], ["--no-deps", "-e", str(root)]]
    return make(lane_folder(name, root), f"the packages of {lock.name}", installs, run=run)


def lanes(root: Path = ROOT) -> list[str]:
    """Return the names of all lanes."""
    return sorted(lock.stem for lock in (root / LOCKS).glob("*.txt"))


def vllm(*, root: Path = ROOT, run: Run | None = None) -> Path:
    """Return the interpreter of the environment with vLLM for the CPU, made where it is missing.

    Raises:
        SetupError: it cannot be made, or there is no such vLLM for this system; the message says why.
    """
    if not sys.platform.startswith("linux"):
        raise SetupError(f"the tests' vLLM server is built for Linux only, and this is {sys.platform!r}")
    # torch goes first and alone: pip finds its CPU build only where nothing else is asked for beside it.
    installs = [["--no-deps", f"{torch_pin(root)}+cpu"], ["--no-deps", "-r", str(root / VLLM_LOCK)]]
    return make(vllm_folder(root), "vLLM for the CPU (half a gigabyte to fetch)", installs, run=run)


def agent_lightning(*, root: Path = ROOT, run: Run | None = None) -> Path:
    """Return the interpreter of the environment with Agent Lightning, made where it is missing.

    Raises:
        SetupError: it cannot be made; the message says why.
    """
    folder = agent_lightning_folder(root)
    install = ["--no-deps", "-r", str(root / AGENT_LIGHTNING_LOCK)]
    return make(folder, "Agent Lightning (700 MB on disk)", [install], run=run)


def traces(name: str, *, root: Path = ROOT, run: Run | None = None) -> Path:
    """Return the interpreter of a program that tests of traces run, made where it is missing.

    Raises:
        SetupError: it cannot be made; the message says why.
    """
    lock = root / TRACES_LOCKS / f"{name}.txt"
    return make(traces_folder(name, root), f"the packages of {lock.name}", [["--no-deps", "-r", str(lock)]], run=run)


def environment_folder(extras: Sequence[str], root: Path) -> Path:
    """Return where an environment of extras belongs."""
    contents = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return folder_for("-".join(sorted(extras)) or "base", root, [*map(str.encode, sorted(extras)), *contents])


def lane_folder(name: str, root: Path) -> Path:
    """Return where a lane belongs."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    installed = repr([project.get(key) for key in ("entry-points", "scripts")])
    return folder_for(name, root, [(root / LOCKS / f"{name}.txt").read_bytes(), installed.encode()])


def vllm_folder(root: Path) -> Path:
    """Return where the environment with vLLM belongs."""
    return folder_for("vllm", root, [(root / VLLM_LOCK).read_bytes(), torch_pin(root).encode()])


def agent_lightning_folder(root: Path) -> Path:
    """Return where the environment with Agent Lightning belongs."""
    return folder_for("agent-lightning", root, [(root / AGENT_LIGHTNING_LOCK).read_bytes()])


def traces_folder(name: str, root: Path = ROOT) -> Path:
    """Return where the environment of a program that tests of traces run belongs."""
    return folder_for(f"traces-{name}", root, [(root / TRACES_LOCKS / f"{name}.txt").read_bytes()])


def folder_for(name: str, root: Path, contents: Iterable[bytes]) -> Path:
    """Return a folder: a name for people, then a hash of what decides its contents."""
    digest = hashlib.sha256()
    # Its place counts: an install in place is absolute.
    for part in (sys.version.encode(), str(root).encode(), *contents):
        digest.update(part + b"\0")
    return root / "build" / "environments" / f"{name}-{digest.hexdigest()[:DIGEST_LENGTH]}"


def make(folder: Path, what: str, installs: Sequence[list[str]], *, run: Run | None) -> Path:
    """Return the interpreter in `folder`, making the environment where it is not complete.

    Raises:
        SetupError: it cannot be made; the message says why.
    """
    python = folder / "bin" / "python"
    if (folder / STAMP).is_file():
        return python
    progress = Progress()
    run = run or progress.run
    for old in folder.parent.glob(folder.name[:-DIGEST_LENGTH] + "[0-9a-f]" * DIGEST_LENGTH):
        shutil.rmtree(old)
    major, minor, micro = sys.version_info[:3]
    base = Interpreter(getattr(sys, "_base_executable", sys.executable), (major, minor, micro))
    folder.parent.mkdir(parents=True, exist_ok=True)
    ensure_venv(folder, base, run=run, say=progress.say)
    progress.say(f"installing {what}")
    for arguments in installs:
        pip_install(folder, arguments, run=run)
    (folder / STAMP).write_text("complete\n")
    return python


if __name__ == "__main__":
    if sys.argv[1:] == ["--lanes"]:
        for each in lanes():
            print(lane(each))
    elif sys.argv[1:] == ["--vllm"]:
        print(vllm())
    elif sys.argv[1:] == ["--agent-lightning"]:
        print(agent_lightning())
    elif sys.argv[1:2] == ["--traces"]:
        for each in sys.argv[2:]:
            print(traces(each))
    else:
        print(environment(sys.argv[1:]))
