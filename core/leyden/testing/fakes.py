"""Stand in for an engine: scripted answers, exact token ids, and a log that is the truth for tests.

One idea: a token is one byte of UTF-8, so every text has exactly one spelling and a test can work out the ids
on its own. `FakeEngine.log` keeps what was sampled, whatever the gateway or the store make of it.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from leyden.errors import ConfigurationError, ContextLengthError, EngineError
from leyden.interfaces import Delta, Generation, GenerationRequest, Weights
from leyden.roles import RESERVED_MODEL, Policy

END_TOKEN = 256
"""Sampled where an answer ends by itself; tokens below it are bytes."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One scripted choice."""

    text: str = ""
    tool_calls: Sequence[Mapping[str, object]] = ()
    """Complete OpenAI tool calls; sampled as their JSON after `text`, and not part of it."""
    error: Exception | None = None
    """Raised when the text has been given out, in place of an end."""


Script = Callable[[GenerationRequest], str | Answer]
"""Says what is answered; called once a choice."""


@dataclass(kw_only=True)
class Sampled:
    """What the fake has really produced for one request."""

    request: GenerationRequest
    version: int
    prompt_token_ids: Sequence[int]
    token_ids: list[list[int]] = field(default_factory=list)
    """By choice; grows while the generation runs."""
    aborted: bool = False


class FakeEngine:
    """An `Engine` without a model. Answers come from a script, one byte a token."""

    keeps_versions = True

    def __init__(
        self,
        script: Script | Sequence[str | Answer] | str = "ok",
        *,
        context_length: int = 65_536,
        tokens_per_delta: int = 4,
        delta_seconds: float = 0.0,
    ) -> None:
        """A sequence is answered in order and then from its start again."""
        self.context_length = context_length
        self.log: list[Sampled] = []
        self.running = 0
        """Generations that hold a place now."""
        self.failure: Exception | None = None
        """Raised by `generate` while it is set."""
        self.published: list[tuple[str, int, Weights]] = []
        self.started = False
        self._script = script
        self._calls = 0
        self._tokens_per_delta = tokens_per_delta
        self._delta_seconds = delta_seconds
        self._versions: dict[str, int] = {}

    @property
    def model(self) -> str:
        return "fake"

    def sha256(self, model: str) -> str:
        """Return a digest that changes with every version."""
        return hashlib.sha256(f"{model} {self._versions[model]}".encode()).hexdigest()

    def models(self) -> Sequence[str]:
        return tuple(self._versions)

    async def start(self, policies: Sequence[Policy]) -> None:
        self.started = True
        for name in (RESERVED_MODEL, *(policy.name for policy in policies)):
            self._versions.setdefault(name, 0)

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        if version <= self._versions.get(policy, 0):
            raise EngineError(f"version {version!r} of {policy!r} was used before; versions only grow")
        self._versions[policy] = version
        self.published.append((policy, version, weights))

    async def stop(self) -> None:
        self.started = False

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text` as tokens."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; the end token has none."""
        return bytes(token for token in token_ids if token < END_TOKEN).decode(errors="replace")

    def prompt(self, request: GenerationRequest) -> list[int]:
        """Return the prompt's tokens: what is given exactly, else tools and `role: content` lines."""
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.prompt_text is not None:
            return self.encode(request.prompt_text)
        lines = [json.dumps(tool, sort_keys=True) for tool in request.tools]
        lines += [f"{message['role']}: {message.get('content') or ''}" for message in request.messages]
        return self.encode("\n".join([*lines, "assistant: "]))

    def tokenised(
        self, request: GenerationRequest, answer: Mapping[str, object]
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        """Return the tokens of a prompt and of an answer that somebody gave, as if it had been scripted."""
        calls = answer.get("tool_calls")
        written = "".join(json.dumps(call) for call in calls) if isinstance(calls, list | tuple) else ""
        return self.prompt(request), [*self.encode(f"{answer.get('content') or ''}{written}"), END_TOKEN]

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin an answer.

        Raises:
            ContextLengthError: the prompt leaves no room.
            ConfigurationError: an unknown model.
            EngineError: `start` was not called, or `failure` says so.
        """
        if self.failure is not None:
            raise self.failure
        if not self.started:
            raise EngineError("the engine has not been started")
        if request.model not in self._versions:
            raise ConfigurationError(f"model {request.model!r} is not served; served are {self.models()!r}")
        prompt = self.prompt(request)
        if len(prompt) >= self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, and the context length is {self.context_length}"
            )
        sampled = Sampled(request=request, version=self._versions[request.model], prompt_token_ids=prompt)
        self.log.append(sampled)
        return Generation(prompt_token_ids=prompt, version=sampled.version, deltas=self._deltas(request, sampled))

    async def _deltas(self, request: GenerationRequest, sampled: Sampled) -> AsyncIterator[Delta]:
        self.running += 1
        answers = [self._next_answer(request) for _ in range(request.sampling.n)]
        sampled.token_ids.extend([] for _ in answers)
        try:
            for index, answer in enumerate(answers):
                for delta in self._pieces(request, index, answer):
                    # A real engine answers between two turns of the loop, never within one.
                    await asyncio.sleep(self._delta_seconds)
                    sampled.token_ids[index].extend(delta.token_ids)
                    yield delta
                if answer.error is not None:
                    raise answer.error
        except (GeneratorExit, asyncio.CancelledError):
            sampled.aborted = True
            raise
        finally:
            self.running -= 1

    def _next_answer(self, request: GenerationRequest) -> Answer:
        script = self._script
        if isinstance(script, str):
            answer: str | Answer = script
        elif callable(script):
            answer = script(request)
        else:
            answer = script[self._calls % len(script)]
        self._calls += 1
        return Answer(text=answer) if isinstance(answer, str) else answer

    def _pieces(self, request: GenerationRequest, index: int, answer: Answer) -> list[Delta]:
        """Cut one answer into deltas; text appears when its last byte has."""
        text, spoken = answer.text, answer.text
        for stop in request.sampling.stop:
            if stop in spoken:
                text = spoken[: spoken.index(stop)]
                spoken = text + stop
        calls = "".join(json.dumps(call) for call in answer.tool_calls)
        ids = self.encode(spoken + calls) + ([] if answer.error else [END_TOKEN])
        limit = request.sampling.max_tokens
        room = self.context_length - len(self.prompt(request))
        ids, overlong = ids[: min(room, limit or room)], len(ids) > min(room, limit or room)
        reason = "length" if overlong else "tool_calls" if answer.tool_calls else "stop"
        visible = len(text.encode())
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        deltas: list[Delta] = []
        for start in range(0, len(ids), self._tokens_per_delta):
            piece = ids[start : start + self._tokens_per_delta]
            last = start + self._tokens_per_delta >= len(ids) and answer.error is None
            shown = bytes(piece[: max(0, visible - start)]) if start < visible else b""
            deltas.append(
                Delta(
                    index=index,
                    text=decoder.decode(shown, final=last),
                    token_ids=piece,
                    logprobs=[self.logprob(token) for token in piece],
                    tool_calls=answer.tool_calls if last and not overlong else (),
                    finish_reason=reason if last else None,  # type: ignore[arg-type]
                )
            )
        return deltas

    @staticmethod
    def logprob(token: int) -> float:
        """Return the log-probability this fake gives a token: made up, and different for different tokens."""
        return -(1 + token) / 128
