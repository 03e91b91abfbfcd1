"""Taking policies out of a run."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from leyden.deploying import export as export_module
from leyden.deploying.export import export
from leyden.deploying.exported import read_export
from leyden.errors import ConfigurationError
from leyden.spans import Checkpoint
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import RUN, STORE, write_json
from tests.watching.fake_run import make_run, run_record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return asyncio.run(make_run(tmp_path / "run", steps=3, groups=1, size=2, held_out=1))


def test_an_export_describes_each_trained_policy_and_holds_its_folder(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out")
    assert out == tmp_path / "out"
    described = json.loads((out / "leyden.json").read_text())
    assert described == {
        "schema": 1,
        "policies": {
            "sql": {
                "model": "sql",
                "folder": "policies/sql",
                "version": 3,
                "roles": ["writer", "rewriter"],
                "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
                "base_sha256": "0" * 64,
            }
        },
        "prompts": {"checker": "Be strict."},
    }
    assert (out / "policies/sql/model.safetensors").read_bytes() == b"weights of step 3"
    assert json.loads((out / "prompts.json").read_text()) == {"checker": "Be strict."}


def test_what_export_writes_deploy_reads(run: Path, tmp_path: Path) -> None:
    read = read_export(export(run, tmp_path / "out"))
    assert read.policies["sql"].roles == ["writer", "rewriter"]
    assert read.prompts == {"checker": "Be strict."}


def test_serve_md_says_how_to_serve_and_how_to_call(run: Path, tmp_path: Path) -> None:
    text = (export(run, tmp_path / "out") / "SERVE.md").read_text()
    assert "leyden serve out --port 8000" in text
    assert "vllm serve policies/sql --served-model-name sql" in text
    assert 'model="sql"' in text and 'leyden.deploy("out", base_url=' in text
    assert "| `sql` | 3 | `writer`, `rewriter` | `policies/sql` |" in text


def test_an_earlier_checkpoint_is_exported_with_its_own_version(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints/step-000003", run / "checkpoints/step-000002")
    described = json.loads((export(run, tmp_path / "out", step=2) / "leyden.json").read_text())
    assert described["policies"]["sql"]["version"] == 2


def test_the_step_of_the_latest_checkpoint_is_the_latest(run: Path, tmp_path: Path) -> None:
    assert (
        json.loads((export(run, tmp_path / "a", step=3) / "leyden.json").read_text())["policies"]["sql"]["version"] == 3
    )


def test_a_deleted_checkpoint_is_refused_with_those_that_are_kept(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"step-000001' is not there; checkpoints kept: step-000003"):
        export(run, tmp_path / "out", step=1)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("is_file", [False, True])
def test_an_output_in_use_is_refused_and_left_alone(run: Path, tmp_path: Path, is_file: bool) -> None:
    out = tmp_path / "out"
    mine = out if is_file else out / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("precious")
    with pytest.raises(ConfigurationError, match="exists and is not an empty folder"):
        export(run, out)
    assert mine.read_text() == "precious"


def test_an_empty_folder_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (export(run, tmp_path / "out") / "leyden.json").exists()


def test_a_failure_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_instructions", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_policy_missing_from_the_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-000003/policies/sql")
    with pytest.raises(ConfigurationError, match="cannot copy policy 'sql'"):
        export(run, tmp_path / "out")


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / RUN, run_record(1))

    async def create() -> None:
        await (await SQLiteStore.open(folder / STORE)).close()

    asyncio.run(create())
    with pytest.raises(ConfigurationError, match="has no checkpoint yet"):
        export(folder, tmp_path / "out")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is .* a run folder"):
        export(tmp_path, tmp_path / "out")


def test_export_works_inside_a_running_loop(run: Path, tmp_path: Path) -> None:
    async def inside() -> Path:
        return export(run, tmp_path / "out")

    assert (asyncio.run(inside()) / "leyden.json").exists()


def test_a_run_that_is_being_written_can_be_exported(run: Path, tmp_path: Path) -> None:
    async def beside() -> Path:
        async with await SQLiteStore.open(run / STORE) as store:
            await store.commit_checkpoint(
                Checkpoint(
                    checkpoint_id="later",
                    step=4,
                    folder="checkpoints/step-000003",
                    versions={"sql": 9},
                    created_ns=2,
                )
            )
            return export(run, tmp_path / "out")

    described = json.loads((asyncio.run(beside()) / "leyden.json").read_text())
    assert described["policies"]["sql"]["version"] == 9
