"""Serve a framework's script from the base environment: the real gateway and engine, and the user's own endpoint.

    python -m integration_tests.frameworks.server       # prints where to control it; ends when its input closes

One idea: both endpoints answer with the same scripts, and what arrives at either is logged below everything that is
tested. Who really speaks is read from the tags in the prompts.
One trap: what the engine made is logged around the engine itself, so that the gateway's records can be wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from integration_tests.frameworks.contract_model import contract_model
from integration_tests.frameworks.mutations import apply
from integration_tests.frameworks.story import INSTRUCTIONS, ROLE_TAG, ROLLOUT_TAG, Script, ask_of, script_of
from leyden.interfaces import Access, GenerationRequest
from leyden.roles import AGENTS_OWN, Policy, Sampling
from leyden.spans import Completion, Record
from leyden.testing.fakes import Answer, FakeEngine
from leyden.testing.forced_decoding import ForcedEngine, Made
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway import HttpGateway
from leyden_plugins.gateway.access import Admission
from leyden_plugins.gateway.server import BackgroundServer

POLICY = "contract"
USER_MODEL = "user-model"
USER_KEY = "user-key"
PREFIX_CACHE_TOKENS = 262_144


@dataclass(frozen=True)
class Arrived:
    """One request as it came off the socket."""

    path: str
    key: str
    """Whatever stands in place of a key."""
    role: str
    """By the tag in its instructions; empty without one."""
    rollout: str
    headers: dict[str, str]
    """Leyden's own."""


@dataclass
class Log:
    """What happened since the last `begin`."""

    gateway: list[Arrived] = field(default_factory=list)
    user: list[Arrived] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    """Rollout -> the key it was given."""
    said: list[dict[str, str]] = field(default_factory=list)
    """Role, rollout and text of each scripted answer, at either endpoint."""
    failures: list[str] = field(default_factory=list)
    """What the script could not answer."""


class Desk:
    """Both endpoints and what they log."""

    def __init__(self) -> None:
        self.log = Log()
        self.script: Script | None = None
        self.width = 0
        """Shorter texts are filled up with spaces to so many characters, which even JSON does not mind."""
        self.user_engine = FakeEngine(self.answer, context_length=2**22)
        self.engine = ForcedEngine(
            TransformersEngine(contract_model(), prefix_cache_tokens=PREFIX_CACHE_TOKENS), self.answer
        )
        self.gateway = LoggedGateway(lambda: self.log.gateway)
        self.user = LoggedGateway(lambda: self.log.user)

    def answer(self, request: GenerationRequest) -> Answer:
        """Say what the framework's script says."""
        assert self.script is not None
        try:
            ask = ask_of(request.messages, request.tools, request.response_format)
            say = self.script(ask)
        except Exception as error:
            self.log.failures.append(f"{type(error).__name__}: {error}")
            raise
        text = say.text.ljust(self.width) if say.text else ""
        self.log.said.append({"role": ask.role, "rollout": ask.rollout, "text": text})
        calls = [
            {
                "id": f"call_{os.urandom(8).hex()}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for name, arguments in say.tool_calls
        ]
        return Answer(text=text, tool_calls=calls)

    async def keep(self, records: Sequence[Record]) -> None:
        """Take the gateway's records."""
        self.log.completions += [record for record in records if isinstance(record, Completion)]

    async def forget(self, records: Sequence[Record]) -> None:
        """Let the records of the user's endpoint go: it stands for somebody else's server."""

    def begin(self, framework: str, width: int) -> dict[str, object]:
        """Forget what was logged and answer for `framework` from now on; say where."""
        self.log, self.script, self.width = Log(), script_of(framework), width
        self.engine.log.clear()
        return {"gateway": self.gateway.base_url, "user": self.user.base_url}

    def admit(self, rollouts: Sequence[str]) -> dict[str, str]:
        """Let rollouts in; return the key of each."""
        for rollout_id in rollouts:
            access = Access(rollout_id=rollout_id, attempt=1, models={POLICY: Sampling()}, timeout_seconds=300.0)
            self.log.tokens[rollout_id] = self.gateway.admit(access)
        return self.log.tokens

    async def end(self) -> dict[str, object]:
        """Turn every rollout out; return the log."""
        for rollout_id in self.log.tokens:
            await self.gateway.revoke(rollout_id)
        return {
            **asdict(self.log),
            "completions": self.log.completions,
            "made": [told(made) for made in self.engine.log],
        }

    async def start(self) -> None:
        """Start both."""
        await self.engine.start([Policy(POLICY)])
        await self.user_engine.start([Policy(USER_MODEL)])
        await self.gateway.start(self.engine, self.keep)
        await self.user.start(self.user_engine, self.forget)
        self.user.let_in(Access(rollout_id="", attempt=0, models={USER_MODEL: AGENTS_OWN}), USER_KEY)

    async def stop(self) -> None:
        """Stop both."""
        await self.gateway.stop()
        await self.user.stop()
        await self.engine.stop()


def told(made: Made) -> dict[str, object]:
    """Return what the engine made, and for whom by the prompt."""
    ask = ask_of(made.request.messages)
    return {
        "role": ask.role,
        "rollout": ask.rollout,
        "text": made.text,
        "prompt_token_ids": made.prompt_token_ids,
        "token_ids": made.token_ids,
        "logprobs": made.logprobs,
        "aborted": made.aborted,
    }


# ---- below the gateway -----------------------------------------------------------------------------------------

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class LoggedGateway(HttpGateway):
    """A gateway whose socket is watched."""

    def __init__(self, log: Callable[[], list[Arrived]]) -> None:
        super().__init__()
        self._server = LoggedServer(log)

    def let_in(self, access: Access, key: str) -> None:
        """Accept `key` from anybody, as a model server does."""
        self._access.admit(Admission(access, is_open=True), key)


class LoggedServer(BackgroundServer):
    """Logs each request before the app sees it."""

    def __init__(self, log: Callable[[], list[Arrived]]) -> None:
        super().__init__()
        self.log = log

    async def start(self, app: Any, port: int = 0) -> None:
        async def logged(scope: Message, receive: Receive, send: Send) -> None:
            parts: list[Message] = []
            while not parts or parts[-1].get("more_body"):
                parts.append(await receive())
            body = b"".join(part.get("body", b"") for part in parts)
            self.log().append(arrived(scope, body))
            left = iter(parts)

            async def replay() -> Message:
                return next(left, None) or await receive()

            await app(scope, replay, send)

        await super().start(logged, port)


def arrived(scope: Mapping[str, Any], raw: bytes) -> Arrived:
    """Read who asks from the tags in a request of any dialect."""
    headers = {key.decode().lower(): value.decode() for key, value in scope["headers"]}
    roles = ROLE_TAG.findall(json.dumps(instructions(json.loads(raw or b"{}"))))
    rollouts = ROLLOUT_TAG.findall(raw.decode())
    return Arrived(
        path=scope["path"],
        key=headers.get("authorization", headers.get("x-api-key", "")).removeprefix("Bearer "),
        role=roles[-1] if roles else "",
        rollout=rollouts[-1] if rollouts else "",
        headers={key: value for key, value in headers.items() if key.startswith("x-leyden")},
    )


def instructions(body: Mapping[str, Any]) -> list[object]:
    """Return what a request's own system prompt may be: chat and responses messages, `instructions`, `system`."""
    items = body.get("messages") or body.get("input") or []
    own = [item for item in items if isinstance(item, dict) and item.get("role") in INSTRUCTIONS]
    return [own, body.get("instructions"), body.get("system")]


# ---- the process -----------------------------------------------------------------------------------------------


def control_of(desk: Desk) -> Starlette:
    """Return the app by which `drive` tells what runs."""

    async def begin(request: Request) -> Response:
        asked = await request.json()
        return JSONResponse(desk.begin(asked["framework"], asked.get("width", 0)))

    async def admit(request: Request) -> Response:
        return JSONResponse(desk.admit(await request.json()))

    async def end(request: Request) -> Response:
        await request.body()
        return Response(msgspec.json.encode(await desk.end()), media_type="application/json")

    routes = [Route(f"/{each.__name__}", each, methods=["POST"]) for each in (begin, admit, end)]
    return Starlette(routes=routes)


async def serve() -> None:
    """Serve until the standard input closes, as it does when whoever started this is gone."""
    desk, control = Desk(), BackgroundServer()
    await desk.start()
    await control.start(control_of(desk))
    print(json.dumps({"control": f"http://127.0.0.1:{control.port}"}), flush=True)
    try:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    finally:
        await control.stop()
        await desk.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the contract suite's scripts.")
    parser.add_argument("--mutation", help="break the server's side of the path in a known way")
    options = parser.parse_args()
    if options.mutation:
        apply(options.mutation)
    asyncio.run(serve())
