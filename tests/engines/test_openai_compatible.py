"""An engine in front of a server that is not ours: exact tokens and log-probabilities, or a clear refusal."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from leyden.errors import ConfigurationError, ContextLengthError, EngineError
from leyden.interfaces import ContinuesExactly, Delta, Engine, GenerationRequest, SamplingParameters, Weights
from leyden.plugins import load_plugins
from leyden.roles import Policy
from leyden_plugins.engines.openai_compatible import OpenAICompatibleEngine
from leyden_plugins.engines.openai_compatible.llama_cpp import certain
from leyden_plugins.engines.servers.answers import Piece, checked
from tests.engines.asking import Answered, assert_logprobs, collect, request
from tests.engines.fake_servers import FakeLlamaCpp, FakeServer, FakeSGLang, FakeVLLM, serving
from tests.tiny import END, tiny_checkpoint

pytestmark = pytest.mark.anyio
PROMPT = [2, 40, 50, 60, 3]
KINDS: dict[str, type[FakeServer]] = {"vllm": FakeVLLM, "sglang": FakeSGLang, "llama.cpp": FakeLlamaCpp}


@asynccontextmanager
async def attached(fake: FakeServer, folder: Path, **options: Any) -> AsyncIterator[OpenAICompatibleEngine]:
    """A started engine in front of a running fake; without `eos_token_ids` its own."""
    async with serving(fake):
        engine = OpenAICompatibleEngine(folder, fake.url + "/v1", **options)
        try:
            await engine.start([Policy("writer")])
            fake.asked.clear()
            fake.sampled.clear()
            yield engine
        finally:
            await engine.stop()


async def ask(engine: OpenAICompatibleEngine, wanted: GenerationRequest) -> Answered:
    return (await collect(await engine.generate(wanted)))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_the_servers_and_their_logprobs_those_of_a_forward_pass(
    qwen: Path, kind: str, temperature: float, stream: bool
) -> None:
    server = KINDS[kind](qwen)
    async with attached(server, qwen) as engine:
        assert engine.found.server == kind
        assert engine.found.scales_logprobs
        generation = await engine.generate(
            request(PROMPT, model="writer", stream=stream, temperature=temperature, max_tokens=16, n=3, seed=5)
        )
        choices = await collect(generation)
        assert (generation.version, generation.is_off_distribution) == (0, False)
        assert sorted(choice.token_ids for choice in choices) == sorted(server.sampled)
        assert len({tuple(choice.token_ids) for choice in choices}) == 3, "choices of one seed are different"
        for choice in choices:
            assert_logprobs(server.model, PROMPT, choice, temperature)
            assert choice.text == engine.decode([token for token in choice.token_ids if token > 6])
            assert choice.finish_reason == ("stop" if choice.token_ids[-1] == END else "length")
            if stream and engine.found.streams:
                assert len(choice.deltas) == len(choice.token_ids)
        again = await collect(
            await engine.generate(request(PROMPT, temperature=temperature, max_tokens=16, n=3, seed=5))
        )
        assert [choice.token_ids for choice in again] == [choice.token_ids for choice in choices]


async def test_sglang_events_that_hold_only_new_tokens_read_the_same(qwen: Path) -> None:
    server = FakeSGLang(qwen)
    server.is_incremental, server.info_path = True, "/get_server_info"
    async with attached(server, qwen, eos_token_ids=()) as engine:
        answer = await ask(engine, request(PROMPT, stream=True, max_tokens=9))
        assert answer.token_ids == server.sampled[0]
        assert_logprobs(server.model, PROMPT, answer, 1.0)


async def test_an_event_of_sglang_that_is_lost_is_missed(qwen: Path) -> None:
    server = FakeSGLang(qwen)
    server.is_incremental, server.loses = True, 3
    async with attached(server, qwen, eos_token_ids=()) as engine:
        with pytest.raises(EngineError, match="sampled 2 more tokens and names 1"):
            await ask(engine, request(PROMPT, stream=True, max_tokens=9))


@pytest.mark.parametrize("logprob", [None, math.nan])
def test_a_log_probability_that_is_no_number_is_refused(logprob: float | None) -> None:
    with pytest.raises(EngineError, match="is not a number"):
        checked(Piece(index=0, token_ids=[1, 2], logprobs=[-1.0, logprob]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_what_llama_cpp_leaves_out_is_scored_afterwards(
    qwen: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyden_plugins.engines.openai_compatible.llama_cpp.LIKELIEST", 2)
    server = FakeLlamaCpp(qwen)
    async with attached(server, qwen) as engine:
        answer = await ask(engine, request(PROMPT, max_tokens=60, temperature=temperature, seed=1))
        asked = {body["n_probs"] for body in server.asked if "logit_bias" in body}
        # At temperature 1 the likeliest are tried first, and all where that was not enough.
        assert asked == ({2, 2**20} if temperature == 1 else {2**20}), "this seed samples half characters"
        assert_logprobs(server.model, PROMPT, answer, temperature)
        half = next(place for place, token in enumerate(answer.token_ids) if server.piece(token) > b"\xc0")
        before = [*PROMPT, *answer.token_ids[:half]]
        singles = [await ask(engine, request(before, max_tokens=1, temperature=temperature, seed=s)) for s in range(20)]
        alone = [single for single in singles if server.piece(single.token_ids[0]) > b"\xc0"]
        assert alone, "one of these seeds samples nothing but half a character"
        assert_logprobs(server.model, before, alone[0], temperature)
        server.most_listed = 1
        with pytest.raises(EngineError, match="listed 1 tokens, and none of them was"):
            await ask(engine, request(PROMPT, max_tokens=60, temperature=temperature, seed=1))


def test_a_place_is_certain_only_where_both_directions_agree() -> None:
    assert certain([1, 2, 3], [(1, -1.0), (2, -2.0), (3, -3.0)]) == [-1.0, -2.0, -3.0]
    assert certain([1, 2, 3], [(1, -1.0), (3, -3.0)]) == [-1.0, None, -3.0]
    assert certain([1, 7, 7, 2], [(1, -1.0), (7, -7.0), (2, -2.0)]) == [-1.0, None, None, -2.0]
    assert certain([1, 2], [(9, -9.0)]) == [None, None]


async def test_nothing_is_left_to_the_servers_defaults(qwen: Path) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "stop": ("x",), "max_tokens": 4}
    wanted = request(PROMPT, frequency_penalty=0.5, presence_penalty=0.25, seed=7, **sampling)
    common = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "stop": ["x"]}
    common |= {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    for kind, where in (("vllm", None), ("sglang", "sampling_params"), ("llama.cpp", None)):
        server = KINDS[kind](qwen)
        async with attached(server, qwen) as engine:
            await ask(engine, wanted)
            body = server.asked[0] if where is None else server.asked[0][where]
            assert body.items() >= common.items(), kind
            assert body.get("repetition_penalty", body.get("repeat_penalty")) == 1.0
            limit = {"vllm": "max_tokens", "sglang": "max_new_tokens", "llama.cpp": "n_predict"}[kind]
            assert body[limit] == 4
            if kind == "llama.cpp":
                assert body["samplers"] == ["penalties", "top_k", "top_p", "min_p", "temperature"]
                assert not body["post_sampling_probs"], "behind a mask they would be of what is left"
            else:
                assert body["stop_token_ids"] == [END]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_raw_logprobs_are_found_and_calls_at_other_temperatures_marked(
    qwen: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = KINDS[kind](qwen, is_raw=True)
    async with attached(server, qwen) as engine:
        assert not engine.found.scales_logprobs
        assert "log-probabilities only at temperature 1" in caplog.text
        cool = await engine.generate(request(PROMPT, temperature=0.5))
        warm = await engine.generate(request(PROMPT, temperature=1.0))
        assert (cool.is_off_distribution, warm.is_off_distribution) == (True, False)
        assert_logprobs(server.model, PROMPT, (await collect(warm))[0], 1.0)


async def test_text_stop_strings_and_formats_are_ours(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    async with attached(server, qwen, eos_token_ids=()) as engine:
        whole = await ask(engine, request(PROMPT, max_tokens=30, seed=3))
        cut = next(character for character in whole.text[3:] if character.isalpha() and character.isascii())
        answer = await ask(engine, request(PROMPT, max_tokens=30, seed=3, stop=(cut,)))
        assert answer.finish_reason == "stop"
        assert answer.text == whole.text.split(cut)[0]
        schema = {"type": "object"}
        format_ = {"type": "json_schema", "name": "x", "schema": schema}
        await ask(
            engine,
            GenerationRequest(
                model="base",
                messages=(),
                prompt_token_ids=PROMPT,
                response_format=format_,
                sampling=SamplingParameters(max_tokens=2),
            ),
        )
        assert server.asked[-1]["structured_outputs"] == {"json": schema}


async def test_chats_are_rendered_here_and_continued_exactly(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    async with attached(server, qwen) as engine:
        wanted = GenerationRequest(
            model="base", messages=[{"role": "user", "content": "hi"}], sampling=SamplingParameters(max_tokens=1)
        )
        await ask(engine, wanted)
        assert (
            server.asked[0]["prompt"] == list(engine.prompt(wanted)) == engine.encode("<|user|>hi<|end|><|assistant|>")
        )
        said = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "so"},
        ]
        after = engine.continuation(GenerationRequest(model="base", messages=said), 1, (40, END))
        assert list(after or ()) == engine.encode("<|user|>so<|end|><|assistant|>")


@pytest.mark.parametrize(("kind", "length"), [("vllm", 200), ("sglang", 149), ("llama.cpp", 180)])
async def test_the_context_is_the_servers_and_no_answer_goes_beyond(qwen: Path, kind: str, length: int) -> None:
    server = KINDS[kind](qwen)
    async with attached(server, qwen) as engine:
        assert engine.context_length == length
        with pytest.raises(ContextLengthError, match="no room"):
            await engine.generate(request([7] * length))
        await ask(engine, request([7] * (length - 2), max_tokens=50))
        asked = server.asked[0]
        assert (
            asked.get("sampling_params", asked).get("max_new_tokens", asked.get("max_tokens", asked.get("n_predict")))
            == 2
        )
    with pytest.raises(ConfigurationError, match="beyond the"):
        async with attached(KINDS[kind](qwen), qwen, context_length=201):
            pass


async def test_a_server_of_another_tokenizer_is_refused(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    server.tokenizer.add_tokens(["def"])
    with pytest.raises(ConfigurationError, match="tokenizer is another: from token 17 on"):
        async with attached(server, qwen):
            pass


async def test_a_server_without_token_ids_is_refused(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    server.gives_token_ids = False
    with pytest.raises(ConfigurationError, match="returns no token ids"):
        async with attached(server, qwen):
            pass


async def test_an_unknown_server_and_one_that_is_not_there_are_told_apart(qwen: Path) -> None:
    class Nothing(FakeServer):
        def routes(self) -> list[Any]:
            return []

    with pytest.raises(ConfigurationError, match=r"none of .*llama\.cpp.*sglang.*vllm"):
        async with attached(Nothing(qwen), qwen):
            pass
    with pytest.raises(EngineError, match="does not answer"):
        await OpenAICompatibleEngine(qwen, "http://127.0.0.1:9").start([])


async def test_a_served_name_is_asked_for_with_the_key(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    async with attached(server, qwen, served_name="adapter", api_key="secret", server="vllm") as engine:
        await ask(engine, request(PROMPT, max_tokens=1))
        assert server.asked[0]["model"] == "adapter"
        assert set(server.headers) == {"Bearer secret"}
    with pytest.raises(ConfigurationError, match=r"served_name='other' is not served; the server has \['tiny'"):
        async with attached(FakeVLLM(qwen), qwen, served_name="other"):
            pass
    with pytest.raises(ConfigurationError, match="one model; leave it out"):
        async with attached(FakeLlamaCpp(qwen), qwen, served_name="other"):
            pass
    sglang = FakeSGLang(qwen)
    async with attached(sglang, qwen, served_name="lora") as engine:
        await ask(engine, request(PROMPT, max_tokens=1))
        assert sglang.asked[0]["lora_path"] == "lora"


async def test_refusals_of_the_server_are_not_retried_and_failures_are(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    async with attached(server, qwen) as engine:
        server.refuses = (400, "no such option")
        with pytest.raises(ConfigurationError, match="no such option"):
            await ask(engine, request(PROMPT))
        server.refuses = (503, "still loading")
        with pytest.raises(EngineError, match="still loading"):
            await ask(engine, request(PROMPT))
        server.refuses, server.breaks_after = None, 3
        with pytest.raises(EngineError, match=r"does not answer|ended"):
            await ask(engine, request(PROMPT, stream=True, max_tokens=20))


async def test_closing_an_answer_ends_it_on_the_server(qwen: Path) -> None:
    server = FakeVLLM(qwen)
    server.token_seconds = 0.05
    async with attached(server, qwen, eos_token_ids=()) as engine:
        generation = await engine.generate(request(PROMPT, stream=True, max_tokens=100, n=2))
        assert isinstance(await anext(generation.deltas), Delta)
        await generation.deltas.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            while server.ended_early < 2:
                await asyncio.sleep(0.02)
        assert all(len(answer) < 100 for answer in server.sampled)


async def test_what_it_cannot_do_is_refused(qwen: Path) -> None:
    async with attached(FakeVLLM(qwen), qwen) as engine:
        with pytest.raises(ConfigurationError, match="not this engine's to change"):
            await engine.publish("writer", 1, Weights(tensors={}))
        with pytest.raises(ConfigurationError, match="cannot score a given answer"):
            await engine.generate(
                GenerationRequest(model="base", messages=(), prompt_token_ids=[1], forced_token_ids=[2])
            )
        with pytest.raises(ConfigurationError, match="cannot force a tool call"):
            await engine.generate(
                GenerationRequest(model="base", messages=(), prompt_token_ids=[1], tool_choice="required")
            )
        with pytest.raises(ConfigurationError, match=r"model 'reader' is not served; these are: \['base', 'writer'\]"):
            await engine.generate(request(PROMPT, model="reader"))
        assert engine.sha256("base") == engine.sha256("writer")
    with pytest.raises(EngineError, match="not running"):
        await engine.generate(request(PROMPT))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url must begin with http"),
        ({"server": "ollama"}, "server must be one of .* got 'ollama'"),
        ({"context_length": 1}, "context_length must be at least 2, got 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OpenAICompatibleEngine("model", **({"base_url": "http://127.0.0.1:8000"} | options))


async def test_it_is_used_from_several_loops(qwen: Path) -> None:
    async with attached(FakeVLLM(qwen), qwen) as engine:
        here = await ask(engine, request(PROMPT, seed=2))
        there = await asyncio.to_thread(asyncio.run, ask(engine, request(PROMPT, seed=2, stream=True)))
        assert there.token_ids == here.token_ids


def test_constructing_it_imports_neither_torch_nor_a_tokenizer() -> None:
    script = (
        "import sys\nfrom leyden_plugins.engines.openai_compatible import OpenAICompatibleEngine\n"
        "OpenAICompatibleEngine('model', 'http://127.0.0.1:8000')\n"
        "print([name for name in ('torch', 'transformers', 'aiohttp') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_it_is_an_engine_that_continues_exactly() -> None:
    engine = OpenAICompatibleEngine("model", "http://127.0.0.1:8000", context_length=64)
    assert isinstance(engine, Engine)
    assert isinstance(engine, ContinuesExactly)


def test_it_is_found_by_its_name() -> None:
    assert load_plugins().get("engine", "openai-compatible") is OpenAICompatibleEngine


async def test_the_kind_of_checkpoint_does_not_matter(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "gpt2", n_inner=48)
    server = FakeVLLM(folder)
    async with attached(server, folder, eos_token_ids=()) as engine:
        assert_logprobs(server.model, PROMPT, await ask(engine, request(PROMPT)), 1.0)
