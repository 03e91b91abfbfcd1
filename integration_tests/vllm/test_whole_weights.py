"""A policy that trains all of a model's weights, tied head included, on a real vLLM server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration_tests.vllm.checkpoints import plain_logprobs, random_checkpoint
from integration_tests.vllm.gates import Gate, plain, weights_of
from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import GenerationRequest, SamplingParameters
from tests.engines.asking import Answered

STREAMS = 8
LONG_PROMPT = [7 + number * 37 % 250 for number in range(260)]
"""Longer than the blocks in which prefixes are kept."""


def check(gate: Gate, kind: str, prompt: list[int], answers: list[Answered], folder: Path) -> None:
    """Compare answers at temperature 1 with a forward pass of a checkpoint."""
    model = plain(folder)
    for answer in answers:
        gate.figures.compare(kind, answer.logprobs, plain_logprobs(model, prompt, answer.token_ids))


def test_a_push_replaces_the_weights_and_what_was_remembered_of_prefixes(
    whole: Gate, tied: Path, other_tied: Path
) -> None:
    for folder in (other_tied, tied, other_tied):
        whole.push(folder)
        for _ in range(2):  # the second time from the prefix cache
            version, answers = whole.do(whole.ask(LONG_PROMPT, max_tokens=12))
            assert version == whole.version
            check(whole, "forward pass: after a push, tied head", LONG_PROMPT, answers, folder)


def test_a_push_waits_for_requests_in_flight_and_loses_none(whole: Gate, tied: Path, other_tied: Path) -> None:
    whole.push(tied)
    before, prompt = whole.version, LONG_PROMPT[:20]

    async def under_way() -> tuple[list[tuple[int, list[Answered]]], list[tuple[int, list[Answered]]]]:
        early = [asyncio.create_task(whole.ask(prompt, max_tokens=300, stream=bool(number % 2))) for number in range(8)]
        await asyncio.sleep(0.3)
        assert not all(task.done() for task in early)
        publishing = asyncio.create_task(whole.engine.publish("me", before + 1, weights_of(other_tied)))
        await asyncio.sleep(0.05)
        late = [asyncio.create_task(whole.ask(prompt, max_tokens=40)) for _ in range(4)]
        await publishing
        return await asyncio.gather(*early), await asyncio.gather(*late)

    early, late = whole.do(under_way())
    whole.version, whole.served = before + 1, other_tied
    whole.figures.pushes += 1
    assert [version for version, _ in early] == [before] * 8
    assert [version for version, _ in late] == [before + 1] * 4
    for _, answers in early:
        check(whole, "forward pass: in flight during a push", prompt, answers, tied)
    for _, answers in late:
        check(whole, "forward pass: held during a push", prompt, answers, other_tied)


def test_the_base_model_is_gone_once_its_weights_are(whole: Gate, other_tied: Path) -> None:
    whole.push(other_tied)
    with pytest.raises(ConfigurationError, match="base"):
        whole.do(whole.ask([1, 2, 3], model="base"))


@pytest.mark.parametrize("how", ["no folder", "wrong shapes", "wrong names", "cut off"])
def test_weights_that_do_not_fit_are_refused_by_the_server_which_goes_on(
    whole: Gate, tied: Path, models: Path, how: str
) -> None:
    whole.push(tied)
    bad = models / how
    if how != "no folder" and not bad.exists():
        spoil(random_checkpoint(bad, seed=3, tied=True), how)
    answer = whole.do(load_directly(whole, bad))
    assert "the served weights are unchanged" in answer
    assert {"no folder": "no folder", "wrong shapes": "has shape", "wrong names": "lacks", "cut off": "read"}[
        how
    ] in answer
    _, answers = whole.do(whole.ask(LONG_PROMPT[:10], max_tokens=12))
    check(whole, "forward pass: after a refused push", LONG_PROMPT[:10], answers, tied)


def spoil(folder: Path, how: str) -> None:
    """Make a checkpoint that does not fit."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
        return
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    tensors["model.norm.weight" if how == "wrong shapes" else "model.other.weight"] = norm[:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})


async def load_directly(gate: Gate, folder: Path) -> str:
    """Ask the server to load a folder, past the engine, which would not."""
    import aiohttp

    body = {"method": "leyden_load", "args": [str(folder)]}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{gate.engine.urls[0]}/collective_rpc", json=body) as reply:
            assert reply.status == 500
            return str((await reply.json())["error"]["message"])


def test_weights_that_say_something_else_than_the_learner_are_found_out(
    whole: Gate, tied: Path, other_tied: Path
) -> None:
    claimed = replace(weights_of(other_tied), logprobs=weights_of(tied).logprobs)
    with pytest.raises(EngineError, match="nats"):
        whole.do(whole.engine.publish("me", whole.version + 1, claimed))
    whole.version += 1
    whole.push(tied)
    _, answers = whole.do(whole.ask(LONG_PROMPT[:10], max_tokens=12))
    check(whole, "forward pass: after a push, tied head", LONG_PROMPT[:10], answers, tied)


@pytest.fixture
def pushed(whole: Gate, other_tied: Path) -> Iterator[Path]:
    """Weights that are not the ones the server starts with."""
    whole.push(other_tied)
    yield other_tied


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["API server", "engine core", "launcher"])
def test_a_killed_server_comes_back_with_the_last_weights_and_answers_what_it_was_asked(
    whole: Gate, pushed: Path, victim: str
) -> None:
    prompt = LONG_PROMPT[:30]

    async def killed() -> tuple[list[tuple[int, list[Answered]]], list[object]]:
        begun = asyncio.Event()
        process = whole.processes()[victim]  # before anything is asked: looking takes as long as some answers
        waiting = [asyncio.create_task(whole.ask(prompt, max_tokens=500)) for _ in range(STREAMS)]
        streams = [asyncio.create_task(stream(begun)) for _ in range(STREAMS)]
        await begun.wait()
        process.kill()
        return await asyncio.gather(*waiting), await asyncio.gather(*streams, return_exceptions=True)

    async def stream(begun: asyncio.Event) -> None:
        request = GenerationRequest(
            model="me", messages=(), prompt_token_ids=prompt, sampling=SamplingParameters(max_tokens=500)
        )
        async for _ in (await whole.engine.generate(request)).deltas:
            begun.set()

    answered, streamed = whole.do(killed())
    whole.figures.restarts += 1
    for version, answers in answered:
        assert version == whole.version
        check(whole, "forward pass: asked again after a kill", prompt, answers, pushed)
    broken = [said for said in streamed if said is not None]
    assert broken, "streams that have begun cannot be begun again"
    assert all(isinstance(said, EngineError) for said in broken), broken
    _, answers = whole.do(whole.ask(LONG_PROMPT, max_tokens=12))
    check(whole, "forward pass: after a restart", LONG_PROMPT, answers, pushed)
