"""Turn every skip that nobody expected into a failure.

A test that is skipped in silence protects nothing. Skips that are meant stand in `tests/expected_skips.toml`
with their reason; any other is reported as failed, so that pytest's closing line and exit status are true.
"""

import os
import signal
import tomllib
from collections.abc import Generator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

EXPECTED_SKIPS = Path(__file__).parent / "tests" / "expected_skips.toml"
CUDA_SKIP = "needs a CUDA device"


@dataclass(frozen=True)
class ExpectedSkip:
    """Describe skips that are meant."""

    test: str
    """Pattern of node ids, in the way of a shell."""
    message: str
    """A part of the message that the skip gives."""
    why: str


def read_expected_skips(path: Path) -> list[ExpectedSkip]:
    """Read the list; an entry with a missing field is an error."""
    return [ExpectedSkip(**entry) for entry in tomllib.loads(path.read_text()).get("skip", [])]


def is_expected(skips: list[ExpectedSkip], *, nodeid: str, message: str) -> bool:
    """Tell whether an entry covers this skip."""
    return any(fnmatchcase(nodeid, skip.test) and skip.message in message for skip in skips)


def pytest_configure(config: pytest.Config) -> None:
    # Two threads that wait for each other on a busy machine take four times the time; models here are tiny.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # What starts a worker imports readline, which exports the width of a terminal that is none.
        os.environ.pop("COLUMNS", None)
    config.stash[SKIPS] = read_expected_skips(EXPECTED_SKIPS)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background by a shell: tests of Ctrl-C, and the processes they start, would never see one.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device. Torch is imported only where one is marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not cuda_is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=CUDA_SKIP))


def cuda_is_available() -> bool:
    """Ask torch for a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        refuse_unexpected(report, item.config.stash[SKIPS])
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        refuse_unexpected(report, collector.config.stash[SKIPS])
    return report


def refuse_unexpected(report: pytest.TestReport | pytest.CollectReport, skips: list[ExpectedSkip]) -> None:
    """Make the report of an unexpected skip a failure that says what to do."""
    message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not is_expected(skips, nodeid=report.nodeid, message=message):
        report.outcome = "failed"
        report.longrepr = (
            f"unexpected skip of {report.nodeid}: {message}\n"
            "Make the test run, or write the skip and its reason into tests/expected_skips.toml."
        )


SKIPS = pytest.StashKey[list[ExpectedSkip]]()
