"""Two real servers behind one engine, of a checkpoint with a head of its own; and engines that attach to them."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from integration_tests.vllm.checkpoints import plain_logprobs, random_checkpoint
from integration_tests.vllm.figures import Figures
from integration_tests.vllm.gates import Gate, plain, serving
from leyden.errors import ConfigurationError
from leyden.roles import LoRA, Policy
from leyden_plugins.engines.vllm import VLLMEngine
from tests.engines.asking import Answered, collect, request

PROMPT = [7 + number * 43 % 250 for number in range(40)]


@pytest.fixture(scope="module")
def untied(models: Path) -> Path:
    return random_checkpoint(models / "untied", seed=5, tied=False)


@pytest.fixture(scope="module")
def gate(untied: Path, python: Path, figures: Figures, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    log_folder = tmp_path_factory.mktemp("replicas")
    with serving(untied, [Policy("me")], python=python, log_folder=log_folder, figures=figures, replicas=2) as gate:
        yield gate


async def answered(gate: Gate) -> list[int]:
    """How many requests each server has finished."""
    found = []
    async with aiohttp.ClientSession() as session:
        for url in gate.engine.urls:
            async with session.get(f"{url}/metrics") as reply:
                lines = (await reply.text()).splitlines()
            counts = [float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total{")]
            found.append(int(sum(counts)))
    return found


def test_requests_of_one_rollout_go_to_one_server_and_rollouts_spread(gate: Gate) -> None:
    async def of(rollout: str) -> list[int]:
        before = await answered(gate)
        for _ in range(4):
            await gate.ask(PROMPT, max_tokens=4, affinity=rollout)
        return [after - was for after, was in zip(await answered(gate), before, strict=True)]

    assert sorted(gate.do(of("r1"))) == [0, 4]

    async def at_once() -> list[int]:
        before = await answered(gate)
        await asyncio.gather(*(gate.ask(PROMPT, max_tokens=64, affinity=f"s{number}") for number in range(8)))
        return [after - was for after, was in zip(await answered(gate), before, strict=True)]

    assert gate.do(at_once()) == [4, 4]


def test_a_push_reaches_every_server(gate: Gate, models: Path) -> None:
    other = random_checkpoint(models / "other_untied", seed=6, tied=False)
    gate.push(other)
    model = plain(other)

    async def at_once() -> list[tuple[int, list[Answered]]]:
        before = await answered(gate)
        asked = [gate.ask(PROMPT, max_tokens=32, affinity=f"p{number}") for number in range(6)]
        found = await asyncio.gather(*asked)
        assert [after - was for after, was in zip(await answered(gate), before, strict=True)] == [3, 3]
        return found

    for version, (answer,) in gate.do(at_once()):
        assert version == gate.version
        expected = plain_logprobs(model, PROMPT, answer.token_ids)
        gate.figures.compare("forward pass: two servers, untied head", answer.logprobs, expected)


def test_an_engine_attaches_to_running_servers_and_leaves_them_running(gate: Gate, models: Path) -> None:
    gate.push(models / "untied")

    async def attached() -> tuple[list[float], list[int]]:
        engine = VLLMEngine(models / "untied", urls=gate.engine.urls)
        await engine.start([])
        try:
            (answer,) = await collect(await engine.generate(request(PROMPT, max_tokens=16)))
            with pytest.raises(ConfigurationError, match="LoRA"):
                await engine.start([Policy("thin", lora=LoRA(rank=4))])
        finally:
            await engine.stop()
        return answer.logprobs, answer.token_ids

    logprobs, token_ids = gate.do(attached())
    expected = plain_logprobs(plain(models / "untied"), PROMPT, token_ids)
    gate.figures.compare("forward pass: attached", logprobs, expected)
    _, (answer,) = gate.do(gate.ask(PROMPT, max_tokens=4))
    assert len(answer.token_ids) == 4


@pytest.fixture(scope="module")
def bare(untied: Path, python: Path, figures: Figures, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that somebody started without what an engine needs."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("bare") / "log"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", untied, "--host", "127.0.0.1"]
    command += ["--port", port, "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", 2**26]
    with log.open("w") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT)

    async def ready() -> None:
        async with asyncio.timeout(240), aiohttp.ClientSession() as session:
            while process.poll() is None:
                try:
                    async with session.get(f"http://127.0.0.1:{port}/health"):
                        return
                except aiohttp.ClientError:
                    await asyncio.sleep(0.5)
        raise AssertionError(log.read_text())

    try:
        asyncio.run(ready())
        figures.servers += 1
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(
    ("policies", "flag"),
    [
        ([Policy("me")], "VLLM_SERVER_DEV_MODE=1"),
        ([Policy("me", lora=LoRA(rank=4))], "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ([], "--logprobs-mode processed_logprobs"),
    ],
    ids=["whole weights", "adapters", "log-probabilities"],
)
def test_what_an_attached_server_lacks_is_named_with_its_flag(
    bare: str, untied: Path, policies: list[Policy], flag: str
) -> None:
    async def attach() -> None:
        engine = VLLMEngine(untied, urls=[bare])
        try:
            await engine.start(policies)
        finally:
            await engine.stop()

    with pytest.raises(ConfigurationError, match=flag):
        asyncio.run(attach())
