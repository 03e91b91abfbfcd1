"""The wheel and the sdist hold what they should and work where nothing else of Leyden is."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fresh sdist and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_wheel_holds_both_packages_typed_and_the_entry_points(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert {"leyden/py.typed", "leyden_plugins/py.typed", "leyden/plugins.py"} <= names
    assert "builtin = leyden_plugins" in text
    assert "leyden = leyden.cli:main" in text
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"leyden", "leyden_plugins"}


def test_the_wheel_has_every_module_of_the_sources(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {str(path.relative_to(ROOT / top)) for top in ("core", "plugins") for path in (ROOT / top).rglob("*.py")}
    assert sources <= names


def test_the_sdist_holds_the_tests_and_no_runs(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"core", "plugins", "tests", "constraints.txt", "LICENSE", "pyproject.toml"} <= tops
    assert not {"runs", ".venv", "build"} & tops


def test_the_installed_wheel_lists_its_plugins(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    options = ["--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, str(wheel)], check=True)
    code = "import leyden.plugins as p; print(p.__file__, *p.load_plugins().names('algorithm'))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.stdout.startswith(str(tmp_path)), result.stderr
    assert "grpo" in result.stdout
