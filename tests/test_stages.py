"""The staged run of all checks, and the rule that an unexpected skip is red."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import stages
from scripts.stages import Stage

ROOT = Path(__file__).parents[1]


def stage(*, name: str = "unit", minutes: float = 1.0, status: int = 0, closing_line: str = "") -> Stage:
    return Stage(name, minutes * 60, status, closing_line)


def test_the_closing_line_of_pytest_is_found_whatever_it_counts() -> None:
    for line in (
        "============================== 25 passed in 1.01s ==============================",
        "=========== 1 failed, 2 passed, 3 skipped in 62.11s (0:01:02) ===========",
        "============================ no tests ran in 0.01s =============================",
    ):
        assert stages.CLOSING_LINE.fullmatch(line)
    assert not stages.CLOSING_LINE.fullmatch("=================== short test summary info ====================")


def test_a_stage_shows_its_output_and_keeps_the_closing_line(capfd: pytest.CaptureFixture[str]) -> None:
    line = "===== 3 passed in 0.10s ====="
    code = f"print('hello'); print('{line}'); raise SystemExit(5)"
    ended = stages.run_stage("unit", (sys.executable, "-c", code))
    assert (ended.status, ended.closing_line) == (5, line)
    assert "hello" in capfd.readouterr().out


def test_the_report_ends_with_the_closing_lines(capsys: pytest.CaptureFixture[str]) -> None:
    closing = "== 3 passed in 0.10s =="
    status = stages.print_report([stage(closing_line=closing), stage(name="demo")], limit_minutes=30)
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[-1] == closing
    assert "    2.0  in all (limit 30)" in lines


@pytest.mark.parametrize(
    "ended",
    [[stage(status=1)], [stage(minutes=16), stage(minutes=15)], []],
    ids=["failed", "slow", "nothing ran"],
)
def test_the_report_is_red(ended: list[Stage]) -> None:
    assert stages.print_report(ended, limit_minutes=30) == 1


def test_stages_of_several_commands_make_one_record(tmp_path: Path) -> None:
    record = tmp_path / "build" / "stages.jsonl"
    stages.append(record, stage(name="unit"))
    stages.append(record, stage(name="demo", status=2))
    assert [s.name for s in stages.read_record(record)] == ["unit", "demo"]


def test_no_test_with_a_vllm_server_runs_twice() -> None:
    smoke, others = stages.TEST_STAGES["vLLM"], stages.TEST_STAGES["frameworks and integration"]
    assert (ROOT / smoke[-1]).is_file()
    assert smoke[-1].startswith(stages.VLLM_TESTS)
    assert f"--ignore={stages.VLLM_TESTS}" in others
    assert list(stages.TEST_STAGES).index("vLLM environment") < list(stages.TEST_STAGES).index("vLLM")


SKIPS = """
import pytest

def test_runs(): ...

@pytest.mark.skip(reason="needs a CUDA device")
def test_expected(): ...

@pytest.mark.skip(reason="nobody wrote this down")
def test_unexpected(): ...

@pytest.mark.xfail(reason="known", strict=True)
def test_known(): assert False
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our `conftest.py` and our list of expected skips."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "expected_skips.toml").write_text((ROOT / "tests" / "expected_skips.toml").read_text())
    return tmp_path


def run_pytest(project: Path, source: str, *options: str) -> str:
    (project / "tests" / "test_it.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:langsmith_plugin",
        "--rootdir",
        str(project),
        str(project),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=project).stdout


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["here", "in a worker"])
def test_an_unexpected_skip_is_a_failure_and_an_expected_one_is_not(project: Path, options: tuple[str, ...]) -> None:
    output = run_pytest(project, SKIPS, *options)
    assert "1 passed, 1 skipped, 1 xfailed, 1 error" in output
    assert "unexpected skip of tests/test_it.py::test_unexpected" in output
    assert "nobody wrote this down" in output


def test_an_unexpected_skip_of_a_whole_module_is_an_error(project: Path) -> None:
    output = run_pytest(project, "import pytest\npytest.importorskip('no_such_module')\n")
    assert "unexpected skip of tests/test_it.py" in output
    assert "1 error" in output.splitlines()[-1]


def test_a_gpu_test_is_skipped_only_without_a_gpu(project: Path) -> None:
    (project / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    source = "import pytest\n@pytest.mark.gpu\ndef test_gpu(): ...\n"
    assert "1 skipped" in run_pytest(project, source)
    (project / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    assert "1 passed" in run_pytest(project, source)
