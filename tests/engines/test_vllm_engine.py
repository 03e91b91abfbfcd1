"""The vLLM engine in front of servers that run already: prompts, answers, LoRAs, whole weights, sleep, what is lacking.

The servers are fakes with a formula for a model; what should come is computed from that formula here.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.errors import ConfigurationError, ContextLengthError, EngineError
from leyden.interfaces import ContinuesExactly, Engine, GenerationRequest, SamplingParameters, Sleeps, Weights
from leyden.plugins import load_plugins
from leyden.roles import LoRA, Policy
from leyden_plugins.engines.vllm import VLLMEngine
from tests.engines.asking import Answered, collect, request
from tests.engines.fake_vllm import Fake, answer_logprobs, serving
from tests.tiny import END

pytestmark = pytest.mark.anyio
PROMPT = [2, 40, 50, 60, 3]
LORA = LoRA(rank=4, alpha=8.0, targets=["q_proj"])
WRITER, SOLVER = Policy("writer", lora=LORA), Policy("solver")


@asynccontextmanager
async def attached(
    folder: Path, *fakes: Fake, policies: Sequence[Policy] = (WRITER,), **options: Any
) -> AsyncIterator[VLLMEngine]:
    """A started engine in front of running fakes."""
    async with serving(*fakes) as urls:
        engine = VLLMEngine(folder, urls=urls, **options)
        try:
            await engine.start(policies)
            for fake in fakes:
                fake.asked.clear()
                fake.calls.clear()
            yield engine
        finally:
            await engine.stop()


async def ask(engine: VLLMEngine, wanted: GenerationRequest) -> Answered:
    return (await collect(await engine.generate(wanted)))[0]


def says(shift: float) -> Any:
    """What a learner with weights of that shift computes."""
    return lambda prompt, answer: answer_logprobs(prompt, answer, shift)


def lora_weights(shift: float, *, learner: float | None = None) -> Weights:
    """An adapter that shifts the fake's logits; the learner may be of another opinion."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(4, 32),
        f"{layer}.lora_B.weight": torch.full((32, 4), shift / 128),
    }
    return Weights(lora=LORA, tensors=tensors, logprobs=says(shift if learner is None else learner))


def whole_weights(shift: float, *, learner: float | None = None) -> Weights:
    """Whole weights, likewise."""
    tensors = {"model.norm.weight": torch.full((4,), shift / 4)}
    return Weights(tensors=tensors, logprobs=says(shift if learner is None else learner))


def assert_says(got: Answered, shift: float, temperature: float = 1.0) -> None:
    """The answer was sampled with weights of that shift."""
    assert got.token_ids
    assert got.logprobs == pytest.approx(answer_logprobs(PROMPT, got.token_ids, shift, temperature), abs=1e-6)


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_and_logprobs_are_the_servers_at_the_temperature_sampled_with(
    qwen: Path, temperature: float, stream: bool
) -> None:
    async with attached(qwen, Fake()) as engine:
        wanted = request(PROMPT, stream=stream, temperature=temperature, max_tokens=16, n=3, seed=5)
        generation = await engine.generate(wanted)
        choices = await collect(generation)
        assert (generation.version, list(generation.prompt_token_ids)) == (0, PROMPT)
        assert len({tuple(choice.token_ids) for choice in choices}) == 3
        for choice in choices:
            assert_says(choice, 0.0, temperature)
            assert choice.text == engine.decode([token for token in choice.token_ids if token > 6])
            assert choice.finish_reason == ("stop" if choice.token_ids[-1] == END else "length")
            assert len(choice.deltas) == (len(choice.token_ids) if stream else 1)
        again = await collect(await engine.generate(wanted))
        assert [one.token_ids for one in again] == [one.token_ids for one in choices], "a seed was given"


async def test_nothing_is_left_to_the_servers_defaults(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake) as engine:
        await ask(engine, request(PROMPT, max_tokens=None))
    assert fake.asked == [
        {
            "model": "base",
            "prompt": PROMPT,
            "n": 1,
            "max_tokens": 200 - len(PROMPT),
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop": [],
            "stop_token_ids": [END],
            "logprobs": 0,
            "return_token_ids": True,
            "stream": False,
        }
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_ends_at_a_stop_string_with_the_token_that_completes_it(qwen: Path, stream: bool) -> None:
    async with attached(qwen, Fake()) as engine:
        whole = await ask(engine, request(PROMPT, max_tokens=40, seed=1))
        visible = [place for place, token in enumerate(whole.token_ids) if 7 + 32 < token < 7 + 127]
        place = visible[len(visible) // 2]
        stop = engine.decode([whole.token_ids[place]])
        place = next(at for at in visible if engine.decode([whole.token_ids[at]]) == stop)
        cut = await ask(engine, request(PROMPT, max_tokens=40, seed=1, stop=(stop,), stream=stream))
        assert cut.token_ids == whole.token_ids[: place + 1]
        assert len(cut.logprobs) == place + 1
        assert (cut.text, cut.finish_reason) == (whole.text.split(stop)[0], "stop")


async def test_formats_go_to_the_server_as_a_grammar_or_a_schema(qwen: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    chat = GenerationRequest(model="base", messages=[{"role": "user", "content": "hi"}], tools=[tool], stream=False)
    chat = GenerationRequest(**{**vars(chat), "sampling": SamplingParameters(max_tokens=4)})
    fake = Fake()
    async with attached(qwen, fake) as engine:
        await ask(engine, chat)
        await ask(engine, GenerationRequest(**{**vars(chat), "tool_choice": "required"}))
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        asked_form = {"type": "json_schema", "name": "x", "schema": schema}
        await ask(engine, GenerationRequest(**{**vars(chat), "tools": (), "response_format": asked_form}))
        broken = {"type": "json_schema", "name": "x", "schema": {"type": "no such type"}}
        with pytest.raises(ConfigurationError, match="response_format cannot be followed"):
            await engine.generate(GenerationRequest(**{**vars(chat), "tools": (), "response_format": broken}))
    free, call, json_form = [one.get("structured_outputs") for one in fake.asked]
    assert free is None
    assert "<[6]>" in call["grammar"] and '"look"' in call["grammar"]
    assert json_form["json"]["properties"] == schema["properties"]


async def test_chats_are_rendered_here_and_continued_exactly(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake) as engine:
        asked = [{"role": "user", "content": "hi"}]
        await ask(engine, GenerationRequest(model="base", messages=asked, sampling=SamplingParameters(max_tokens=2)))
        assert engine.decode(fake.asked[0]["prompt"]) == "<|user|>hi<|end|><|assistant|>"
        answer = engine.encode("ho")
        messages = [*asked, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "so"}]
        follows = engine.continuation(GenerationRequest(model="base", messages=messages), 1, answer)
        assert follows is not None
        assert engine.decode(follows) == "<|end|><|user|>so<|end|><|assistant|>"


async def test_what_cannot_be_asked_is_refused(qwen: Path) -> None:
    async with attached(qwen, Fake()) as engine:
        with pytest.raises(ConfigurationError, match="'nobody' is not served; these are: \\['base', 'writer'\\]"):
            await engine.generate(request(PROMPT, model="nobody"))
        with pytest.raises(ConfigurationError, match="forced_token_ids"):
            await engine.generate(GenerationRequest(**{**vars(request(PROMPT)), "forced_token_ids": [1]}))
        with pytest.raises(ConfigurationError, match=r"temperature 0\.001 is below 0\.01"):
            await engine.generate(request(PROMPT, temperature=0.001))
        with pytest.raises(ConfigurationError, match="outside 0 to 262"):
            await engine.generate(request([263]))
        with pytest.raises(ContextLengthError, match="no room"):
            await engine.generate(request([7] * 200))


async def test_closing_or_dropping_an_answer_ends_it_on_the_server(qwen: Path) -> None:
    fake = Fake(token_seconds=0.05)
    async with attached(qwen, fake) as engine:
        for stream in (True, False):
            generation = await engine.generate(request(PROMPT, max_tokens=190, stream=stream, model="writer", seed=2))
            if stream:
                await anext(generation.deltas)
            while not fake.running:
                await asyncio.sleep(0.01)
            await generation.deltas.aclose()  # type: ignore[attr-defined]
            await until(lambda: not fake.running)
        dropped = await engine.generate(request(PROMPT, max_tokens=190, seed=2))
        await until(lambda: fake.running == 1)
        del dropped
        await until(lambda: not fake.running)
        assert fake.ended_early >= 1


async def until(is_so: Any, seconds: float = 5.0) -> None:
    """Wait for something that is to come."""
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.01)


# ---- replicas ------------------------------------------------------------------------------------------------------


async def test_requests_of_one_affinity_stay_on_a_replica_and_new_ones_go_where_is_room(qwen: Path) -> None:
    fakes = [Fake(token_seconds=0.02), Fake(token_seconds=0.02)]
    async with attached(qwen, *fakes) as engine:

        async def one(affinity: str) -> None:
            await ask(engine, GenerationRequest(**{**vars(request(PROMPT, max_tokens=5)), "affinity": affinity}))

        for _ in range(3):
            await asyncio.gather(*(one(f"rollout-{number}") for number in range(6)))
    assert [len(fake.asked) for fake in fakes] == [9, 9]


async def test_a_failed_server_request_is_asked_again_and_a_started_answer_is_not(qwen: Path) -> None:
    dead, alive = Fake(), Fake()
    async with attached(qwen, dead, alive, start_seconds=1.0) as engine:
        dead.fails, dead.is_dead = 1, True
        answers = await asyncio.gather(*(ask(engine, request(PROMPT)) for _ in range(2)))
        for answer in answers:
            assert_says(answer, 0.0)
        assert dead.fails == 0, "one of the two was refused first"
        alive.breaks_after = 2
        with pytest.raises(EngineError, match="does not answer"):
            await ask(engine, request(PROMPT, stream=True, max_tokens=190, seed=1))


async def test_a_request_that_a_healthy_server_fails_at_is_an_error(qwen: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("leyden_plugins.engines.vllm.fleet.SUSPECT_SECONDS", 0.3)
    fake = Fake()
    async with attached(qwen, fake) as engine:
        fake.fails = 1
        with pytest.raises(EngineError, match=r"status 500.*encountered an issue"):
            await ask(engine, request(PROMPT))
        assert_says(await ask(engine, request(PROMPT)), 0.0)


async def test_stopping_ends_an_answer_whose_server_is_being_looked_at(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake) as engine:
        fake.fails = 1
        failing = asyncio.create_task(ask(engine, request(PROMPT)))
        await until(lambda: fake.fails == 0)
        await asyncio.sleep(0.05)
        await engine.stop()
        with pytest.raises(EngineError):
            await asyncio.wait_for(failing, 3)


@pytest.mark.parametrize("policy", [WRITER, SOLVER])
async def test_a_server_of_others_that_was_started_again_while_nobody_asked_gets_the_weights(
    qwen: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyden_plugins.engines.vllm.fleet.LOOK_SECONDS", 0.05)
    async with serving(Fake()) as urls:
        engine = VLLMEngine(qwen, urls=urls)
        await engine.start([policy])
        weights = whole_weights(0.5) if policy is SOLVER else lora_weights(0.5)
        await engine.publish(policy.name, 1, weights)
    await asyncio.sleep(0.5)
    async with serving(Fake(), ports=[int(urls[0].rpartition(":")[2])]):
        try:
            generation = await engine.generate(request(PROMPT, model=policy.name))
            assert generation.version == 1
            assert_says((await collect(generation))[0], 0.5)
        finally:
            await engine.stop()


async def test_it_is_used_from_several_loops(qwen: Path) -> None:
    async with attached(qwen, Fake()) as engine:
        assert_says(await ask(engine, request(PROMPT)), 0.0)
        elsewhere = await asyncio.to_thread(lambda: asyncio.run(ask(engine, request(PROMPT))))
        assert_says(elsewhere, 0.0)


# ---- LoRAs ---------------------------------------------------------------------------------------------------------


async def test_a_request_keeps_the_version_it_began_with_which_is_then_unloaded(qwen: Path) -> None:
    fakes = [Fake(token_seconds=0.01), Fake(token_seconds=0.01)]
    async with attached(qwen, *fakes) as engine:
        assert engine.keeps_versions
        await engine.publish("writer", 1, lora_weights(0.5))
        first = dict(fakes[0].adapters)
        assert list(first.values()) == pytest.approx([0.5])
        old = [await engine.generate(request(PROMPT, model="writer", max_tokens=100, seed=7)) for _ in range(2)]
        await engine.publish("writer", 2, lora_weights(1.5))
        new = await engine.generate(request(PROMPT, model="writer", temperature=0.7))
        assert [one.version for one in (*old, new)] == [1, 1, 2]
        assert len(fakes[0].adapters) == 2
        assert_says((await collect(new))[0], 1.5, 0.7)
        for one in old:
            assert_says((await collect(one))[0], 0.5)
        await until(lambda: all(list(fake.adapters.values()) == pytest.approx([1.5]) for fake in fakes))
        assert_says(await ask(engine, request(PROMPT)), 0.0)
        assert "pause" not in fakes[0].calls


async def test_weights_that_the_server_does_not_sample_from_are_an_error_and_not_served(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake) as engine:
        await engine.publish("writer", 1, lora_weights(0.5))
        with pytest.raises(EngineError, match=r"log-probabilities of 8 tokens .* where float32 explains 0\.001"):
            await engine.publish("writer", 2, lora_weights(0.5, learner=0.6))
        assert list(fake.adapters.values()) == pytest.approx([0.5])
        generation = await engine.generate(request(PROMPT, model="writer"))
        assert generation.version == 1
        assert_says((await collect(generation))[0], 0.5)


async def test_a_folder_of_peft_is_copied_and_its_digest_is_that_of_its_tensors(qwen: Path, tmp_path: Path) -> None:
    from leyden_plugins.engines.vllm.folders import write_lora

    weights = lora_weights(0.25)
    assert weights.tensors is not None
    write_lora(tmp_path, LORA, weights.tensors)
    async with attached(qwen, Fake()) as engine:
        assert engine.sha256("writer") == engine.sha256("base")
        await engine.publish("writer", 1, weights)
        digest = engine.sha256("writer")
        await engine.publish("writer", 2, Weights(folder=tmp_path, logprobs=says(0.25)))
        (tmp_path / "adapter_model.safetensors").unlink()
        assert engine.sha256("writer") == digest != engine.sha256("base")
        await engine.publish("writer", 3, lora_weights(0.3))
        assert engine.sha256("writer") != digest


async def test_weights_that_do_not_fit_a_policy_are_refused(qwen: Path) -> None:
    async with attached(qwen, Fake(), policies=[WRITER, Policy("judge", trainable=False)]) as engine:
        with pytest.raises(ConfigurationError, match="cannot publish to 'base'; policies: \\['writer', 'judge'\\]"):
            await engine.publish("base", 1, lora_weights(0.1))
        with pytest.raises(ConfigurationError, match="these are whole weights"):
            await engine.publish("writer", 1, whole_weights(0.1))
        with pytest.raises(ConfigurationError, match="neither tensors nor a folder"):
            await engine.publish("writer", 1, Weights())
        large = LoRA(rank=64, alpha=8.0)
        with pytest.raises(ConfigurationError, match="rank 64; the servers were started for at most 8"):
            await engine.publish("writer", 1, Weights(lora=large, tensors=lora_weights(0.1).tensors))
        with pytest.raises(ConfigurationError, match="is not a factor of a LoRA"):
            await engine.publish("writer", 1, Weights(lora=LORA, tensors={"odd": torch.ones(1)}))
        with pytest.raises(ConfigurationError, match="rank 16, and the servers were started for at most 8"):
            await engine.start([Policy("late", lora=LoRA(rank=16))])


@pytest.mark.parametrize("policy", [WRITER, SOLVER])
async def test_an_engine_that_dies_of_a_push_is_waited_for_and_given_the_weights_again(
    qwen: Path, policy: Policy
) -> None:
    fake = Fake()
    async with attached(qwen, fake, policies=[policy]) as engine:
        weights = whole_weights if policy is SOLVER else lora_weights
        await engine.publish(policy.name, 1, weights(0.5))
        fake.dies_of_a_push = True
        push = asyncio.create_task(engine.publish(policy.name, 2, weights(0.8)))
        await until(lambda: engine.restarts == 1 or push.done())
        fake.is_dead = False
        await push
        assert_says(await ask(engine, request(PROMPT, model=policy.name)), 0.8)


# ---- whole weights -------------------------------------------------------------------------------------------------


async def test_whole_weights_replace_those_served_once_nothing_runs_and_stale_prefixes_are_dropped(qwen: Path) -> None:
    fake = Fake(token_seconds=0.005)
    async with attached(qwen, fake, policies=[SOLVER]) as engine:
        assert not engine.keeps_versions
        assert_says(await ask(engine, request(PROMPT, model="solver")), 0.0)
        running = await engine.generate(request(PROMPT, model="solver", max_tokens=60, seed=7))
        push = asyncio.create_task(engine.publish("solver", 1, whole_weights(0.5)))
        await until(lambda: not engine._running.fleet.entrance.is_open)  # type: ignore[union-attr]
        waiting = await engine.generate(request(PROMPT, model="solver"))  # let in when the push is over
        await push
        assert (running.version, waiting.version) == (0, 1)
        assert_says((await collect(running))[0], 0.0)
        assert_says((await collect(waiting))[0], 0.5)
        assert fake.calls == ["pause", "leyden_load", "reset", "reset", "resume"]
        with pytest.raises(ConfigurationError, match="'base' is not served any more: policy 'solver'"):
            await engine.generate(request(PROMPT))
        assert list(engine.models()) == ["solver"]


async def test_a_request_that_was_let_in_and_not_sent_yet_is_waited_for(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake, policies=[SOLVER]) as engine:
        running = engine._running
        assert running is not None
        let_in = running.policies.admit("solver", running.fleet)
        assert let_in is not None
        push = asyncio.create_task(engine.publish("solver", 1, whole_weights(0.5)))
        await until(lambda: not running.fleet.entrance.is_open)
        await asyncio.sleep(0.1)
        assert fake.calls == []
        running.policies.release(let_in, running.fleet)
        await push
        assert_says(await ask(engine, request(PROMPT, model="solver")), 0.5)


async def test_wrongly_loaded_weights_are_found_and_nothing_is_sampled_from_them(qwen: Path) -> None:
    fake = Fake(packs_heads=True)
    async with attached(qwen, fake, policies=[SOLVER]) as engine:
        with pytest.raises(EngineError, match="does not sample from the learner's weights"):
            await engine.publish("solver", 1, whole_weights(0.5))
        with pytest.raises(EngineError, match="a push of version 1 of 'solver' failed"):
            await engine.generate(request(PROMPT, model="solver"))
        fake.packs_heads = False
        await engine.publish("solver", 2, whole_weights(0.7))
        assert_says(await ask(engine, request(PROMPT, model="solver")), 0.7)


async def test_weights_that_the_server_refuses_leave_it_serving_what_it_did(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake, policies=[SOLVER]) as engine:
        await engine.publish("solver", 1, whole_weights(0.5))
        with pytest.raises(ConfigurationError, match=r"refuses the weights.*lacks a tensor"):
            await engine.publish("solver", 2, Weights(tensors={"odd": torch.ones(1)}))
        generation = await engine.generate(request(PROMPT, model="solver"))
        assert generation.version == 1
        assert_says((await collect(generation))[0], 0.5)


async def test_refused_weights_leave_several_servers_serving_and_a_broken_one_broken(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyden_plugins.engines.vllm.fleet.SUSPECT_SECONDS", 0.1)
    odd = Weights(tensors={"odd": torch.ones(1)})
    fakes = [Fake(), Fake()]
    async with attached(qwen, *fakes, policies=[SOLVER]) as engine:
        await engine.publish("solver", 1, whole_weights(0.5))
        with pytest.raises(ConfigurationError, match="refuses the weights"):
            await engine.publish("solver", 2, odd)
        assert_says(await ask(engine, request(PROMPT, model="solver")), 0.5)
        fakes[1].packs_heads = True
        with pytest.raises(EngineError, match="does not sample from the learner's weights"):
            await engine.publish("solver", 3, whole_weights(0.8))
        with pytest.raises(ConfigurationError, match="refuses the weights"):
            await engine.publish("solver", 4, odd)
        with pytest.raises(EngineError, match="push of version 3 of 'solver' failed"):
            await engine.generate(request(PROMPT, model="solver"))
    fake = Fake(packs_heads=True)
    async with attached(qwen, fake, policies=[SOLVER]) as engine:
        with pytest.raises(EngineError, match="does not sample from the learner's weights"):
            await engine.publish("solver", 1, whole_weights(0.8))
        with pytest.raises(ConfigurationError, match="refuses the weights"):
            await engine.publish("solver", 2, odd)
        with pytest.raises(EngineError, match="push of version 1 of 'solver' failed"):
            await engine.generate(request(PROMPT, model="solver"))


async def test_whole_weights_are_for_one_policy_alone(qwen: Path) -> None:
    for others in ([Policy("b")], [WRITER], [Policy("judge", trainable=False)]):
        with pytest.raises(ConfigurationError, match="'solver' trains all weights, of which a vLLM server has one set"):
            await VLLMEngine(qwen, urls=["http://127.0.0.1:9"]).start([SOLVER, *others])
    async with attached(qwen, Fake(), policies=[SOLVER]) as engine:
        await engine.start([SOLVER])
        with pytest.raises(ConfigurationError, match="cannot be served beside others"):
            await engine.start([Policy("other")])


async def test_a_policy_that_has_adapters_beside_it_cannot_become_one_with_whole_weights(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake, policies=[WRITER, Policy("judge", trainable=False)]) as engine:
        with pytest.raises(ConfigurationError, match="cannot be served beside others"):
            await engine.start([Policy("judge")])
        await engine.publish("writer", 1, lora_weights(0.5))
        assert_says(await ask(engine, request(PROMPT, model="judge")), 0.0)
    async with attached(qwen, fake) as engine:
        await engine.publish("writer", 1, lora_weights(0.5))
        with pytest.raises(ConfigurationError, match="cannot be served beside others"):
            await engine.start([Policy("writer")])
    async with attached(qwen, fake, policies=[Policy("solver", trainable=False)]) as engine:
        await engine.start([SOLVER])
        await engine.publish("solver", 1, whole_weights(0.5))


# ---- sleep ---------------------------------------------------------------------------------------------------------


async def test_asleep_requests_wait_and_weights_are_refused(qwen: Path) -> None:
    fake = Fake()
    async with attached(qwen, fake, sleep=True) as engine:
        assert isinstance(engine, Sleeps) and engine.sleeps
        await engine.sleep()
        await engine.sleep()
        waiting = asyncio.create_task(ask(engine, request(PROMPT)))
        with pytest.raises(EngineError, match="wake it before"):
            await engine.publish("writer", 1, lora_weights(0.5))
        await asyncio.sleep(0.05)
        assert not waiting.done() and not fake.asked
        await engine.wake()
        assert_says(await waiting, 0.0)
        assert fake.calls == ["sleep", "wake"]


async def test_stopping_ends_requests_that_wait_for_the_engine_to_wake(qwen: Path) -> None:
    async with attached(qwen, Fake(), sleep=True) as engine:
        await engine.sleep()
        waiting = asyncio.create_task(ask(engine, request(PROMPT)))
        await asyncio.sleep(0.05)
        await engine.stop()
        with pytest.raises(EngineError, match="was stopped"):
            await asyncio.wait_for(waiting, 3)


async def test_a_sleep_that_was_given_up_leaves_it_awake_and_a_run_that_broke_off_asleep_is_no_trap(qwen: Path) -> None:
    fake = Fake(token_seconds=0.01)
    async with attached(qwen, fake, sleep=True) as engine:
        running = await engine.generate(request(PROMPT, max_tokens=100, seed=7))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.sleep(), 0.1)
        assert_says(await asyncio.wait_for(ask(engine, request(PROMPT)), 3), 0.0)
        await collect(running)
        await engine.sleep()
        await engine.start([WRITER])
        assert_says(await asyncio.wait_for(ask(engine, request(PROMPT)), 3), 0.0)


# ---- what a server lacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "policies", "message"),
    [
        (Fake(version="0.24.1"), [WRITER], "vLLM '0.24.1'; this engine works with vllm>=0.29,<0.33"),
        (Fake(version="0.33.0"), [WRITER], "works with vllm>=0.29,<0.33"),
        (Fake(is_raw=True), [WRITER], "--logprobs-mode processed_logprobs"),
        (Fake(routes_off={"/v1/load_lora_adapter"}), [WRITER], "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"),
        (Fake(routes_off={"/collective_rpc"}), [SOLVER], "VLLM_SERVER_DEV_MODE=1"),
        (Fake(routes_off={"/pause"}), [SOLVER], "\\(/pause\\): VLLM_SERVER_DEV_MODE=1"),
        (Fake(has_extension=False), [SOLVER], "--worker-extension-cls leyden_vllm.Worker"),
        (Fake(sees=False), [SOLVER], "weights_folder="),
    ],
    ids=["older", "newer", "raw", "lora", "rpc", "pause", "extension", "folder"],
)
async def test_what_a_server_lacks_is_named_with_what_gives_it(
    qwen: Path, fake: Fake, policies: list[Policy], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        async with attached(qwen, fake, policies=policies):
            pass


async def test_a_server_without_sleep_or_of_another_name_is_told_apart(qwen: Path) -> None:
    with pytest.raises(ConfigurationError, match="--enable-sleep-mode"):
        async with attached(qwen, Fake(routes_off={"/sleep"}), sleep=True):
            pass
    fake = Fake(name="tiny")
    async with attached(qwen, fake) as engine:
        assert engine.context_length == 200
        await ask(engine, request(PROMPT))
    assert fake.asked[0]["model"] == "tiny"


async def test_no_server_at_all_is_an_error_after_the_time_allowed(qwen: Path) -> None:
    engine = VLLMEngine(qwen, urls=["http://127.0.0.1:9"], start_seconds=0.3)
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 is not ready after 0\.3 seconds"):
        await engine.start([WRITER])
    with pytest.raises(EngineError, match="not running"):
        await engine.generate(request(PROMPT))


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas must be at least 1, got 0"),
        ({"context_length": 1}, "context_length must be at least 2, got 1"),
        ({"max_lora_rank": 12}, "max_lora_rank must be one of .*, got 12"),
        ({"gpu_memory_utilization": 1.5}, "in \\(0, 1\\], got 1.5"),
        ({"start_seconds": 0}, "above 0, got 0"),
        ({"replicas": 2, "devices": ["0"]}, "devices=\\['0'\\] must name one for each of replicas=2"),
        ({"urls": ["localhost:8000"]}, "must begin with http"),
        ({"urls": "http://a"}, "lists of strings, not one"),
        ({"urls": ["http://a"], "kv_cache_bytes": 10}, "'kv_cache_bytes' is for servers that this engine starts"),
        ({"urls": ["http://a"], "python": "x"}, "'python' is for servers that this engine starts"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VLLMEngine("anything", **options)


def test_constructing_it_imports_neither_torch_nor_a_tokenizer() -> None:
    code = (
        "import sys; from leyden_plugins.engines.vllm import VLLMEngine; VLLMEngine('x', python='y');"
        "print([name for name in ('torch', 'transformers', 'aiohttp', 'vllm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_it_is_an_engine_that_sleeps_and_continues_exactly_and_is_found_by_its_name() -> None:
    engine = VLLMEngine("x")
    assert isinstance(engine, ContinuesExactly) and isinstance(engine, Sleeps) and not engine.sleeps
    assert load_plugins().get("engine", "vllm") is VLLMEngine
    assert {name for name in vars(Engine) if not name.startswith("_")} <= set(dir(engine))


def test_the_context_length_is_known_once_started() -> None:
    with pytest.raises(EngineError, match="known once the engine is started"):
        _ = VLLMEngine("x").context_length
    assert VLLMEngine("x", context_length=64).context_length == 64
