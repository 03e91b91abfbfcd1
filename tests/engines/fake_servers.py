"""Servers that speak as vLLM, SGLang and llama.cpp do, over a tiny model: what is asked is kept, what is said is true.

SGLang's follows its sources (`managers/tokenizer_manager.py`, `layers/sampler.py`), llama.cpp's too
(`tools/server/server-context.cpp`) and a real one that was run, vLLM's what version 0.32 answered.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from transformers import AutoTokenizer

from tests.engines.asking import reference
from tests.tiny import END


@functools.cache
def model_of(folder: Path) -> torch.nn.Module:
    """The model, loaded once for all tests."""
    return reference(folder)


class FakeServer:
    """One tiny model behind HTTP. Subclasses give it a protocol."""

    def __init__(self, folder: Path, *, is_raw: bool = False) -> None:
        self.model = model_of(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.is_raw = is_raw
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.sampled: list[list[int]] = []
        self.refuses: tuple[int, str] | None = None
        self.breaks_after: int | None = None
        """A stream's connection is cut after so many tokens."""
        self.token_seconds = 0.0
        self.ended_early = 0
        self.url = ""
        self._random = torch.Generator().manual_seed(0)

    def routes(self) -> list[web.RouteDef]:
        """What it answers to."""
        raise NotImplementedError

    async def asked_for(self, request: web.Request) -> dict[str, Any]:
        """Read and keep a body."""
        body: dict[str, Any] = await request.json()
        self.asked.append(body)
        self.headers.append(request.headers.get("Authorization"))
        return body

    def distribution(self, token_ids: list[int]) -> torch.Tensor:
        """The logits of the next token."""
        with torch.no_grad():
            return self.model(torch.tensor([token_ids])).logits[0, -1].float()  # type: ignore[no-any-return]

    def sample(
        self, prompt: list[int], limit: int, temperature: float, seed: int | None, ends: set[int]
    ) -> Iterator[tuple[int, torch.Tensor, str | None]]:
        """Each token, all log-probabilities at its place, and the reason if it is the last."""
        generator = self._random if seed is None else torch.Generator().manual_seed(seed)
        answer: list[int] = []
        self.sampled.append(answer)
        for place in range(limit):
            logits = self.distribution(prompt + answer)
            scaled = torch.log_softmax(logits / (temperature or 1e-6), -1)
            token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
            answer.append(token)
            reason = "stop" if token in ends else "length" if place == limit - 1 else None
            yield token, torch.log_softmax(logits, -1) if self.is_raw else scaled, reason
            if reason:
                return

    async def stream(self, request: web.Request, events: Iterator[Any]) -> web.StreamResponse:
        """Send events as they are made."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for place, event in enumerate(events):
                if place == self.breaks_after:
                    request.transport.close()  # type: ignore[union-attr]
                    return response
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                await asyncio.sleep(self.token_seconds)
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.ended_early += 1
            raise
        return response

    async def tokenize(self, request: web.Request) -> web.Response:
        """The form that vLLM and SGLang share."""
        body = await request.json()
        ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return web.json_response({"tokens": ids, "count": len(ids)})


class FakeVLLM(FakeServer):
    """`/v1/completions`."""

    gives_token_ids = True

    def routes(self) -> list[web.RouteDef]:
        async def version(request: web.Request) -> web.Response:
            return web.json_response({"version": "0.32.0"})

        async def models(request: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": name, "max_model_len": 200} for name in ("tiny", "adapter")]})

        return [
            web.get("/version", version),
            web.get("/v1/models", models),
            web.post("/tokenize", self.tokenize),
            web.post("/v1/completions", self.complete),
        ]

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await self.asked_for(request)
        if self.refuses is not None:
            status, message = self.refuses
            return web.json_response({"error": {"message": message}}, status=status)
        steps = self.sample(
            body["prompt"], body["max_tokens"], body["temperature"], body["seed"], set(body["stop_token_ids"])
        )
        if body["stream"]:
            return await self.stream(request, ({"choices": [self.choice([step], body)]} for step in steps))
        return web.json_response({"choices": [self.choice(list(steps), body)]})

    def choice(self, steps: list[tuple[int, torch.Tensor, str | None]], body: dict[str, Any]) -> dict[str, Any]:
        top = [row.topk(max(body["logprobs"], 1)) for _, row, _ in steps]
        logprobs = {
            "token_logprobs": [float(row[token]) for token, row, _ in steps],
            "top_logprobs": [{str(i): float(v) for v, i in zip(t.values, t.indices, strict=True)} for t in top],
        }
        choice = {"index": 0, "text": "not believed", "logprobs": logprobs, "finish_reason": steps[-1][2]}
        return choice | ({"token_ids": [token for token, _, _ in steps]} if self.gives_token_ids else {})


class FakeSGLang(FakeServer):
    """`/generate`. A stream that repeats shows lists that grew since: they are passed by reference."""

    is_incremental = False
    loses: int | None = None
    """Place of an event that never arrives."""
    info_path = "/server_info"

    def routes(self) -> list[web.RouteDef]:
        async def model_info(request: web.Request) -> web.Response:
            return web.json_response({"model_path": "/models/tiny", "is_generation": True})

        async def server_info(request: web.Request) -> web.Response:
            found = {
                "version": "0.5.9",
                "context_length": None,
                "max_total_num_tokens": 150,
                "model_path": "/models/tiny",
            }
            return web.json_response(found)

        return [
            web.get("/get_model_info", model_info),
            web.get(self.info_path, server_info),
            web.post("/tokenize", self.tokenize),
            web.post("/generate", self.generate),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await self.asked_for(request)
        asked = body["sampling_params"]
        steps = list(
            self.sample(
                body["input_ids"],
                asked["max_new_tokens"],
                asked["temperature"],
                asked.get("sampling_seed"),
                {*asked["stop_token_ids"], END},
            )
        )
        if body["stream"]:
            places = [place for place in range(len(steps)) if place != self.loses]
            return await self.stream(request, (self.answer(steps, place) for place in places))
        return web.json_response(self.answer(steps, len(steps) - 1) | {"top": body["top_logprobs_num"]})

    def answer(self, steps: list[tuple[int, torch.Tensor, str | None]], place: int) -> dict[str, Any]:
        listed = [[float(row[token]), token, None] for token, row, _ in steps]
        reason = steps[place][2]
        shown = listed[place : place + 1] if self.is_incremental else listed[: place + 2]
        top = [[[float(v), int(i), None] for v, i in zip(*row.topk(2), strict=True)] for _, row, _ in steps]
        return {
            "text": "not believed",
            "output_ids": [item[1] for item in shown],
            "meta_info": {
                "finish_reason": {"type": reason} if reason else None,
                "completion_tokens": place + 1,
                "output_token_logprobs": shown,
                "output_top_logprobs": top,
            },
        }


class FakeLlamaCpp(FakeServer):
    """`/completion`: its tokens whole, its log-probabilities without those that end inside a character."""

    most_listed = 2**20

    def routes(self) -> list[web.RouteDef]:
        async def props(request: web.Request) -> web.Response:
            settings = {"n_ctx": 180, "params": {"temperature": 0.8}}
            return web.json_response(
                {"default_generation_settings": settings, "build_info": "b9999-fake", "model_alias": "t"}
            )

        return [web.get("/props", props), web.post("/tokenize", self.tokens), web.post("/completion", self.complete)]

    async def tokens(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": self.tokenizer.encode(body["content"], add_special_tokens=False)})

    async def complete(self, request: web.Request) -> web.Response:
        body = await self.asked_for(request)
        for token, bias in body.get("logit_bias", []):
            assert bias > 1000
            raw = torch.log_softmax(self.distribution(body["prompt"]), -1)
            best = raw.topk(min(body["n_probs"], self.most_listed, len(raw)))
            top = [{"id": int(i), "logprob": float(v)} for v, i in zip(best.values, best.indices, strict=True)]
            listed = [{"id": token, "logprob": float(raw[token]), "top_logprobs": top}]
            answer = {"tokens": [], "completion_probabilities": listed, "tokens_predicted": 1, "stop_type": "limit"}
            return web.json_response(answer)
        assert not body["stream"], "a stream would lose tokens"
        scales = body["post_sampling_probs"]
        answer_ids, listed, text = [], [], b""
        for token, scaled, _ in self.sample(
            body["prompt"], body["n_predict"], body["temperature"], None if body["seed"] < 0 else body["seed"], {END}
        ):
            before = body["prompt"] + answer_ids
            answer_ids.append(token)
            text += self.piece(token)
            if not ends_inside_a_character(text):
                row = scaled if scales else torch.log_softmax(self.distribution(before), -1)
                best = int(row.argmax())
                items = [
                    {"id": one, "prob": math.exp(row[one])} if scales else {"id": one, "logprob": float(row[one])}
                    for one in (token, best)
                ]
                listed.append(items[0] | {"top_probs" if scales else "top_logprobs": items[1:]})
        return web.json_response(
            {
                "content": "not believed",
                "tokens": answer_ids,
                "tokens_predicted": len(answer_ids),
                "stop_type": "eos" if answer_ids[-1] == END else "limit",
            }
            | ({"completion_probabilities": listed} if listed else {})
        )

    def piece(self, token: int) -> bytes:
        """The bytes of a token; a special one has none."""
        if token in self.tokenizer.all_special_ids:
            return b""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        back = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(back[character] for character in self.tokenizer.convert_ids_to_tokens(token))


def ends_inside_a_character(text: bytes) -> bool:
    """As llama.cpp's `validate_utf8`: looks for a beginning of several bytes among the last four that is not full."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 == 0xC0:
            wanted = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 0
            return wanted > back
    return False


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    """Answer on a free port of this machine."""
    app = web.Application()
    app.add_routes(server.routes())
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
