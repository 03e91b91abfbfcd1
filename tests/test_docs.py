"""What the README and `docs/` say exists: links, commands, make targets, messages, names in code."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from leyden.cli import COMMANDS
from leyden.plugins import load_plugins
from leyden_plugins.observers.metrics import METRICS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
ANOTHER_PACKAGE = ("my_app", "acme_leyden")

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def python_blocks() -> list[tuple[str, str]]:
    """Every Python sample with a name for it."""
    return [
        (f"{path.relative_to(ROOT)}-{index}", code)
        for path in PAGES
        for index, (language, code) in enumerate(BLOCK.findall(path.read_text()))
        if language == "python"
    ]


def words_in_code(text: str) -> list[str]:
    """Every line of a code block and every piece of inline code."""
    fenced = [line for _, code in BLOCK.findall(text) for line in code.splitlines()]
    return fenced + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


@page
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", FENCED.sub("", page.read_text()))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@page
def test_paths_in_code_exist(page: Path) -> None:
    tops = ("core", "plugins", "tests", "integration_tests", "examples", "benchmarks", "docs", "scripts")
    found = {
        path
        for piece in words_in_code(page.read_text())
        for path in re.findall(rf"(?:^|(?<=[\s`(]))(?:{'|'.join(tops)})/[\w./]*", piece)
    }
    assert [path for path in sorted(found) if "..." not in path and not (ROOT / path.rstrip(".")).exists()] == []


@page
def test_commands_exist(page: Path) -> None:
    known = {*COMMANDS, *load_plugins().names("command"), "acme"}
    named = re.findall(r"(?:^|[\s`/])leyden ([a-z]+)", "\n".join(words_in_code(page.read_text())), re.MULTILINE)
    assert [name for name in named if name not in known] == []


@page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^(?:\$ )?make ([a-z-]+)", "\n".join(words_in_code(page.read_text())), re.MULTILINE)
    assert [name for name in named if name not in targets] == []


@pytest.mark.parametrize(("name", "code"), python_blocks(), ids=[name for name, _ in python_blocks()])
def test_a_python_sample_parses_and_names_what_exists(name: str, code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(ANOTHER_PACKAGE):
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        is_of_leyden = (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "leyden"
        )
        if is_of_leyden:
            assert hasattr(import_module("leyden"), node.attr), f"leyden.{node.attr}"


def test_the_messages_that_the_docs_explain_are_those_of_the_code() -> None:
    rows = (ROOT / "docs" / "bring_your_own_agent.md").read_text().partition("## When something is wrong")[2]
    messages = re.findall(r"^\| `(?:\.\.\. )?([^`]+)` \|", rows, re.MULTILINE)
    source = "\n".join(path.read_text() for path in (ROOT / "core" / "leyden").rglob("*.py"))
    assert len(messages) >= 5
    assert [message for message in messages if message not in source] == []


def test_every_metric_is_explained() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in text] == []


def test_the_plugin_page_names_every_kind_and_shows_what_acme_does() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    kinds = {kind for kind, _ in load_plugins().components}
    assert [kind for kind in sorted(kinds) if f"`{kind}`" not in text] == []
    package = ROOT / "tests" / "packages" / "acme_leyden"
    assert 'acme = "acme_leyden"' in (package / "pyproject.toml").read_text()
    registered = re.findall(r"^    registry\..*$", text, re.MULTILINE)
    assert registered and all(line in (package / "acme_leyden" / "__init__.py").read_text() for line in registered)
