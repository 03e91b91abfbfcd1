"""Keep what was measured in one file, each figure with its device, date, versions and command."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from leyden.training.summary import package_versions

FILE = Path(__file__).resolve().parents[1] / "results" / "gpu.json"


def keep(name: str, figures: Mapping[str, object], *, file: Path = FILE) -> None:
    """Put the figures of one benchmark in place of its earlier ones, and print them."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    found[name] = {
        "device": device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join([f"python -m {module_name()}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | package_versions(),
        "figures": dict(figures),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    print(json.dumps({name: figures}, indent=2))


def device_name() -> str:
    """Return the GPU's name, or what stands in for one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def module_name() -> str:
    """Return the name of the module that was started."""
    main = sys.modules["__main__"].__spec__
    return main.name if main is not None else Path(sys.argv[0]).name
