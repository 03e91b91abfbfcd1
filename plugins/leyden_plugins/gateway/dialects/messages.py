"""Anthropic messages: content blocks in and out, its own events, its own errors.

The trap: the protocol has no place for log-probabilities or token ids, so clients never hear them; they are
recorded all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from leyden.interfaces import Delta, GenerationRequest, SamplingParameters
from leyden_plugins.gateway.dialects import Answer, ChoiceSoFar, Decode, Question
from leyden_plugins.gateway.dialects.fields import check_names, flag, mapping, string, whole, wrong
from leyden_plugins.gateway.dialects.formats import read_format
from leyden_plugins.gateway.dialects.messages_blocks import (
    arguments_object,
    read_anthropic_choice,
    read_client_tools,
    read_conversation,
)
from leyden_plugins.gateway.dialects.sampling import MOST_TOKENS, read_stop, read_temperature, read_top_k, read_top_p
from leyden_plugins.gateway.dialects.spelling import event, function_of
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

READ = frozenset(
    {
        "model",
        "messages",
        "system",
        "max_tokens",
        "stop_sequences",
        "temperature",
        "top_p",
        "top_k",
        "tools",
        "tool_choice",
        "output_config",
        "stream",
    }
)

IGNORED = frozenset(
    {
        "cache_control",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "thinking",
        "user_profile_id",
        "workspace_id",
    }
)
"""They say nothing about which tokens are sampled here, or are hints for which this engine has no setting."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mcp_servers": ([],),
    "context_management": ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
}
"""Fields that are not supported, with the values that mean nothing."""

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesDialect:
    """Speaks `POST /v1/messages`, and counts the tokens of a prompt."""

    path = "messages"
    prompt_field = "messages"
    format_field = "output_config.format"
    count_path = "count_tokens"

    def read(self, body: Mapping[str, object], *, decode: Decode | None, memory: Memory) -> Question:
        """Check a request; `memory` knows how earlier tool calls were spelled.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        longest = whole(body, "max_tokens", 1, MOST_TOKENS)
        if longest is None:
            raise wrong("max_tokens", None, "a whole number from 1")
        request = self.request(body, longest, string(body, "model"), memory)
        return MessagesQuestion(request=request, stream=request.stream, memory=memory, decode=decode)

    def request(self, body: Mapping[str, object], longest: int | None, model: str, memory: Memory) -> GenerationRequest:
        """Return what to generate."""
        check_names(body, READ | IGNORED, NEUTRAL)
        tools = read_client_tools(body.get("tools"))
        config = mapping(body, "output_config")
        check_names(
            {f"output_config.{key}": value for key, value in config.items()},
            ("output_config.format", "output_config.effort"),
        )
        return GenerationRequest(
            model=model,
            messages=read_conversation(body.get("system"), body.get("messages"), memory),
            tools=tools,
            tool_choice=read_anthropic_choice(body.get("tool_choice"), tools),
            response_format=read_format(config.get("format"), "output_config.format"),
            sampling=SamplingParameters(
                temperature=read_temperature(body),
                top_p=read_top_p(body),
                top_k=read_top_k(body),
                stop=read_stop(body, "stop_sequences"),
                max_tokens=longest,
            ),
            stream=flag(body, "stream"),
        )

    def read_prompt(self, body: Mapping[str, object], *, memory: Memory) -> GenerationRequest:
        """Check a request for a count, which has no `max_tokens`.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        return self.request(body, None, string(body, "model"), memory)

    def count(self, tokens: int) -> bytes:
        """Spell a prompt's length."""
        return msgspec.json.encode({"input_tokens": tokens})

    def error(self, refusal: Refusal) -> bytes:
        """Spell a refusal as Anthropic does."""
        return msgspec.json.encode(error_body(refusal))


def error_body(refusal: Refusal) -> dict[str, object]:
    """Return Anthropic's error object."""
    message = refusal.message
    if refusal.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # clients look for these words
    return {
        "type": "error",
        "error": {"type": ERROR_TYPES.get(refusal.status, "api_error"), "message": message},
        "request_id": None,
    }


@dataclass(kw_only=True)
class MessagesQuestion:
    """One request, and how far its answer has been told."""

    request: GenerationRequest
    stream: bool
    memory: Memory
    decode: Decode | None
    """Tells which stop sequence ended an answer."""
    _text_is_open: bool = field(default=False, init=False)

    def answer(self, answer: Answer) -> bytes:
        """Spell the complete answer."""
        (choice,) = answer.choices
        text = "".join(choice.text)
        content: list[dict[str, object]] = [{"type": "text", "text": text}] if text else []
        content += [self.use(call) for call in choice.tool_calls]
        return msgspec.json.encode(self.message(answer) | {"content": content} | self.ending(choice))

    def message(self, answer: Answer) -> dict[str, object]:
        """Return a message without content."""
        return {
            "id": f"msg_{answer.answer_id}",
            "type": "message",
            "role": "assistant",
            "model": self.request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(answer),
        }

    def use(self, call: Mapping[str, object]) -> dict[str, object]:
        """Return the block of a chat tool call, and remember how its arguments were spelled."""
        function = function_of(call)
        arguments = str(function["arguments"])
        self.memory.put(str(call["id"]), arguments)
        return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments_object(arguments)}

    def ending(self, choice: ChoiceSoFar) -> dict[str, object]:
        """Return why the answer ended."""
        reason = STOP_REASONS.get(str(choice.finish_reason), "end_turn")
        stop = self.stop_sequence(choice) if reason == "end_turn" else None
        return {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}

    def stop_sequence(self, choice: ChoiceSoFar) -> str | None:
        """Return the stop sequence that was sampled after the text, if any."""
        if not self.request.sampling.stop or self.decode is None:
            return None
        sampled, text = self.decode(choice.token_ids), "".join(choice.text)
        rest = sampled[len(text) :] if sampled.startswith(text) else sampled
        found = [(rest.find(stop), stop) for stop in self.request.sampling.stop if stop in rest]
        return min(found)[1] if found else None

    # ---- events ------------------------------------------------------------------------------------------------

    def first(self, answer: Answer) -> bytes:
        """Spell that the message has begun."""
        return named("message_start", message=self.message(answer)) + named("ping")

    def chunk(self, answer: Answer, delta: Delta) -> bytes:
        """Spell a piece of text. Calls wait for the end, because an answer's text is its first block."""
        if not delta.text:
            return b""
        opening = b""
        if not self._text_is_open:
            self._text_is_open = True
            opening = named("content_block_start", index=0, content_block={"type": "text", "text": ""})
        return opening + named("content_block_delta", index=0, delta={"type": "text_delta", "text": delta.text})

    def last(self, answer: Answer) -> bytes:
        """Spell the calls, why it ended, and the end."""
        (choice,) = answer.choices
        events = [named("content_block_stop", index=0)] if self._text_is_open else []
        for index, call in enumerate(choice.tool_calls, start=len(events)):
            block = self.use(call)
            spelled = {"type": "input_json_delta", "partial_json": function_of(call)["arguments"]}
            events.append(named("content_block_start", index=index, content_block=block | {"input": {}}))
            events.append(named("content_block_delta", index=index, delta=spelled))
            events.append(named("content_block_stop", index=index))
        events.append(named("message_delta", delta=self.ending(choice), usage=usage(answer)))
        return b"".join(events) + named("message_stop")

    def error_event(self, refusal: Refusal) -> bytes:
        """Spell a failure within a stream; Anthropic's clients raise it."""
        return event(error_body(refusal), "error")


def named(kind: str, **fields: object) -> bytes:
    """Return one of Anthropic's events."""
    return event({"type": kind, **fields}, kind)


def usage(answer: Answer) -> dict[str, int]:
    """Return Anthropic's token counts."""
    return {
        "input_tokens": len(answer.prompt_token_ids),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": answer.sampled,
    }
