"""What engines in front of servers share: pieces to deltas, HTTP, and a model's facts without its weights."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from transformers import AutoModelForCausalLM, AutoTokenizer

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import Delta, GenerationRequest, SamplingParameters
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.engines.servers.answers import Piece, deltas_of
from leyden_plugins.engines.servers.http import Http, Refused, Unreachable
from leyden_plugins.engines.servers.model import read_model
from leyden_plugins.torch_models import eos_token_ids
from tests.tiny import END, tiny_checkpoint

pytestmark = pytest.mark.anyio
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    """Those of the tiny model."""
    return read_model(str(tiny_checkpoint(tmp_path_factory.mktemp("model")))).prompts


def asked(*, stream: bool = True, tools: bool = False, n: int = 1, stop: tuple[str, ...] = ()) -> GenerationRequest:
    return GenerationRequest(
        model="m",
        messages=(),
        tools=[TOOL] if tools else (),
        stream=stream,
        sampling=SamplingParameters(n=n, stop=stop),
    )


def piece(token_ids: Sequence[int], reason: Any = None, index: int = 0) -> Piece:
    """Tokens whose log-probabilities tell them apart."""
    logprobs = [-token / 1000 for token in token_ids]
    return Piece(index=index, token_ids=token_ids, logprobs=logprobs, finish_reason=reason)


async def deltas(pieces: Sequence[Piece], request: GenerationRequest, prompts: Prompts) -> list[Delta]:
    async def given() -> AsyncGenerator[Piece, None]:
        for one in pieces:
            yield one

    return [delta async for delta in deltas_of(given(), request, prompts)]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_is_given_complete_and_its_text_is_held_back(
    prompts: Prompts, size: int, stream: bool
) -> None:
    tokens = [*prompts.encode("so: "), CALL, *prompts.encode('look {"q": 1}'), END]
    pieces = [piece(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    pieces[-1] = piece(pieces[-1].token_ids, "stop")
    found = await deltas(pieces, asked(stream=stream, tools=True), prompts)
    assert len(found) == (len(pieces) if stream else 1)
    assert [token for delta in found for token in delta.token_ids] == tokens
    assert [value for delta in found for value in delta.logprobs] == [-token / 1000 for token in tokens]
    assert "".join(delta.text for delta in found).rstrip() == "so:"
    assert found[-1].finish_reason == "tool_calls"
    function: Any = found[-1].tool_calls[0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("look", {"q": 1})


async def test_an_answer_cut_by_its_length_holds_no_call(prompts: Prompts) -> None:
    tokens = [CALL, *prompts.encode('look {"q": 1}')]
    (last,) = await deltas([piece(tokens, "length")], asked(tools=True), prompts)
    assert (last.finish_reason, last.tool_calls, last.text) == ("length", (), '<|call|>look {"q": 1}')


async def test_special_tokens_are_hidden_without_tools(prompts: Prompts) -> None:
    (last,) = await deltas([piece([CALL, *prompts.encode("a"), 2, END], "stop")], asked(), prompts)
    assert (last.text, last.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_behind_a_stop_string_are_no_part_of_the_answer(prompts: Prompts, stream: bool) -> None:
    tokens = prompts.encode("abSTOPcd")
    pieces = [piece(tokens[:4]), piece(tokens[4:], "length")]
    found = await deltas(pieces, asked(stream=stream, stop=("STOP",)), prompts)
    assert "".join(delta.text for delta in found) == "ab"
    assert [token for delta in found for token in delta.token_ids] == tokens[:6]
    assert sum(len(delta.logprobs) for delta in found) == 6
    assert found[-1].finish_reason == "stop"


async def test_a_stop_string_that_only_we_see_ends_the_answer_before_the_server_does(prompts: Prompts) -> None:
    pieces = [piece([token]) for token in prompts.encode("abXcdefg")]
    found = await deltas(pieces, asked(stop=("X",)), prompts)
    assert ("".join(delta.text for delta in found), found[-1].finish_reason) == ("ab", "stop")


async def test_choices_are_told_apart_and_each_ends_once(prompts: Prompts) -> None:
    one, two = prompts.encode("one"), prompts.encode("two")
    pieces = [piece(two[:1], index=1), piece(one, "length"), piece(one, "length"), piece(two[1:], "length", index=1)]
    found = await deltas(pieces, asked(n=2), prompts)
    assert [(delta.index, delta.finish_reason) for delta in found] == [(1, None), (0, "length"), (1, "length")]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece([40])], "ended its answer before it was finished"),
        ([Piece(index=0, token_ids=[40], logprobs=[math.nan])], "not a number"),
        ([Piece(index=0, token_ids=[40, 41], logprobs=[-1.0])], "2 tokens and 1 log-probabilities"),
        ([piece([40], index=1)], "choice 1 of 1"),
    ],
)
async def test_answers_that_nothing_could_be_trained_on_are_errors(
    prompts: Prompts, pieces: Sequence[Piece], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        await deltas(pieces, asked(), prompts)


@asynccontextmanager
async def answering(answer: Any) -> AsyncIterator[Http]:
    """A server that answers everything with one function."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    http = Http(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    try:
        yield http
    finally:
        await http.close()
        await runner.cleanup()


async def test_answers_are_json_text_or_nothing() -> None:
    said = {"/json": '{"a": 1}', "/text": "Success: added", "/nothing": ""}

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=said[request.path])

    async with answering(answer) as http:
        assert [await http.get(path) for path in said] == [{"a": 1}, "Success: added", None]


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"error": {"message": "too long"}}', "too long"), ('{"detail": "odd"}', '{"detail": "odd"}'), ("<p>", "<p>")],
)
async def test_a_refusal_says_what_the_server_said(text: str, said: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=text, status=400)

    async with answering(answer) as http:
        with pytest.raises(Refused, match="status 400") as told:
            await http.post("/x", {})
        assert (told.value.status, told.value.said) == (400, said)


async def test_a_request_on_a_connection_that_a_failed_server_has_closed_is_sent_again() -> None:
    ports = []

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        if ports.count(ports[0]) == 2 and len(ports) == 2:
            request.transport.close()
        return web.Response(status=500 if len(ports) == 1 else 200)

    async with answering(answer) as http:
        with pytest.raises(Refused):
            await http.post("/x", {})
        await http.post("/x", {})
    assert ports[0] == ports[1] != ports[2]


async def test_a_stream_without_its_end_is_unreachable_and_one_with_it_is_whole() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b": a comment\n\ndata: 1\n\ndata: " + b"2" * 200_000 + b"\n\n")
        await response.write(b"data: [DONE]\n\n" if request.path == "/whole" else b"")
        return response

    async with answering(answer) as http:
        whole = [len(event) async for event in http.events("/whole", {})]
        assert whole == [1, 200_000]
        with pytest.raises(Unreachable, match="before it was complete"):
            _ = [event async for event in http.events("/cut", {})]


async def test_a_server_that_is_gone_or_silent_is_unreachable() -> None:
    gone = Http("http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9/x does not answer"):
        await gone.get("/x")
    await gone.close()

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async with answering(answer) as silent:
        with pytest.raises(Unreachable, match="TimeoutError"):
            await silent.get("/x", seconds=0.05)


def test_a_models_facts_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    facts = read_model(str(folder))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert facts.prompts.eos == eos_token_ids(model, tokenizer) == {END}
    assert facts.prompts.vocabulary == model.get_input_embeddings().weight.shape[0]
    assert (facts.context_length, facts.dtype, facts.is_tied) == (
        model.config.max_position_embeddings,
        str(model.dtype).removeprefix("torch."),
        True,
    )
    with pytest.raises(ConfigurationError, match="cannot read the configuration"):
        read_model(str(tmp_path / "nothing"))
