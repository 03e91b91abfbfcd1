"""A plugin that a third party could have written is installed by pip and used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tests" / "packages" / "acme_leyden"

USE_IT = """
import asyncio
from leyden.errors import ConfigurationError
from leyden.interfaces import Algorithm, MetricSink
from leyden.plugins import load_plugins

plugins = load_plugins()
assert plugins.broken == (), plugins.broken
assert plugins.loaded == ("builtin", "acme"), plugins.loaded
import sys
assert "acme_leyden.algorithm" not in sys.modules, "listing imported a component"

class Session:
    finished = {}
    async def steps(self):
        yield 1
        yield 2
    async def sample(self, step, *, group_size):
        return ["group"] * group_size
    async def finish_step(self, step, groups, metrics):
        self.finished[step] = metrics
        plugins.hook.step_finished(step=step, metrics=metrics)
        sink.step_finished(step, metrics)

algorithm: Algorithm = plugins.get("algorithm", "acme")(group_size=3)
sink: MetricSink = plugins.get("sink", "acme")()
algorithm.check([])
asyncio.run(algorithm.run(Session()))
assert Session.finished == {1: {"acme/groups": 3.0}, 2: {"acme/groups": 3.0}} == sink.metrics
assert sys.modules["acme_leyden"].steps == [1, 2]
try:
    plugins.get("algorithm", "acme")(group_size=1).check([])
except ConfigurationError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package, from a copy, without the network."""
    folder = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(PACKAGE, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "site"


def run_python(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_an_installed_plugin_is_found_used_and_told_of_steps(site: Path) -> None:
    result = run_python(site, USE_IT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "refused: group_size=1 must be at least 2\n"


def test_an_installed_plugin_can_be_switched_off(site: Path) -> None:
    code = "from leyden.plugins import load_plugins; print(*load_plugins().loaded)"
    result = run_python(site, code, LEYDEN_PLUGINS_DISABLE="acme")
    assert result.stdout == "builtin\n"
