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
from leyden_plugins.gateway.dialects.fields import check_names, flag, mapping, string, wrong
from leyden_plugins.gateway.dialects.formats import read_format
from leyden_plugins.gateway.dialects.sampling import read_sampling
from leyden_plugins.gateway.dialects.spelling import DONE, error_body, event, speller, token_logprobs
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

READ = sampling.FIELDS | {
    "model",
    "messages",
    "tools",
    "tool_choice",
    "response_format",
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
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
        "reasoning_effort",
        "verbosity",
    }
)
"""They say nothing about which tokens are sampled here, or are hints for which this engine has no setting."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "modalities": (["text"],),
    "repetition_penalty": (1, 1.0),
    "functions": ([],),
    "function_call": ("none",),
}
"""Fields that are not supported, with the values that mean nothing."""


class ChatDialect:
    """Speaks `POST /v1/chat/completions`."""

    path = "chat/completions"
    prompt_field = "messages"
    format_field = "response_format"

    def read(self, body: Mapping[str, object], *, decode: Decode | None, memory: Memory) -> Question:
        """Check a request; `memory` is not used, because every request is whole.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        check_names(body, READ | IGNORED, NEUTRAL)
        model = string(body, "model")
        tools = read_tools(body.get("tools"))
        if body.get("top_logprobs"):
            raise wrong("top_logprobs", body["top_logprobs"], "0: only sampled tokens have log-probabilities here")
        return ChatQuestion(
            request=GenerationRequest(
                model=model,
                messages=read_messages(body.get("messages")),
                tools=tools,
                tool_choice=read_tool_choice(body.get("tool_choice"), tools),
                response_format=read_format(body.get("response_format"), "response_format", nested="json_schema"),
                sampling=read_sampling(body),
                stream=flag(body, "stream"),
            ),
            stream=flag(body, "stream"),
            wants_usage=flag(mapping(body, "stream_options"), "include_usage"),
            wants_token_ids=flag(body, "return_token_ids"),
            decode=speller(decode, "logprobs") if flag(body, "logprobs") else None,
        )

    def error(self, refusal: Refusal) -> bytes:
        """Spell a refusal as OpenAI does."""
        return msgspec.json.encode(error_body(refusal))


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

    def error_event(self, refusal: Refusal) -> bytes:
        """Spell a failure within a stream; OpenAI's clients raise it."""
        return event(error_body(refusal))

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
            "id": f"chatcmpl-{answer.answer_id}",
            "object": kind,
            "created": answer.created_seconds,
            "model": self.request.model,
        }

    def logprobs(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, object] | None:
        """Return OpenAI's log-probabilities of some tokens; `None` when they were not asked for."""
        if self.decode is None:
            return None
        return {"content": token_logprobs(token_ids, logprobs, self.decode), "refusal": None}
