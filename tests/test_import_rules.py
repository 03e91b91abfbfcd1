"""Who may import whom. Every import counts: at the top, in a function, under `if TYPE_CHECKING`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "leyden"
PLUGINS = ROOT / "plugins" / "leyden_plugins"
EXAMPLES = ROOT / "examples"

ORDER = """
errors extras redaction
spans roles context lastcall activity usage looping
hookspecs plugins interfaces ownership
sqlite
tokentree layouts credit calltree mdp conversations demonstrations metrics stepwise chain rewards
patching wire endpoints instrumentation
running feedback recording spantree show training
deploying __init__ testing
doctor cli __main__
"""
CORE_ORDER = tuple(ORDER.split())
"""Modules of the core; each imports only from those before it. A package counts as one module."""

CORE_THIRD_PARTIES = {"pluggy", "msgspec"}
TORCH_FOLDERS = {"engines", "learners", "torch_models"}
SHARED = {"torch_models": {"engines", "learners"}, "chat": {"engines", "rewards", "algorithms"}}
"""Folders that are no plugin of their own, and who may import them."""


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything imported: "a.b" for `from a import b`, ".b" for a relative one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def core_module(name: str) -> str:
    """Name the core module that an imported "leyden.x.y" belongs to."""
    part = name.partition(".")[2].partition(".")[0]
    is_module = (CORE / f"{part}.py").exists() or (CORE / part).is_dir() or part in CORE_ORDER
    return part if part and is_module else "__init__"


def core_faults(module: str, source: str) -> list[str]:
    """List what a core module must not import."""
    if module not in CORE_ORDER:
        return [f"core/leyden/{module} has no place yet: add it to CORE_ORDER in tests/test_import_rules.py"]
    faults = []
    for name in imports(source):
        top = name.partition(".")[0]
        if top == "leyden":
            other = core_module(name)
            if other != module and other not in CORE_ORDER[: CORE_ORDER.index(module)]:
                faults.append(f"{module} imports {name}, which is not to its left in CORE_ORDER")
        elif name.startswith("."):
            faults.append(f"{module} has the relative import {name}")
        elif top not in sys.stdlib_module_names and top not in CORE_THIRD_PARTIES:
            faults.append(f"{module} imports {name}: the core has no such dependency")
    return faults


def plugin_faults(folder: str, source: str) -> list[str]:
    """List what a module in `leyden_plugins/<folder>` must not import."""
    faults = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        if top == "leyden_plugins":
            other = rest.partition(".")[0]
            if other != folder and folder not in SHARED.get(other, ()):
                faults.append(f"{folder} imports {name}, another plugin")
        elif name.startswith("."):
            faults.append(f"{folder} has the relative import {name}")
        elif top == "torch" and folder not in TORCH_FOLDERS:
            faults.append(f"{folder} imports torch, which lives in {', '.join(sorted(TORCH_FOLDERS))}")
    return faults


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def identify(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


@pytest.mark.parametrize("path", python_files(CORE), ids=identify)
def test_core_modules_import_only_to_their_left(path: Path) -> None:
    module = path.relative_to(CORE).parts[0].removesuffix(".py")
    assert core_faults(module, path.read_text()) == []


@pytest.mark.parametrize("path", python_files(PLUGINS), ids=identify)
def test_plugins_import_no_other_plugin_and_torch_stays_in_its_folders(path: Path) -> None:
    folder = path.relative_to(PLUGINS).parts[0].removesuffix(".py")
    assert plugin_faults(folder, path.read_text()) == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("agent.py")), ids=identify)
def test_the_agents_of_the_examples_know_nothing_of_leyden(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports(path.read_text())}
    assert not tops & {"leyden", "leyden_plugins"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spans", "from leyden.errors import StoreError"),
        ("spans", "from leyden import errors"),
        ("spans", "import json, msgspec"),
        ("testing", "from leyden.testing.fakes import FakeEngine"),
        ("cli", "from leyden import Trainer"),
    ],
)
def test_the_rule_for_the_core_allows(module: str, source: str) -> None:
    assert core_faults(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("errors", "import leyden.spans", "not to its left"),
        ("errors", "def f():\n    from leyden import spans", "not to its left"),
        ("errors", "if TYPE_CHECKING:\n    from leyden.training.trainer import Trainer", "not to its left"),
        ("training", "from leyden import Policy", "not to its left"),
        ("spans", "import numpy as np", "no such dependency"),
        ("spans", "import leyden_plugins", "no such dependency"),
        ("spans", "from .errors import StoreError", "relative import"),
        ("brand_new", "", "add it to CORE_ORDER"),
    ],
)
def test_the_rule_for_the_core_refuses(module: str, source: str, fault: str) -> None:
    (found,) = core_faults(module, source)
    assert fault in found


@pytest.mark.parametrize(
    ("folder", "source", "is_fine"),
    [
        ("engines", "import torch\nfrom leyden_plugins.torch_models import load", True),
        ("gateway", "from leyden_plugins.gateway.dialects import chat\nimport starlette", True),
        ("algorithms", "import torch", False),
        ("algorithms", "from leyden_plugins.torch_models import load", False),
        ("engines", "from leyden_plugins.learners.torch import TorchLearner", False),
        ("torch_models", "from leyden_plugins.engines import transformers", False),
    ],
)
def test_the_rule_for_plugins(folder: str, source: str, is_fine: bool) -> None:
    assert (plugin_faults(folder, source) == []) is is_fine
