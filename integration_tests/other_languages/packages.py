"""Install what npm lock files pin, once a lock file: `build/node/<name>-<hash>/`.

The folder holds the example's own files beside `node_modules`, because Node looks for modules from where a file lies.
"""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "node"
PINS = ("package.json", "package-lock.json")
STAMP = "complete"
INSTALL_SECONDS = 280


def npm_folder(source: Path) -> Path:
    """Return a folder with the packages that `source` pins and a fresh copy of its other files.

    A test that cannot have them fails, and says why.
    """
    digest = hashlib.sha256(f"{sys.platform} {platform.machine()}".encode())
    for pin in PINS:
        digest.update((source / pin).read_bytes() + b"\0")
    folder = BUILD / f"{source.name}-{digest.hexdigest()[:12]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{source.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of two processes may want the same folder
        if not (folder / STAMP).is_file():
            install(source, folder)
        for file in source.iterdir():
            if file.is_file() and file.name not in PINS:
                copy = folder / file.name
                if not (copy.exists() and filecmp.cmp(file, copy, shallow=False)):  # the same one may be running
                    shutil.copy(file, copy)
    return folder


def install(source: Path, folder: Path) -> None:
    """Install into a folder, in place of what older lock files left."""
    for old in BUILD.glob(f"{source.name}-*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True)
    for pin in PINS:
        shutil.copy(source / pin, folder)
    argv = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"{' '.join(argv)}: {error}; these tests need Node 20 or newer, npm, and npm's registry")
    if done.returncode:
        pytest.fail(f"{' '.join(argv)} in {folder} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    (folder / STAMP).touch()
