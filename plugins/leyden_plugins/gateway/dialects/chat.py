"""OpenAI chat completions: JSON and server-sent events, tools, log-probabilities.

One idea: every field of a request is in exactly one of the tables below; any other is refused by name. The
client hears only what it asked for: token ids need `return_token_ids` (as with vLLM), log-probabilities
`logprobs`; parsing them costs clients milliseconds a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from leyden.interfaces import Delta, GenerationRequest
from leyden_plugins.gateway.dialects import Answer, Decode, Question, sampling
from leyden_plugins.gateway.dialects.chat_fields import read_messages, read_tool_choice, read_tools
from leyden_plugins.gateway.dialects.sampling import flag, read_sampling, wrong
from leyden_plugins.gateway.refusal import Refusal

READ = sampling.FIELDS | {
    "model",
    "messages",
    "tools",
    "tool_choice",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "return_token_ids",
}

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""They say nothing about which tokens are sampled here."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "repetition_penalty": (1, 1.0),
}
"""Fields that are not supported, with the values that mean nothing."""

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class ChatDialect:
    """Speaks `POST /v1/chat/completions`."""

    path = "chat/completions"

    def read(self, body: Mapping[str, object], *, decode: Decode | None) -> Question:
        """Check a request.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        for name, value in body.items():
            if name in READ or name in IGNORED or value is None or value in NEUTRAL.get(name, ()):
                continue
            raise Refusal(
                400, f"{name!r} is not supported by this server; remove it", code="unsupported_field", param=name
            )
        model = body.get("model")
        if not isinstance(model, str):
            raise wrong("model", model, "a string")
        tools = read_tools(body.get("tools"))
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise wrong("stream_options", options, "an object")
        wants_logprobs = flag(body, "logprobs")
        if wants_logprobs and decode is None:
            raise Refusal(
                400,
                "'logprobs' needs the text of single tokens, which this engine does not give; remove it",
                code="unsupported_field",
                param="logprobs",
            )
        if body.get("top_logprobs"):
            raise wrong("top_logprobs", body["top_logprobs"], "0: only sampled tokens have log-probabilities here")
        return ChatQuestion(
            request=GenerationRequest(
                model=model,
                messages=read_messages(body.get("messages")),
                tools=tools,
                tool_choice=read_tool_choice(body.get("tool_choice"), tools),
                sampling=read_sampling(body),
                stream=flag(body, "stream"),
            ),
            stream=flag(body, "stream"),
            wants_usage=flag(options or {}, "include_usage"),
            wants_token_ids=flag(body, "return_token_ids"),
            decode=decode if wants_logprobs else None,
        )

    def error(self, refusal: Refusal) -> bytes:
        """Spell a refusal as OpenAI does."""
        return msgspec.json.encode(error_body(refusal))

    def error_event(self, refusal: Refusal) -> bytes:
        """Spell a failure within a stream; OpenAI's clients raise it."""
        return event(error_body(refusal))


def error_body(refusal: Refusal) -> dict[str, object]:
    """Return OpenAI's error object."""
    return {
        "error": {
            "message": refusal.message,
            "type": refusal.kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


@dataclass(frozen=True, kw_only=True)
class ChatQuestion:
    """One chat request, and how its client wants to hear the answer."""

    request: GenerationRequest
    stream: bool
    wants_usage: bool
    wants_token_ids: bool
    decode: Decode | None
    """Set when log-probabilities were asked for."""

    def answer(self, answer: Answer) -> bytes:
        """Spell the complete answer."""
        choices: list[dict[str, object]] = []
        for index, choice in enumerate(answer.choices):
            text = "".join(choice.text)
            message: dict[str, object] = {"role": "assistant", "content": text or None, "refusal": None}
            if choice.tool_calls:
                message["tool_calls"] = choice.tool_calls
            else:
                message["content"] = text
            said: dict[str, object] = {
                "index": index,
                "message": message,
                "logprobs": self.logprobs(choice.token_ids, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            if self.wants_token_ids:
                said["token_ids"] = choice.token_ids
            choices.append(said)
        body = self.head(answer, "chat.completion") | {"choices": choices, "usage": answer.usage}
        if self.wants_token_ids:
            body["prompt_token_ids"] = answer.prompt_token_ids
        return msgspec.json.encode(body)

    def first(self, answer: Answer) -> bytes:
        """Spell the chunks that name the speaker, one a choice."""
        chunks: list[bytes] = []
        for index in range(len(answer.choices)):
            body = self.chunk_body(answer, index, {"role": "assistant", "content": ""}, None)
            if self.wants_token_ids and index == 0:
                body["prompt_token_ids"] = answer.prompt_token_ids
            chunks.append(event(body))
        return b"".join(chunks)

    def chunk(self, answer: Answer, delta: Delta) -> bytes:
        """Spell a piece, and after the last one of a choice its finish reason."""
        said: dict[str, object] = {}
        if delta.text:
            said["content"] = delta.text
        if delta.tool_calls:
            # `answer` holds this delta already; a choice's calls are numbered from 0.
            known = len(answer.choices[delta.index].tool_calls) - len(delta.tool_calls)
            said["tool_calls"] = [{"index": known + offset, **call} for offset, call in enumerate(delta.tool_calls)]
        chunks = b""
        if said or (delta.token_ids and (self.wants_token_ids or self.decode is not None)):
            body = self.chunk_body(answer, delta.index, said, None, delta)
            chunks = event(body)
        if delta.finish_reason is not None:
            chunks += event(self.chunk_body(answer, delta.index, {}, delta.finish_reason))
        return chunks

    def last(self, answer: Answer) -> bytes:
        """Spell the usage, when asked for, and the end."""
        if not self.wants_usage:
            return DONE
        usage = self.head(answer, "chat.completion.chunk") | {"choices": [], "usage": answer.usage}
        return event(usage) + DONE

    def chunk_body(
        self,
        answer: Answer,
        index: int,
        said: Mapping[str, object],
        finish_reason: str | None,
        delta: Delta | None = None,
    ) -> dict[str, object]:
        """Return one chunk of one choice; `delta` gives its tokens."""
        choice: dict[str, object] = {"index": index, "delta": said, "finish_reason": finish_reason}
        if delta is not None:
            choice["logprobs"] = self.logprobs(delta.token_ids, delta.logprobs)
            if self.wants_token_ids:
                choice["token_ids"] = delta.token_ids
        return self.head(answer, "chat.completion.chunk") | {"choices": [choice]}

    def head(self, answer: Answer, kind: str) -> dict[str, object]:
        """Return what every body begins with."""
        return {
            "id": answer.answer_id,
            "object": kind,
            "created": answer.created_seconds,
            "model": self.request.model,
        }

    def logprobs(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, object] | None:
        """Return OpenAI's log-probabilities of some tokens; `None` when they were not asked for."""
        if self.decode is None:
            return None
        content: list[dict[str, object]] = []
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            text = self.decode([token_id])
            content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
        return {"content": content, "refusal": None}
