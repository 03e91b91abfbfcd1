"""Several policies with adapters on one real vLLM server, each version under its own name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from integration_tests.vllm.checkpoints import plain_logprobs, random_checkpoint
from integration_tests.vllm.figures import Figures
from integration_tests.vllm.gates import Gate, compare, plain, serving
from leyden.roles import Policy
from tests.engines.adapters import Adapter, adapter
from tests.engines.asking import Answered

TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("q_proj", "down_proj"),
)
VERSIONS = 6
"""Enough to fill every slot of the server, also the last, where a CPU's kernels look for requests without adapter."""
PROMPT = [7 + number * 41 % 250 for number in range(40)]


@pytest.fixture(scope="module")
def base(models: Path) -> Path:
    return random_checkpoint(models / "of_adapters", seed=4, tied=False)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, list[Adapter]]:
    """The versions of two policies, which differ in rank, alpha and layers."""
    seeds = range(VERSIONS)
    return {
        "wide": [adapter(base, rank=8, alpha=8.0, targets=TARGETS[0], seed=seed) for seed in seeds],
        "thin": [adapter(base, rank=3, alpha=5.0, targets=TARGETS[1], seed=10 + seed) for seed in seeds],
    }


@pytest.fixture(scope="module")
def gate(
    base: Path,
    adapters: dict[str, list[Adapter]],
    python: Path,
    figures: Figures,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gate]:
    policies = [Policy(name, lora=versions[0].lora) for name, versions in adapters.items()]
    log_folder = tmp_path_factory.mktemp("loras")
    with serving(base, policies, python=python, log_folder=log_folder, figures=figures) as gate:
        yield gate


def check(gate: Gate, kind: str, answers: list[Answered], model: torch.nn.Module) -> None:
    """Compare answers to `PROMPT` at temperature 1 with a forward pass."""
    for answer in answers:
        gate.figures.compare(kind, answer.logprobs, plain_logprobs(model, PROMPT, answer.token_ids))


def test_before_the_first_version_every_name_is_the_base(gate: Gate, base: Path) -> None:
    assert gate.engine.keeps_versions
    for name in ("base", "wide", "thin"):
        version, answers = gate.do(gate.ask(PROMPT, model=name, max_tokens=16))
        assert version == 0
        check(gate, "forward pass: base beside adapters", answers, plain(base))


def test_every_request_keeps_the_version_it_began_with(
    gate: Gate, base: Path, adapters: dict[str, list[Adapter]]
) -> None:
    async def all_at_once() -> list[tuple[str, int, list[Answered]]]:
        found = []

        async def ask(name: str, tokens: int) -> None:
            version, answers = await gate.ask(PROMPT, model=name, max_tokens=tokens)
            found.append((name, version, answers))

        async with asyncio.TaskGroup() as tasks:
            for version in range(1, VERSIONS + 1):
                for name, versions in adapters.items():
                    await gate.engine.publish(name, version, versions[version - 1].weights)
                    gate.figures.pushes += 1
                for name in ("wide", "thin", "base"):
                    for tokens in (30, 200):  # the long ones still run when the next version comes
                        tasks.create_task(ask(name, tokens))
                await asyncio.sleep(0.2)
        return found

    answered = gate.do(all_at_once())
    expected = {(name, number) for name in adapters for number in range(1, VERSIONS + 1)}
    assert {(name, version) for name, version, _ in answered} == {*expected, ("base", 0)}
    untrained = plain(base)
    for name, version, answers in answered:
        if version:
            check(gate, "PEFT's forward pass: adapters", answers, adapters[name][version - 1].model)
        else:
            check(gate, "forward pass: base beside adapters", answers, untrained)


def test_an_old_version_is_unloaded_once_nobody_runs_on_it(gate: Gate, adapters: dict[str, list[Adapter]]) -> None:
    import aiohttp

    async def names() -> list[str]:
        async with aiohttp.ClientSession() as session, session.get(f"{gate.engine.urls[0]}/v1/models") as reply:
            return [one["id"] for one in (await reply.json())["data"] if one["id"] != "base"]

    async def settled() -> list[str]:
        async with asyncio.timeout(20):
            while len(found := await names()) > 2:
                await asyncio.sleep(0.1)
        return found

    assert len(gate.do(settled())) == 2


def test_calls_of_an_agent_are_recorded_with_the_adapter_s_version(
    gate: Gate, adapters: dict[str, list[Adapter]]
) -> None:
    with gate.agent("thin") as (client, recorded):
        messages = [{"role": "user", "content": "how many?"}]
        client.chat.completions.create(model="thin", messages=messages, max_tokens=20, temperature=0.7)
    assert [one.version for one in recorded] == [VERSIONS]
    compare(gate, "PEFT's forward pass: adapters", recorded, {"thin": adapters["thin"][-1].model})
