"""A server that behaves as vLLM 0.32 was seen to: routes, bodies, refusals, LoRAs, pauses, prefixes that go stale.

Its "model" is a formula of the last token and one number, which weights change, so that any test can say what should
have come. It runs inside a test (`Fake`, `serving`), or as a process of an engine (`fake_python`), where its abilities
follow from the flags and variables that it was started with.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from safetensors.numpy import load_file

VOCABULARY = 263
CONTEXT = 200
HELP = "error: no such argument"


def logprobs_at(token: int, shift: float, temperature: float) -> np.ndarray:
    """What follows a token, for all tokens: log-softmax(logits / temperature)."""
    places = np.arange(VOCABULARY)
    logits = 2 * np.sin((places + 1) * (token + 1) * 0.7) + shift * np.cos(places * 1.3)
    logits = logits / (temperature or 1.0)
    return logits - np.log(np.exp(logits).sum())  # type: ignore[no-any-return]


def answer_logprobs(
    prompt: Sequence[int], answer: Sequence[int], shift: float, temperature: float = 1.0
) -> list[float]:
    """The log-probabilities of an answer."""
    before = [prompt[-1], *answer[:-1]]
    return [float(logprobs_at(last, shift, temperature)[token]) for last, token in zip(before, answer, strict=True)]


def shift_of(folder: Path) -> float:
    """The number that a folder of weights stands for."""
    lora = folder / "adapter_model.safetensors"
    tensors = load_file(lora if lora.is_file() else folder / "model.safetensors")
    return float(sum(tensor.sum() for name, tensor in tensors.items() if "lora_A" not in name))


@dataclass(eq=False)
class Fake:
    """One server."""

    shift: float = 0.0
    version: str = "0.32.0"
    name: str = "base"
    routes_off: set[str] = field(default_factory=set)
    is_raw: bool = False
    has_extension: bool = True
    sees: bool = True
    packs_heads: bool = False
    """Loads whole weights wrongly, as vLLM does on CPU with tied heads."""
    token_seconds: float = 0.0
    fails: int = 0
    """How many requests are answered with status 500."""
    dies_of_a_push: bool = False
    """Its engine is gone at the next one; the server answers on."""
    breaks_after: int | None = None
    """A stream's connection is cut after so many tokens."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    adapters: dict[str, float] = field(default_factory=dict)
    running: int = 0
    ended_early: int = 0
    is_dead: bool = False
    url: str = ""

    def __post_init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._prefixes: dict[tuple[str, tuple[int, ...]], float] = {}
        self._random = np.random.default_rng(0)

    def routes(self) -> list[web.RouteDef]:
        """What it answers to."""
        posts = {
            "/v1/completions": self.complete,
            "/v1/load_lora_adapter": self.load_lora,
            "/v1/unload_lora_adapter": self.unload_lora,
            "/collective_rpc": self.collective_rpc,
            "/pause": self.pause,
            "/resume": self.resume,
            "/reset_prefix_cache": self.reset,
            "/sleep": self.sleep,
            "/wake_up": self.wake,
        }
        gets = {"/health": self.health, "/version": self.tell_version, "/v1/models": self.models}
        self._paths = sorted((posts.keys() | gets.keys()) - self.routes_off)
        made = [web.post(path, do) for path, do in posts.items() if path not in self.routes_off]
        made += [web.get(path, do) for path, do in gets.items()]
        return [*made, web.get("/openapi.json", self.openapi)]

    async def openapi(self, request: web.Request) -> web.Response:
        return web.json_response({"paths": {path: {} for path in self._paths}})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_dead else 200)

    async def tell_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def models(self, request: web.Request) -> web.Response:
        base = {"id": self.name, "parent": None, "max_model_len": CONTEXT}
        loras = [{"id": name, "parent": self.name, "max_model_len": None} for name in self.adapters]
        return web.json_response({"data": [base, *loras]})

    # ---- sampling ----------------------------------------------------------------------------------------------

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if self.fails:
            self.fails -= 1
            return refusal(500, "EngineCore encountered an issue")
        if body["model"] != self.name and body["model"] not in self.adapters:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        several = isinstance(body["prompt"][0], list)
        prompts = body["prompt"] if several else [body["prompt"]]
        self.running += 1
        try:
            await self._open.wait()
            answers = [(one, index) for one in prompts for index in range(body.get("n", 1))]
            steps = [self.sample(prompt, body, index) for prompt, index in answers]
            if body.get("stream"):
                return await self.stream(request, steps, body)
            await asyncio.sleep(self.token_seconds * max(len(one) for one in steps))
            return web.json_response({"choices": [self.choice(i, one, body) for i, one in enumerate(steps)]})
        except asyncio.CancelledError:
            self.ended_early += 1
            raise
        finally:
            self.running -= 1

    def sample(self, prompt: list[int], body: dict[str, Any], index: int) -> list[tuple[int, np.ndarray, str | None]]:
        """The tokens of one choice, what was known at each, and why it ended."""
        name = body["model"]
        shift = self.adapters.get(name, self.shift)
        # A prefix that was computed once is used again, whatever became of the weights.
        shift = self._prefixes.setdefault((name, tuple(prompt)), shift)
        seed = body.get("seed")
        random = self._random if seed is None else np.random.default_rng(seed + index)
        ends = set() if body.get("ignore_eos") else set(body.get("stop_token_ids", ()))
        last, steps = prompt[-1], []
        for place in range(body["max_tokens"]):
            scaled = logprobs_at(last, shift, body["temperature"])
            greedy = body["temperature"] == 0
            last = int(scaled.argmax() if greedy else random.choice(VOCABULARY, p=np.exp(scaled)))
            told = logprobs_at(prompt[-1] if place == 0 else steps[-1][0], shift, 1.0) if self.is_raw else scaled
            reason = "stop" if last in ends else "length" if place == body["max_tokens"] - 1 else None
            steps.append((last, told, reason))
            if reason:
                break
        return steps

    async def stream(self, request: web.Request, choices: list[Any], body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        longest = max(len(steps) for steps in choices)
        for place in range(longest):
            if place == self.breaks_after:
                request.transport.close()  # type: ignore[union-attr]
                return response
            for index, steps in enumerate(choices):
                if place < len(steps):
                    event = {"choices": [self.choice(index, steps[place : place + 1], body)]}
                    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(self.token_seconds)
        await response.write(b"data: [DONE]\n\n")
        return response

    def choice(self, index: int, steps: list[Any], body: dict[str, Any]) -> dict[str, Any]:
        logprobs = {
            "token_logprobs": [None if math.isnan(row[token]) else float(row[token]) for token, row, _ in steps],
            "top_logprobs": [{f"t{token}": float(row[token]), "best": float(row.max())} for token, row, _ in steps],
        }
        token_ids = [token for token, _, _ in steps] if body["return_token_ids"] else None
        return {
            "index": index,
            "text": "not believed",
            "logprobs": logprobs,
            "finish_reason": steps[-1][2],
            "token_ids": token_ids,
        }

    # ---- weights -----------------------------------------------------------------------------------------------

    async def load_lora(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        self.calls.append(f"load {name}")
        if self.dies():
            return refusal(400, "EngineCore encountered an issue")
        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded. Set 'load_inplace' to True.")
        if not (folder / "adapter_config.json").is_file():
            return refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        self.adapters[name] = self.shift + shift_of(folder)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    def dies(self) -> bool:
        """Whether it does so now, of the push that comes."""
        self.is_dead = self.is_dead or self.dies_of_a_push
        self.dies_of_a_push = False
        return self.is_dead

    async def unload_lora(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            return refusal(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text="Success")

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        method, arguments = body["method"], body.get("args", [])
        self.calls.append(method)
        if not self.has_extension or method not in ("leyden_sees", "leyden_load"):
            answer = refusal(500, f"Worker failed with error ''CPUWorker' object has no attribute '{method}''")
        elif method == "leyden_sees":
            answer = web.json_response({"results": [{"sees": self.sees and Path(arguments[0]).is_dir()}]})
        else:
            answer = self.load(Path(arguments[0]))
        if answer.status == 500 and request.transport is not None:
            # An exception that nobody caught: uvicorn then closes the connection, which the answer does not say.
            asyncio.get_running_loop().call_later(0.01, request.transport.close)
        return answer

    def load(self, folder: Path) -> web.Response:
        if self._open.is_set() or self.running:
            self.is_dead = True  # as vLLM dies of it
            return refusal(500, "EngineCore encountered an issue")
        if self.dies():
            return refusal(500, "EngineCore encountered an issue")
        tensors = load_file(folder / "model.safetensors")
        if "model.norm.weight" not in tensors:
            return refusal(500, "Worker failed with error 'the served weights are unchanged: it lacks a tensor'")
        self.shift = shift_of(folder) * (0.5 if self.packs_heads else 1.0)
        return web.json_response({"results": [{"tensors": len(tensors)}]})

    async def pause(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "wait"
        self.calls.append("pause")
        while self.running:
            await asyncio.sleep(0.005)
        self._open.clear()
        return web.json_response({"status": "paused"})

    async def resume(self, request: web.Request) -> web.Response:
        self.calls.append("resume")
        self._open.set()
        return web.json_response({"status": "resumed"})

    async def reset(self, request: web.Request) -> web.Response:
        self.calls.append("reset")
        is_first = self.calls.count("reset") % 2 == 1  # a first try fails, as when blocks are still held
        if not is_first:
            self._prefixes.clear()
        return web.json_response({"success": not is_first})

    async def sleep(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "wait" and request.query["level"] == "1"
        self.calls.append("sleep")
        self._open.clear()
        return web.json_response({"status": "sleeping"})

    async def wake(self, request: web.Request) -> web.Response:
        self.calls.append("wake")
        self._open.set()
        return web.json_response({"status": "awake"})


def refusal(status: int, message: str) -> web.Response:
    """An error in vLLM's form."""
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


@asynccontextmanager
async def serving(*fakes: Fake, ports: Sequence[int] | None = None) -> AsyncIterator[list[str]]:
    """Answer on ports of this machine; gives the addresses."""
    runners = []
    for place, fake in enumerate(fakes):
        app = web.Application()
        app.add_routes(fake.routes())
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0 if ports is None else ports[place]).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
    try:
        yield [fake.url for fake in fakes]
    finally:
        for runner in runners:
            await runner.cleanup()


# ---- as a process ----------------------------------------------------------------------------------------------


def fake_python(folder: Path, *, distribution: str = "vllm", version: str = "0.32.0") -> Path:
    """Make an interpreter of an environment in which vLLM is this file."""
    site = folder / "site"
    (site / f"{distribution.replace('-', '_')}-{version}.dist-info").mkdir(parents=True)
    (site / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    for entry in ("cli/main.py", "openai/api_server.py"):
        module = site / "vllm" / "entrypoints" / entry
        module.parent.mkdir(parents=True)
        module.write_text(f"import runpy\nrunpy.run_path({str(Path(__file__))!r}, run_name='__main__')\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def main(arguments: list[str]) -> None:
    """Serve as the command line says; write down what it was, and start a child as vLLM does."""
    flags = {name: value for name, value in zip(arguments, [*arguments[1:], ""], strict=True) if name[:2] == "--"}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seen = {"arguments": arguments, "environment": dict(os.environ), "pid": os.getpid(), "child": child.pid}
    if "FAKE_NOTES" in os.environ:
        with Path(os.environ["FAKE_NOTES"]).open("a") as notes:
            notes.write(json.dumps(seen) + "\n")
    if "FAKE_DIES" in os.environ:
        print(HELP, flush=True)
        raise SystemExit(3)
    off = set()
    if "--enable-lora" not in flags or os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "1":
        off |= {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
        off |= {"/collective_rpc", "/pause", "/resume", "/reset_prefix_cache", "/sleep", "/wake_up"}
    module = flags.get("--worker-extension-cls", "none").partition(".")[0] + ".py"
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    asyncio.run(serve(flags, off, any((Path(path) / module).is_file() for path in paths)))


async def serve(flags: dict[str, str], off: set[str], has_extension: bool) -> None:
    """Serve until killed."""
    fake = Fake(
        name=flags["--served-model-name"],
        routes_off=off,
        is_raw=flags.get("--logprobs-mode") != "processed_logprobs",
        has_extension=has_extension,
        token_seconds=float(os.environ.get("FAKE_TOKEN_SECONDS", "0")),
    )
    async with serving(fake, ports=[int(flags["--port"])]):
        await asyncio.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
