"""Make small environments, each with Leyden and some of its extras alone, for tests of what a user has installed.

    python scripts/environments.py langchain       # prints the environment's interpreter

They lie in `build/environments/` under a hash of all that decides what they hold, so a second call is free. Leyden
itself is installed in place: its sources may change without the environment being made anew.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from scripts.setup import Interpreter, Progress, Run, ensure_venv, pip_install  # noqa: E402 - after the path

STAMP = "leyden-environment.stamp"


def environment(extras: Sequence[str], *, root: Path = ROOT, run: Run | None = None) -> Path:
    """Return the interpreter of an environment that holds `leyden[extras]` alone, made where it is missing.

    Raises:
        SetupError: it cannot be made; the message says why.
    """
    progress = Progress()
    run = run or progress.run
    folder = environment_folder(extras, root)
    python = folder / "bin" / "python"
    if (folder / STAMP).is_file():
        return python
    for old in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        shutil.rmtree(old)
    major, minor, micro = sys.version_info[:3]
    base = Interpreter(getattr(sys, "_base_executable", sys.executable), (major, minor, micro))
    folder.parent.mkdir(parents=True, exist_ok=True)
    ensure_venv(folder, base, run=run, say=progress.say)
    progress.say(f"installing leyden[{','.join(extras)}] and what it needs")
    pip_install(folder, ["-c", str(root / "constraints.txt"), "-e", f"{root}[{','.join(extras)}]"], run=run)
    (folder / STAMP).write_text("complete\n")
    return python


def environment_folder(extras: Sequence[str], root: Path) -> Path:
    """Return where the environment belongs: a name for people, then a hash of what decides its contents."""
    digest = hashlib.sha256()
    for part in (sys.version, str(root), *sorted(extras)):
        digest.update(part.encode() + b"\0")
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes() + b"\0")
    return root / "build" / "environments" / f"{'-'.join(sorted(extras)) or 'base'}-{digest.hexdigest()[:12]}"


if __name__ == "__main__":
    print(environment(sys.argv[1:]))
