"""OpenAI Responses: items in and out, typed events, and conversations that the server remembers.

One idea: a conversation is a chain of remembered answers; each request adds its own messages to the end of one.
The trap: `instructions` are not part of the chain. They stand first in every request that has them, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from leyden.interfaces import GenerationRequest, SamplingParameters
from leyden_plugins.gateway.dialects import Decode, Question
from leyden_plugins.gateway.dialects.chat_fields import tool_list
from leyden_plugins.gateway.dialects.fields import check_names, flag, mapping, string, unsupported, whole, wrong
from leyden_plugins.gateway.dialects.formats import read_format
from leyden_plugins.gateway.dialects.responses_answer import ResponsesQuestion
from leyden_plugins.gateway.dialects.responses_items import (
    Reader,
    Remembered,
    read_flat_choice,
    read_flat_tools,
    recalled,
)
from leyden_plugins.gateway.dialects.sampling import MOST_TOKENS, read_temperature, read_top_p
from leyden_plugins.gateway.dialects.spelling import error_body, speller
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

READ = frozenset(
    {
        "model",
        "input",
        "instructions",
        "previous_response_id",
        "tools",
        "tool_choice",
        "text",
        "temperature",
        "top_p",
        "max_output_tokens",
        "parallel_tool_calls",
        "include",
        "top_logprobs",
        "store",
        "stream",
        "return_token_ids",
    }
)

IGNORED = frozenset(
    {
        "access_programs",
        "client_metadata",
        "max_tool_calls",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "user",
    }
)
"""They say nothing about which tokens are sampled here, or are hints for which this engine has no setting."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "truncation": ("disabled",),
    "background": (False,),
    "context_management": ([],),
}
"""Fields that are not supported, with the values that mean nothing."""

LOGPROBS = "message.output_text.logprobs"
"""The one thing that can be included here."""

ECHOED = ("metadata", "reasoning", "safety_identifier", "service_tier", "prompt_cache_key", "user")
"""Ignored fields that an answer repeats."""


class ResponsesDialect:
    """Speaks `POST /v1/responses`, and `GET` for an answer by its id."""

    path = "responses"
    prompt_field = "input"
    format_field = "text.format"
    count_path = "input_tokens"

    def read(self, body: Mapping[str, object], *, decode: Decode | None, memory: Memory) -> Question:
        """Check a request; `memory` knows the answers that it may refer to.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        check_names(body, READ | IGNORED, NEUTRAL)
        stream = flag(body, "stream")
        previous_id = body.get("previous_response_id")
        previous = None if previous_id is None else recalled(previous_id, "previous_response_id", memory)
        added = Reader(memory).read([] if previous and body.get("input") is None else body.get("input"))
        request = self.request(body, previous, added, string(body, "model"), stream=stream)
        if body.get("top_logprobs"):
            raise wrong("top_logprobs", body["top_logprobs"], "0: only sampled tokens have log-probabilities here")
        return ResponsesQuestion(
            request=request,
            stream=stream,
            settings=settings(body, request, memory),
            added=added,
            previous=previous,
            memory=memory if flag(body, "store", True) else None,
            wants_token_ids=flag(body, "return_token_ids"),
            decode=speller(decode, "include") if LOGPROBS in read_include(body.get("include")) else None,
        )

    def request(
        self,
        body: Mapping[str, object],
        previous: Remembered | None,
        added: list[Mapping[str, object]],
        model: str,
        *,
        stream: bool,
    ) -> GenerationRequest:
        """Return what to generate."""
        instructions = body.get("instructions")
        if not isinstance(instructions, str | None):
            raise wrong("instructions", instructions, "a string")
        messages = [*(previous.history() if previous else ()), *added]
        if not messages:
            raise wrong("input", body.get("input"), "a string or a non-empty list of items")
        if instructions:
            messages.insert(0, {"role": "system", "content": instructions})
        tools = read_flat_tools(body.get("tools"))
        text = mapping(body, "text")
        check_names({f"text.{key}": value for key, value in text.items()}, ("text.format", "text.verbosity"))
        return GenerationRequest(
            model=model,
            messages=messages,
            tools=tools,
            tool_choice=read_flat_choice(body.get("tool_choice"), tools),
            response_format=read_format(text.get("format"), "text.format"),
            sampling=SamplingParameters(
                temperature=read_temperature(body),
                top_p=read_top_p(body),
                max_tokens=whole(body, "max_output_tokens", 1, MOST_TOKENS),
            ),
            stream=stream,
        )

    def read_prompt(self, body: Mapping[str, object], *, memory: Memory) -> GenerationRequest:
        """Check a request for a count.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        question = self.read({"model": "", **body}, decode=None, memory=memory)
        return question.request

    def count(self, tokens: int) -> bytes:
        """Spell a prompt's length."""
        return msgspec.json.encode({"object": "response.input_tokens", "input_tokens": tokens})

    def recall(self, answer_id: str, *, memory: Memory) -> bytes:
        """Spell an earlier answer.

        Raises:
            Refusal: it was not given to this caller, or not stored.
        """
        found = memory.get(answer_id)
        if not isinstance(found, Remembered):
            raise Refusal(404, f"response {answer_id!r:.100} was not found", code="not_found")
        return msgspec.json.encode(found.body)

    def error(self, refusal: Refusal) -> bytes:
        """Spell a refusal as OpenAI does."""
        return msgspec.json.encode(error_body(refusal))


def read_include(value: object) -> list[str]:
    """Return what the client wants beside the text; what only hosted tools or hidden reasoning have is never there."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise wrong("include", value, "a list of strings")
    if any(one.startswith("message.input_image") for one in value):
        raise unsupported("include", "asks for images, which this model does not read; remove it")
    return value


def settings(body: Mapping[str, object], request: GenerationRequest, memory: Memory) -> dict[str, object]:
    """Return what an answer repeats of its request."""
    text = mapping(body, "text")
    return {name: body[name] for name in ECHOED if body.get(name) is not None} | {
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": request.sampling.max_tokens,
        "metadata": body.get("metadata") or {},
        "model": request.model,
        "parallel_tool_calls": flag(body, "parallel_tool_calls", True),
        "previous_response_id": body.get("previous_response_id"),
        "store": flag(body, "store", True),
        "temperature": request.sampling.temperature,
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [memory.shared(tool) for tool in tool_list(body.get("tools"))],
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
    }
