"""Starting, refusing, aborting, failing and stopping: nobody waits for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leyden.errors import ConfigurationError, ContextLengthError, EngineError
from leyden.interfaces import Engine, Weights
from leyden.roles import Policy
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.engines.transformers.cache import PrefixCache
from leyden_plugins.engines.transformers.lane import WindowLane
from tests.engines.asking import ask, reference, request, running
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.anyio
PROMPT = (40, 41, 42, 43, 44)


async def test_it_is_an_engine_and_starting_twice_adds_only_what_is_new(qwen: Path) -> None:
    engine = TransformersEngine(qwen)
    await asyncio.gather(engine.start([Policy("a")]), engine.start([Policy("b")]))
    assert isinstance(engine, Engine)
    await engine.publish("a", 3, Weights(tensors=reference(qwen).state_dict()))
    await engine.start([Policy("a"), Policy("c")])
    assert sorted(engine.models()) == ["a", "b", "base", "c"]
    assert (await engine.generate(request(PROMPT, model="a"))).version == 3
    assert engine.model == str(qwen)
    assert engine.decode([5, 72 + 7]) == "<|end|>" + engine.decode([79])
    await engine.stop()
    await engine.stop()


async def test_importing_and_making_an_engine_imports_no_torch(qwen: Path) -> None:
    code = (
        "import sys; from leyden_plugins.engines.transformers import TransformersEngine; "
        f"TransformersEngine({str(qwen)!r}); raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


async def test_before_it_is_started_it_says_so(qwen: Path) -> None:
    engine = TransformersEngine(qwen)
    with pytest.raises(EngineError, match=r"not running; await engine.start"):
        await engine.generate(request(PROMPT))
    with pytest.raises(EngineError, match="known once the engine is started"):
        _ = engine.context_length
    assert TransformersEngine(qwen, context_length=9).context_length == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"threads": 0}, "threads=0"),
        ({"context_length": 1}, "context_length must be at least 2, got 1"),
    ],
)
async def test_impossible_options_are_refused(qwen: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TransformersEngine(qwen, **options)


async def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, qwen: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot load '{tmp_path}'"):
        await TransformersEngine(tmp_path).start([])
    with pytest.raises(ConfigurationError, match=r"context_length=1000 is beyond the 256 positions"):
        await TransformersEngine(qwen, context_length=1000).start([])
    with pytest.raises(ConfigurationError, match=r"dtype 'float8' is not one of"):
        await TransformersEngine(qwen, dtype="float8").start([])


async def test_a_model_that_does_not_go_on_from_a_cache_is_refused(tmp_path: Path) -> None:
    sizes = {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 1}
    tiny_checkpoint(tmp_path, "mamba2", **sizes)
    with pytest.raises(ConfigurationError, match="Mamba2ForCausalLM does not continue from `past_key_values`"):
        await TransformersEngine(tmp_path, context_length=50).start([])


async def test_unknown_models_and_impossible_prompts_are_refused(qwen: Path) -> None:
    async with running(qwen, "sql") as engine:
        with pytest.raises(ConfigurationError, match=r"model 'sq' is not served; these are: \['base', 'sql'\]"):
            await engine.generate(request(PROMPT, model="sq"))
        with pytest.raises(ConfigurationError, match="prompt token 9999 is outside"):
            await engine.generate(request([1, 9999]))
        with pytest.raises(ConfigurationError, match="the prompt is empty"):
            await engine.generate(request([]))


async def test_a_prompt_without_room_is_refused_and_a_long_answer_ends_at_the_limit(qwen: Path) -> None:
    async with running(qwen, context_length=20) as engine:
        with pytest.raises(ContextLengthError, match="the prompt has 20 tokens and the context 20"):
            await engine.generate(request([7] * 20))
        last = await ask(engine, request([7] * 19, max_tokens=None))
        longer = await ask(engine, request([7] * 5, max_tokens=None))
    assert (len(last.token_ids), len(longer.token_ids)) == (1, 15)
    assert last.finish_reason == longer.finish_reason == "length"


@pytest.mark.parametrize("way", ["aclose", "drop"])
async def test_leaving_early_frees_the_place_in_the_batch(qwen: Path, way: str) -> None:
    async with running(qwen, max_batch_size=2) as engine:
        long = [await engine.generate(request(PROMPT, stream=True, max_tokens=250)) for _ in range(2)]
        for generation in long:
            await anext(generation.deltas)
        if way == "aclose":
            for generation in long:
                await generation.deltas.aclose()  # type: ignore[attr-defined]
                assert [delta async for delta in generation.deltas] == []
        del long, generation
        await asyncio.wait_for(ask(engine, request(PROMPT, max_tokens=2)), timeout=10)
        assert engine.running == 0
        assert engine.tokens_sampled < 400


async def test_a_request_closed_while_it_waits_never_runs(qwen: Path) -> None:
    async with running(qwen, max_batch_size=1) as engine:
        first = asyncio.create_task(ask(engine, request(PROMPT, max_tokens=50)))
        await asyncio.sleep(0)
        waiting = await engine.generate(request(PROMPT, max_tokens=250))
        await waiting.deltas.aclose()  # type: ignore[attr-defined]
        await first
        await ask(engine, request(PROMPT, max_tokens=3))
        assert engine.tokens_sampled == 53


async def test_a_task_that_is_cancelled_while_reading_leaves_nothing_behind(qwen: Path) -> None:
    async with running(qwen, max_batch_size=1) as engine:
        task = asyncio.create_task(ask(engine, request(PROMPT, max_tokens=250)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await asyncio.wait_for(ask(engine, request(PROMPT, max_tokens=2)), timeout=10)


async def test_stopping_fails_what_is_in_flight_and_refuses_what_comes(qwen: Path) -> None:
    engine = TransformersEngine(qwen, max_batch_size=1, eos_token_ids=())
    await engine.start([])
    tasks = [asyncio.create_task(ask(engine, request(PROMPT, max_tokens=250))) for _ in range(3)]
    await asyncio.sleep(0.02)
    await engine.stop()
    for task in tasks:
        with pytest.raises(EngineError, match="the engine was stopped"):
            await asyncio.wait_for(task, timeout=10)
    with pytest.raises(EngineError, match="not running"):
        await engine.generate(request(PROMPT))
    sampled = engine.tokens_sampled
    await engine.start([])
    await ask(engine, request(PROMPT, max_tokens=4))
    assert engine.tokens_sampled == sampled + 4
    await engine.stop()


@pytest.mark.parametrize("where", ["admit", "decode"])
async def test_an_error_in_the_loop_fails_its_requests_and_the_next_ones_work(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async with running(qwen, "sql") as engine:
        await engine.publish("sql", 1, Weights(tensors=reference(qwen).state_dict()))
        other = asyncio.create_task(ask(engine, request(PROMPT, max_tokens=200)))
        await asyncio.sleep(0.01)
        original = getattr(WindowLane, where)
        published = engine._served["sql"][1].weights

        def broken(lane: WindowLane, *rows: object) -> object:  # type: ignore[type-arg]
            if lane.weights is published:
                raise RuntimeError("out of memory")
            return original(lane, *rows)

        monkeypatch.setattr(WindowLane, where, broken)
        asked = [asyncio.create_task(ask(engine, request(PROMPT, model="sql", n=2))) for _ in range(4)]
        for task in asked:
            with pytest.raises(EngineError, match=r"sampling failed: RuntimeError\('out of memory'\)") as caught:
                await asyncio.wait_for(task, timeout=10)
            assert isinstance(caught.value.__cause__, RuntimeError)
        monkeypatch.setattr(WindowLane, where, original)
        assert len((await ask(engine, request(PROMPT, model="sql"))).token_ids) == 8
        assert len((await other).token_ids) == 200, "requests on other weights are not disturbed"


async def test_a_thread_that_dies_fails_everybody(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leyden_plugins.engines.transformers.batching import Batcher

    async with running(qwen) as engine:
        task = asyncio.create_task(ask(engine, request(PROMPT, max_tokens=250)))
        await asyncio.sleep(0.02)

        def broken(batcher: Batcher) -> None:
            raise MemoryError("gone")

        monkeypatch.setattr(Batcher, "_admit", broken)
        with pytest.raises(EngineError, match="the engine's thread has ended: MemoryError"):
            await asyncio.wait_for(task, timeout=10)
        with pytest.raises(EngineError, match="the engine is stopped"):
            await engine.generate(request(PROMPT))


async def test_weights_that_are_not_numbers_are_an_error_not_an_answer(qwen: Path) -> None:
    spoilt = reference(qwen).state_dict()
    spoilt["model.norm.weight"] = spoilt["model.norm.weight"] * float("nan")
    async with running(qwen, "sql") as engine:
        await engine.publish("sql", 1, Weights(tensors=spoilt))
        with pytest.raises(EngineError, match="the published weights hold NaN"):
            await ask(engine, request(PROMPT, model="sql"))
        assert len((await ask(engine, request(PROMPT))).token_ids) == 8


async def test_publishing_refuses_what_is_not_this_policy_or_model(qwen: Path, tmp_path: Path) -> None:
    tensors = reference(qwen).state_dict()
    async with running(qwen, "sql") as engine:
        await engine.publish("sql", 1, Weights(tensors=tensors))
        for name in ("base", "other"):
            with pytest.raises(ConfigurationError, match=f"cannot publish to '{name}'; policies: \\['sql'\\]"):
                await engine.publish(name, 2, Weights(tensors=tensors))
        lacking = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        with pytest.raises(ConfigurationError, match=r"missing \['lm_head.weight'\], unknown \[\]"):
            await engine.publish("sql", 2, Weights(tensors=lacking))
        with pytest.raises(ConfigurationError, match=r"weight 'model.norm.weight' is \(3,\); the model has \(32,\)"):
            await engine.publish("sql", 2, Weights(tensors=tensors | {"model.norm.weight": torch.zeros(3)}))
        with pytest.raises(ConfigurationError, match=r"lacks 'model.safetensors'"):
            await engine.publish("sql", 2, Weights(folder=tmp_path))
        await engine.publish("sql", 2, Weights(tensors=tensors))


async def test_old_versions_are_forgotten_once_nobody_uses_them(qwen: Path) -> None:
    tensors = reference(qwen).state_dict()
    async with running(qwen, "sql") as engine:
        for version in range(1, 6):
            await engine.publish("sql", version, Weights(tensors=tensors))
            await ask(engine, request(PROMPT, model="sql"))
            await ask(engine, request(PROMPT))
        batcher = engine._started().batcher
        await ask(engine, request(PROMPT))
        assert len(batcher._lanes) <= 2
        assert {key[0] for key in batcher._cache._entries} <= set(batcher._lanes)


def test_the_cache_keeps_to_its_limit_and_tells_weights_apart() -> None:
    cache = PrefixCache(100)
    keys_values = torch.zeros(1, 2, 1, 40, 4)
    for start in range(5):
        cache.add(0, tuple(range(start, start + 40)), keys_values)
    assert cache.tokens == 80
    assert cache.find(0, tuple(range(40))) is None
    hit = cache.find(0, tuple(range(4, 60)))
    assert hit is not None
    assert hit.length == 32
    assert cache.find(1, tuple(range(4, 44))) is None
    cache.drop(0)
    assert (cache.tokens, cache.find(0, tuple(range(4, 44)))) == (0, None)
