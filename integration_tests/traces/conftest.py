"""Programs that these tests run, each with an environment of its own that is built only when asked for."""

from pathlib import Path

import pytest

from scripts.environments import STAMP, traces_folder


def interpreter(name: str) -> Path:
    """Return an environment's interpreter; skip the test where it is not built."""
    folder = traces_folder(name)
    if not (folder / STAMP).is_file():
        pytest.skip(f"its environment is not built; python scripts/environments.py --traces {name}")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def phoenix_python() -> Path:
    """Return the interpreter that has Phoenix."""
    return interpreter("phoenix")


@pytest.fixture(scope="session")
def autogen_python() -> Path:
    """Return the interpreter that has AutoGen and OpenInference's instrumentors, and no Leyden."""
    return interpreter("autogen")
