"""Real vLLM servers on this machine's CPU, few of them: one takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration_tests.vllm.checkpoints import random_checkpoint, teach_a_tool_call
from integration_tests.vllm.figures import Figures
from integration_tests.vllm.gates import Gate, serving
from leyden.roles import Policy
from scripts import environments

FIGURES = Figures()


@pytest.fixture(scope="session")
def figures() -> Figures:
    """What the tests have measured, printed at the end."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it."""
    if FIGURES.servers:
        terminalreporter.section("vLLM")
        for line in FIGURES.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of an environment with vLLM."""
    return environments.vllm()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for checkpoints."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tied(models: Path) -> Path:
    """A random checkpoint whose head is its embeddings: on a CPU the hard case."""
    return random_checkpoint(models / "tied", seed=0, tied=True)


@pytest.fixture(scope="session")
def other_tied(models: Path) -> Path:
    """Other weights for it."""
    return random_checkpoint(models / "other_tied", seed=1, tied=True)


@pytest.fixture(scope="session")
def speaking(models: Path) -> Path:
    """Weights for it that have learnt to call a tool."""
    return teach_a_tool_call(random_checkpoint(models / "speaking", seed=0, tied=True))


@pytest.fixture(scope="session")
def whole(tied: Path, python: Path, figures: Figures, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """One server of the tied checkpoint, and a policy `me` that trains all of its weights."""
    log_folder = tmp_path_factory.mktemp("whole")
    with serving(tied, [Policy("me")], python=python, log_folder=log_folder, figures=figures) as gate:
        yield gate
