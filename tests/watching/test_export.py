"""Taking policies out of a run."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from leyden.deploying import export as export_module
from leyden.deploying.deployment import deploy
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
                "kept_roles": [],
                "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
                "base_sha256": "0" * 64,
                "base_model": None,
                "lora_rank": None,
            }
        },
        "prompts": {"checker": "Be strict."},
    }
    assert (out / "policies/sql/model.safetensors").read_bytes() == b"weights of step 3"
    assert json.loads((out / "prompts.json").read_text()) == {"checker": {"version": 1, "text": "Be strict."}}


def test_an_earlier_checkpoint_is_exported_with_its_own_prompts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints/step-000003", run / "checkpoints/step-000002")
    write_json(run / "checkpoints/step-000002/prompts.json", {"checker": {"version": 0, "text": "Be kind."}})
    assert read_export(export(run, tmp_path / "out", step=2)).prompts == {"checker": "Be kind."}
    assert "## checker, version 0" in (tmp_path / "out" / "PROMPTS.md").read_text()


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

    monkeypatch.setattr(export_module, "instructions", full)
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


def make_adapter(folder: Path, *, base: str | None, rank: int = 16) -> None:
    """Turn a policy's folder into PEFT's of a LoRA."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "base_model_name_or_path": base, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"factors")


def test_an_adapter_is_exported_with_the_base_it_needs(run: Path, tmp_path: Path) -> None:
    make_adapter(run / "checkpoints/step-000003/policies/sql", base="Qwen/Qwen3-0.6B", rank=20)
    out = export(run, tmp_path / "out")
    described = read_export(out).policies["sql"]
    assert (described.base_model, described.lora_rank, described.base_sha256) == ("Qwen/Qwen3-0.6B", 20, "0" * 64)
    assert (out / "policies/sql/adapter_model.safetensors").read_bytes() == b"factors"
    config = json.loads((out / "policies/sql/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["bias"]) == ("Qwen/Qwen3-0.6B", 20, "none")


def test_roles_that_an_untrained_policy_took_first_are_kept_from_the_policies_behind_it(
    run: Path, tmp_path: Path
) -> None:
    record = run_record(3)
    described = record["policies"]
    assert isinstance(described, dict)

    def named(like: str, roles: list[str] | None) -> dict[str, object]:
        return described[like] | {"roles": roles}

    policies = {
        "first": named("sql", ["judge.lead"]),
        "judge": named("judge", ["judge*", "critic"]),
        "team": named("sql", ["critic", "writer"]),
        "late": named("judge", ["reader"]),
        "rest": named("sql", None),
        "never": named("judge", ["main"]),
    }
    write_json(run / RUN, record | {"policies": policies})
    for name in ("first", "team", "rest"):
        shutil.copytree(run / "checkpoints/step-000003/policies/sql", run / f"checkpoints/step-000003/policies/{name}")
    out = export(run, tmp_path / "out")
    assert {name: one.kept_roles for name, one in read_export(out).policies.items()} == {
        "first": [],
        "team": ["critic"],
        "rest": ["judge*", "critic", "reader"],
    }
    text = (out / "SERVE.md").read_text()
    assert "| `rest` | 0 | every role except `judge*`, `critic`, `reader` | `policies/rest` |" in text
    roles = ("judge.lead", "judge", "critic", "writer", "reader", "main")
    with deploy(out, "http://127.0.0.1:1/v1") as deployment:
        routes = {role: deployment.routing.route_of(role) for role in roles}
    assert {role: route and route.model for role, route in routes.items()} == {
        "judge.lead": "first",
        "judge": None,
        "critic": None,
        "writer": "team",
        "reader": None,
        "main": "rest",
    }


def test_serve_md_serves_all_adapters_of_a_base_with_one_command(run: Path, tmp_path: Path) -> None:
    policies = run / "checkpoints/step-000003/policies"
    record = run_record(3)
    described = record["policies"]
    assert isinstance(described, dict)
    write_json(run / RUN, record | {"policies": described | {"critic": described["sql"], "whole": described["sql"]}})
    shutil.copytree(policies / "sql", policies / "whole")
    make_adapter(policies / "sql", base="org/base", rank=16)
    make_adapter(policies / "critic", base="org/base", rank=20)
    text = (export(run, tmp_path / "out") / "SERVE.md").read_text()
    assert "leyden serve out --port 8000" in text
    assert (
        "    vllm serve org/base --enable-lora --max-loras 2 --max-lora-rank 32 "
        "--lora-modules sql=policies/sql critic=policies/critic\n"
    ) in text
    assert "    vllm serve policies/whole --served-model-name whole\n" in text


def test_a_base_named_relative_to_where_the_run_began_is_found_from_anywhere(run: Path, tmp_path: Path) -> None:
    (tmp_path / "project/models/tiny").mkdir(parents=True)
    write_json(run / RUN, run_record(3) | {"working_folder": str(tmp_path / "project")})
    make_adapter(run / "checkpoints/step-000003/policies/sql", base="models/tiny")
    out = export(run, tmp_path / "out")
    wanted = str(tmp_path / "project/models/tiny")
    assert json.loads((out / "policies/sql/adapter_config.json").read_text())["base_model_name_or_path"] == wanted
    assert read_export(out).policies["sql"].base_model == wanted
    kept = json.loads((run / "checkpoints/step-000003/policies/sql/adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == "models/tiny", "the checkpoint is left as it is"


def test_an_adapter_that_names_no_base_gets_the_runs(run: Path, tmp_path: Path) -> None:
    make_adapter(run / "checkpoints/step-000003/policies/sql", base=None)
    write_json(run / RUN, run_record(3) | {"base_model": "org/base"})
    assert read_export(export(run, tmp_path / "out")).policies["sql"].base_model == "org/base"
    write_json(run / RUN, {key: value for key, value in run_record(3).items() if key != "base_model"})
    with pytest.raises(ConfigurationError, match="names no base"):
        export(run, tmp_path / "other")
