"""Look at this machine and what is installed, and say what is missing, broken or fine.

One idea: only what cannot work although it is installed is broken; what is not installed comes with the line that
installs it. Torch is asked in a process of its own: importing it here would make every other check as slow.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal, cast

from leyden.errors import MissingExtraError, PluginError
from leyden.interfaces import FrameworkAdapter
from leyden.plugins import Plugins, load_plugins

LOW_DISK_BYTES = 2 * 2**30
TORCH_SECONDS = 120
_LEAST_PYTHON = (3, 11)
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?:>=\s*([0-9.]+))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_ASK_TORCH = (
    "import torch; d = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]; "
    "print(torch.__version__, '|', torch.get_num_threads(), '|', ', '.join(d))"
)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    mark: Literal["ok", "missing", "note", "BROKEN"]
    text: str

    @property
    def is_broken(self) -> bool:
        return self.mark == "BROKEN"


def doctor() -> list[Finding]:
    """Check everything."""
    found = [_python(), *_machine(), _torch(), *_extras()]
    try:
        plugins = load_plugins()
    except PluginError as error:
        return [*found, Finding("BROKEN", f"plugins: {error}")]
    return found + _plugins(plugins) + _frameworks(plugins)


def _python() -> Finding:
    text = f"Python {platform.python_version()} ({sys.executable}), leyden {_version('leyden') or 'not installed'}"
    return Finding("ok" if sys.version_info >= _LEAST_PYTHON else "BROKEN", text)


def _machine() -> list[Finding]:
    free = shutil.disk_usage(".").free
    disk = f"{free / 2**30:.1f} GiB free in {os.getcwd()}"
    if free < LOW_DISK_BYTES:
        disk += "; checkpoints and the store may not fit"
    return [
        Finding("ok", f"{platform.platform()}, {os.cpu_count()} CPUs"),
        Finding("note" if free < LOW_DISK_BYTES else "ok", disk),
    ]


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("missing", "torch (training and serving): pip install 'leyden[train]'")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Finding("BROKEN", f"torch is installed but cannot be imported: {lines[-1] if lines else error}")
    version, threads, devices = (part.strip() for part in answer.stdout.strip().split("|"))
    return Finding("ok", f"torch {version}: {devices or 'no GPU'}, {threads} CPU threads")


def _extras() -> list[Finding]:
    """Say of each extra whether all it needs is there, with the floors of the metadata."""
    try:
        requirements = importlib.metadata.requires("leyden") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("note", "leyden runs from a source folder; extras are unknown until it is installed")]
    lacking: dict[str, list[str]] = {}
    for requirement in requirements:
        named, extra = _REQUIREMENT.match(requirement), _EXTRA.search(requirement)
        if named is None or extra is None or extra[1] == "dev":
            continue
        name, floor = named[1], named[2]
        missing = lacking.setdefault(extra[1], [])
        version = _version(name)
        if version is None:
            missing.append(name)
        elif floor and _numbers(version) < _numbers(floor):
            missing.append(f"{name}>={floor} (here {version})")
    return [
        Finding("missing", f"extra {extra!r} lacks {', '.join(names)}: pip install 'leyden[{extra}]'")
        if names
        else Finding("ok", f"extra {extra!r} is installed")
        for extra, names in sorted(lacking.items())
    ]


def _plugins(plugins: Plugins) -> list[Finding]:
    found = [Finding("ok", f"plugins: {', '.join(plugins.loaded) or 'none'}")]
    return found + [
        Finding("BROKEN", f"plugin {one.name!r} of {one.package}: {type(one.error).__name__}: {one.error}")
        for one in plugins.broken
    ]


def _frameworks(plugins: Plugins) -> list[Finding]:
    return [_framework(plugins, name) for name in plugins.names("framework")]


def _framework(plugins: Plugins, name: str) -> Finding:
    """Attach one adapter and take it off again."""
    try:
        adapter = cast("FrameworkAdapter", plugins.get("framework", name)())
        if importlib.util.find_spec(adapter.module) is None:
            return Finding("missing", f"framework {name!r} is not installed")
        importlib.import_module(adapter.module)
        try:
            adapter.attach()
        finally:
            adapter.detach()
    except MissingExtraError as error:
        return Finding("missing", f"framework {name!r}: {error}")
    except Exception as error:
        # Whatever a framework or an adapter raises here is the finding.
        return Finding("BROKEN", f"framework {name!r}: {type(error).__name__}: {error}")
    return Finding("ok", f"framework {name!r}: {adapter.module} {_version(adapter.module) or ''}, hooks attach")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; enough to compare with a floor."""
    found = []
    for part in version.split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        found.append(int(digits[0]))
    return tuple(found)
