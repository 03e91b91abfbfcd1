"""The `leyden` command line."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leyden import cli, doctor
from leyden.cli import main, table
from leyden.doctor import Finding
from leyden.errors import ConfigurationError
from leyden.hookspecs import Registry
from leyden.interfaces import FrameworkAdapter
from leyden.plugins import BrokenPlugin, Plugins, load_plugins, new_manager
from leyden.training.runfolder import RUN, write_json
from tests.watching.fake_run import make_run, run_record

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "runs" / "sql"
    return asyncio.run(make_run(folder, steps=2, groups=1, size=4, held_out=3))


def leyden(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "leyden.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=120,
    )


# ---- help and errors


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["rollouts", "--help"], ["no-such-command"]])
def test_help_and_listings_import_no_torch_and_no_framework(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom leyden.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'langchain_core', 'langgraph', 'openai', 'httpx', 'starlette', 'uvicorn',"
        " 'numpy', 'rich'}\n"
        "print('HEAVY', sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "HEAVY []"


def test_help_lists_the_commands_of_the_core_and_of_plugins() -> None:
    shown = leyden("--help").stdout
    for name in ("rollouts", "show", "report", "serve", "export", "resume", "doctor", "plugins"):
        assert f"    {name} " in shown


def test_an_error_is_one_line_on_stderr_with_status_2(tmp_path: Path) -> None:
    found = leyden("rollouts", str(tmp_path))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"leyden: {str(tmp_path)!r} is not a run folder: it holds no store.db\n"


def test_a_damaged_store_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"this is no database" * 100)
    found = leyden("rollouts", str(tmp_path))
    assert found.returncode == 2
    assert found.stderr.startswith("leyden: ") and found.stderr.count("\n") == 1
    assert "Traceback" in leyden("rollouts", str(tmp_path), LEYDEN_DEBUG="1").stderr


def test_a_bug_is_one_line_that_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(cli.COMMANDS, "plugins", lambda options: 1 // 0)
    monkeypatch.delenv("LEYDEN_DEBUG", raising=False)
    assert main(["plugins"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("leyden: ZeroDivisionError: ") and shown.endswith("(LEYDEN_DEBUG=1 shows where)\n")
    monkeypatch.setenv("LEYDEN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError, match="division"):
        main(["plugins"])


def test_a_logged_failure_is_one_line_without_its_traceback() -> None:
    try:
        raise ZeroDivisionError("at import")
    except ZeroDivisionError:
        record = logging.LogRecord("leyden", logging.ERROR, "", 1, "plugin %r is broken", ("acme",), sys.exc_info())
    assert cli._OneLine("leyden: %(message)s").format(record) == "leyden: plugin 'acme' is broken"


def test_a_closed_pipe_is_no_error(run: Path) -> None:
    shell = f"{sys.executable} -m leyden.cli rollouts {run} | head -c 1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert found.stderr == ""


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["rolouts"])
    assert "rollouts" in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys: Captured) -> None:
    assert main([]) == 0
    assert "rollouts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rollouts", "--limit", "0"], "must be a whole number of at least 1, got '0'"),
        (["serve", "x", "--port", "99999"], "must be a whole number from 0 to 65535, got '99999'"),
        (["serve", "x/policies/sql", "--engine", "vlm"], "no engine is named 'vlm'; did you mean 'vllm'?"),
    ],
)
def test_a_wrong_value_is_refused_in_words(arguments: list[str], complaint: str, run: Path, capsys: Captured) -> None:
    try:
        status: object = main([part.replace("x/", f"{run}/checkpoints/step-000002/") for part in arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert complaint in capsys.readouterr().err


# ---- looking


def test_rollouts_are_a_table(run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["rollouts", str(run), "--mode", "evaluate", "--step", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rollout", "mode", "step", "state", "reward", "calls", "task"]
    assert " ".join(lines[1].split()) == "e0-t0 evaluate 0 succeeded 1 2 Which of the 0 largest cities speak Dutch?"
    assert [line.split()[0] for line in lines[1:]] == ["e0-t0", "e0-t1", "e0-t2"]


def test_the_last_rollouts_are_shown_with_how_many_there_are(run: Path, capsys: Captured) -> None:
    assert main(["rollouts", str(run), "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["e2-t1", "e2-t2"]
    assert lines[3] == "the last 2 of 14 rollouts; --limit 14 shows all"


def test_rollouts_are_filtered_by_state(run: Path, capsys: Captured) -> None:
    assert main(["rollouts", str(run), "--state", "failed"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_show_prints_the_tree_of_a_rollout_named_by_the_start_of_its_id(run: Path, capsys: Captured) -> None:
    assert main(["show", str(run), "e0-t1"]) == 0
    assert capsys.readouterr().out.startswith("e0-t1 · evaluate · step 0 · succeeded · reward 1")
    assert main(["show", str(run), "s1-t0-2", "--text", "--tokens"]) == 0
    shown = capsys.readouterr().out
    assert "log-probability" in shown and "> system: You are the writer" in shown
    assert "\x1b[" not in shown, "no colours into a pipe"
    assert main(["show", str(run), "s1-t0-2", "--tree"]) == 0
    assert "tokens in the tree" in capsys.readouterr().out


def test_an_ambiguous_or_unknown_rollout_is_refused_with_help(run: Path, capsys: Captured) -> None:
    assert main(["show", str(run), "s1-"]) == 2
    assert "4 rollouts start like this: s1-t0-0, s1-t0-1" in capsys.readouterr().err
    assert main(["show", str(run), "nobody"]) == 2
    shown = capsys.readouterr().err
    assert "'nobody'" in shown and f"leyden rollouts {run}` lists them" in shown


def test_without_a_folder_the_newest_run_is_meant(run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert main(["show", "s1-t0-2"]) == 0
    assert capsys.readouterr().out.startswith("s1-t0-2 · train")
    assert main(["show"]) == 0
    assert capsys.readouterr().out.startswith("e2-t2 · ")
    assert main(["rollouts", "--limit", "1"]) == 0
    assert "e2-t2" in capsys.readouterr().out


def test_without_any_run_the_folder_is_asked_for(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "s1-t0-2"]) == 2
    assert capsys.readouterr().err == "leyden: there is no run under 'runs'; name the run folder\n"


def test_a_table_is_aligned_and_cut_at_the_terminals_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = table(("id", "n", "task"), [("a", "7", "x" * 99), ("long-id", "12", "y\x1b")], right=("n",))
    assert lines == ["id        n  task", f"a         7  {'x' * 26}…", "long-id  12  y\\x1b"]


def test_report_and_serve_are_commands_of_plugins(run: Path, capsys: Captured) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert "--api-key" in capsys.readouterr().out


def test_serving_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main(["serve", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_serving_a_run_names_its_newest_checkpoint(run: Path, capsys: Captured) -> None:
    assert main(["serve", str(run)]) == 2
    assert f"such as {str(run / 'checkpoints' / 'step-000002')!r}" in capsys.readouterr().err


# ---- going on


def test_export_says_what_to_do_next(run: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert f"leyden serve {out}" in capsys.readouterr().out
    assert json.loads((out / "leyden.json").read_text())["schema"] == 1
    assert main(["export", str(run), str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_resume_runs_the_recorded_command_with_the_run_in_its_environment(run: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys; print(sys.argv[1:], os.environ['LEYDEN_RESUME'], os.environ['LEYDEN_RESUME_STEPS'])"
    )
    write_json(run / RUN, {**run_record(2), "command": [sys.executable, str(script), "--fast", "a b"]})
    found = leyden("resume", str(run), "--steps", "9")
    assert found.returncode == 0, found.stderr
    shown, said = found.stdout.splitlines()
    assert shown.startswith(f"LEYDEN_RESUME={run.resolve()} ") and shown.endswith("--fast 'a b'")
    assert said == f"['--fast', 'a b'] {run.resolve()} 9"


def test_resume_works_from_another_folder_than_the_one_the_run_was_started_in(run: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os; print(os.getcwd(), os.environ['LEYDEN_RESUME'])")
    record = {**run_record(2), "command": [sys.executable, "train.py"], "working_folder": str(tmp_path)}
    write_json(run / RUN, record)
    command = [sys.executable, "-m", "leyden.cli", "resume", run.name]
    found = subprocess.run(command, cwd=run.parent, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"{tmp_path} {run.resolve()}"


def test_the_status_of_a_resumed_script_is_that_of_resume(run: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(7)")
    write_json(run / RUN, {**run_record(2), "command": [sys.executable, str(script)]})
    assert leyden("resume", str(run)).returncode == 7


def test_a_run_that_does_not_say_how_it_was_started_is_refused(run: Path, capsys: Captured) -> None:
    write_json(run / RUN, {"command": None})
    assert main(["resume", str(run)]) == 2
    assert "call fit(steps, resume=True) in your script" in capsys.readouterr().err


# ---- this machine


def test_plugins_lists_components_and_the_reasons_of_broken_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    loaded = load_plugins()
    broken = BrokenPlugin("acme", "acme 1.0", ZeroDivisionError("at import"))
    monkeypatch.setattr(
        cli, "load_plugins", lambda: Plugins(loaded.components, manager=new_manager(), broken=(broken,))
    )
    assert main(["plugins"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "algorithm grpo builtin group-relative policy optimisation" in lines
    assert "command serve builtin serve an export or a checkpoint" in lines
    assert lines[-1] == "skipped: plugin 'acme' of acme 1.0: ZeroDivisionError: at import"


def test_doctor_is_red_only_for_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(cli, "doctor", lambda: [Finding("ok", "fine"), Finding("missing", "torch")])
    assert main(["doctor"]) == 0
    monkeypatch.setattr(cli, "doctor", lambda: [Finding("BROKEN", "torch is broken")])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "BROKEN  torch is broken"


def test_doctor_finds_python_extras_and_plugins() -> None:
    texts = [finding.text for finding in doctor.doctor()]
    assert texts[0].startswith("Python 3.")
    assert any("GiB free" in text for text in texts)
    assert any(text.startswith("torch ") for text in texts)
    assert "extra 'train' is installed" in texts
    assert any(text.startswith("plugins: builtin") for text in texts)


def test_doctor_says_which_line_installs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "requires",
        lambda name: [
            "pluggy>=1.5",
            "no-such-package>=1; extra == 'acme'",
            "msgspec>=99.5; extra == 'acme'",
            "msgspec>=0.1 ; python_version > '3' and extra == \"fine\"",
            "no-such-package; extra == 'dev'",
        ],
    )
    version = doctor._version("msgspec")
    assert doctor._extras() == [
        Finding(
            "missing",
            f"extra 'acme' lacks no-such-package, msgspec>=99.5 (here {version}): pip install 'leyden[acme]'",
        ),
        Finding("ok", "extra 'fine' is installed"),
    ]


class Adapter:
    """A framework adapter that keeps what was done with it."""

    name = "fake"
    module = "json"
    done: list[str] = []  # noqa: RUF012 - shared with the test on purpose
    error: Exception | None = None

    def attach(self) -> None:
        self.done.append("attach")
        if self.error is not None:
            raise self.error

    def detach(self) -> None:
        self.done.append("detach")


def plugins_with(adapter: type[FrameworkAdapter]) -> Plugins:
    registry = Registry("test")
    registry.framework("fake", lambda: adapter)
    return Plugins(registry.components, manager=new_manager())


def test_doctor_attaches_each_framework_and_takes_it_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "done", [])
    (finding,) = doctor._frameworks(plugins_with(Adapter))
    assert (finding.mark, Adapter.done) == ("ok", ["attach", "detach"])
    assert "hooks attach" in finding.text


def test_doctor_names_a_hook_point_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "done", [])
    monkeypatch.setattr(Adapter, "error", ConfigurationError("json.dumps has moved; works with 1 to 2"))
    (finding,) = doctor._frameworks(plugins_with(Adapter))
    assert finding == Finding("BROKEN", "framework 'fake': ConfigurationError: json.dumps has moved; works with 1 to 2")
    assert Adapter.done == ["attach", "detach"]


def test_doctor_does_not_mind_a_framework_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "module", "no_such_framework")
    (finding,) = doctor._frameworks(plugins_with(Adapter))
    assert finding == Finding("missing", "framework 'fake' is not installed")


def test_doctor_says_when_an_installed_torch_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", "raise OSError('libtorch is gone')")
    finding = doctor._torch()
    assert finding == Finding("BROKEN", "torch is installed but cannot be imported: OSError: libtorch is gone")


def test_doctor_reports_broken_plugins_as_broken() -> None:
    plugins = Plugins({}, manager=new_manager(), broken=(BrokenPlugin("acme", "acme 1.0", KeyError("x")),))
    assert doctor._plugins(plugins)[1] == Finding("BROKEN", "plugin 'acme' of acme 1.0: KeyError: 'x'")
