"""A request as vLLM's `/v1/completions` takes it, and what comes back as pieces.

One idea: every parameter is said. What is left out, a server would take from defaults that are not ours.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from random import Random
from typing import Any

import msgspec

from leyden.errors import ConfigurationError, EngineError
from leyden.extras import extra
from leyden.interfaces import GenerationRequest
from leyden_plugins.chat.grammars import constrained_field, grammar_of, schema_of
from leyden_plugins.chat.prompts import Prompts, check_sampling, room_for
from leyden_plugins.engines.servers.answers import Piece, Reason
from leyden_plugins.engines.servers.http import Http, Unreachable, message_of

with extra("train"):
    import llguidance

LEAST_TEMPERATURE = 0.01
COMPLETIONS = "/v1/completions"
REASONS: Mapping[str, Reason] = {"stop": "stop", "length": "length"}


class Logprobs(msgspec.Struct):
    """Log-probabilities of the tokens of a piece; `None` is what JSON has for NaN."""

    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float | None] | None] | None = None


class Choice(msgspec.Struct):
    """A choice, or a part of one."""

    index: int = 0
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Answer(msgspec.Struct):
    """An answer, one event of a stream, or an error that came too late to be a status."""

    choices: list[Choice] = []
    error: msgspec.Raw = msgspec.Raw()


EVENTS = msgspec.json.Decoder(Answer)


def body_of(request: GenerationRequest, prompt: tuple[int, ...], prompts: Prompts, limit: int) -> dict[str, Any]:
    """Return the request, but for the name that the model has on the server.

    Raises:
        ContextLengthError: the prompt leaves no room for an answer.
        ConfigurationError: a value that no distribution has, or a format that no grammar can be made of.
    """
    sampling = request.sampling
    check_sampling(sampling)
    if request.forced_token_ids is not None:
        raise ConfigurationError("vLLM cannot be given an answer to score (forced_token_ids); use TransformersEngine")
    if 0 < sampling.temperature < LEAST_TEMPERATURE:
        raise ConfigurationError(
            f"temperature {sampling.temperature!r} is below {LEAST_TEMPERATURE}, to which vLLM raises it without a "
            "word; use 0, which is greedy"
        )
    room = room_for(prompt, limit)
    body: dict[str, Any] = {
        "prompt": prompt,
        "n": sampling.n,
        "max_tokens": room if sampling.max_tokens is None else min(room, sampling.max_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": 1.0,
        "stop": sampling.stop,
        "stop_token_ids": sorted(prompts.eos),
        "logprobs": 0,
        "return_token_ids": True,
        "stream": request.stream,
    }
    if sampling.seed is not None:
        # Hashed, because choice i of a server is sampled with seed + i: neighbouring seeds would share answers.
        # Requests without one get none: rows with generators of their own are sampled one by one.
        body["seed"] = Random(f"{sampling.seed}").getrandbits(62)
    if request.forces_tool or request.response_format is not None:
        body["structured_outputs"] = form_of(request, prompts)
    return body


def form_of(request: GenerationRequest, prompts: Prompts) -> dict[str, Any]:
    """Return what keeps an answer to its form: the grammar of a call, or the schema of JSON.

    Raises:
        ConfigurationError: no grammar can be made of it.
    """
    grammar = grammar_of(request, prompts.chat.forms[0], prompts.chat.codec)
    wrong = "" if grammar is None else llguidance.LLMatcher.validate_grammar(grammar)
    if wrong:
        raise ConfigurationError(f"{constrained_field(request)} cannot be followed: {wrong}; simplify its JSON schema")
    # The server reads grammars in one language only, and that of a JSON schema is in another.
    return {"grammar": grammar} if request.forces_tool else {"json": schema_of(request)}


async def pieces_of(http: Http, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
    """Send a request; yield what was sampled.

    Raises:
        Unreachable: the server is gone, or gave up on the request.
        Refused: it said no.
    """
    if not body["stream"]:
        answer = msgspec.convert(await http.post(COMPLETIONS, body), Answer)
        # All of it is read before anything is given out, so that an aborted one can be asked again.
        for piece in [piece_of(choice) for choice in answer.choices]:
            yield piece
        return
    async for event in http.events(COMPLETIONS, body):
        answer = EVENTS.decode(event)
        if bytes(answer.error):
            raise Unreachable(f"{http.url} broke off: {message_of(bytes(answer.error))}")
        for choice in answer.choices:
            yield piece_of(choice)


def piece_of(choice: Choice) -> Piece:
    """Read one choice.

    Raises:
        Unreachable: the server aborted it, which it does when it ends.
        EngineError: the tokens are missing, or it ended in an unknown way.
    """
    reason = choice.finish_reason
    if reason == "abort":
        raise Unreachable("the server aborted this answer")
    if reason is not None and reason not in REASONS:
        raise EngineError(f"the server ended an answer with {reason!r}")
    if choice.token_ids is None or choice.logprobs is None:
        raise EngineError("the server gave no token ids or no log-probabilities; is it vLLM?")
    return Piece(
        index=choice.index,
        token_ids=tuple(choice.token_ids),
        logprobs=tuple(math.nan if one is None else one for one in choice.logprobs.token_logprobs),
        finish_reason=None if reason is None else REASONS[reason],
    )
