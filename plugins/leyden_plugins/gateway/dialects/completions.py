"""OpenAI's legacy completions: a prompt as text or as exact token ids, and what follows it.

The trap: OpenAI's default answer has 16 tokens at most, and clients that set no limit mean that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from leyden.interfaces import Delta, GenerationRequest
from leyden_plugins.gateway.dialects import Answer, Decode, Question, sampling
from leyden_plugins.gateway.dialects.fields import check_names, flag, mapping, string, whole, wrong
from leyden_plugins.gateway.dialects.sampling import read_sampling
from leyden_plugins.gateway.dialects.spelling import DONE, error_body, event, speller, token_logprobs
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

KNOWN = (sampling.FIELDS - {"max_completion_tokens"}) | {
    "model",
    "prompt",
    "stream",
    "stream_options",
    "logprobs",
    "return_token_ids",
    "user",
}

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "logit_bias": ({},),
    "repetition_penalty": (1, 1.0),
}
"""Fields that are not supported, with the values that mean nothing."""

DEFAULT_MAX_TOKENS = 16

ONE_PROMPT = "a string, a list of token ids, or a list that holds one of these"


class CompletionsDialect:
    """Speaks `POST /v1/completions`."""

    path = "completions"
    prompt_field = "prompt"
    format_field = "response_format"

    def read(self, body: Mapping[str, object], *, decode: Decode | None, memory: Memory) -> Question:
        """Check a request; `memory` is not used, because every request is whole.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        check_names(body, KNOWN, NEUTRAL)
        text, token_ids = read_prompt(body.get("prompt"))
        asked = read_sampling(body)
        wants_logprobs = whole(body, "logprobs", 0, 1) is not None
        return CompletionsQuestion(
            request=GenerationRequest(
                model=string(body, "model"),
                messages=(),
                prompt_text=text,
                prompt_token_ids=token_ids,
                sampling=replace(asked, max_tokens=asked.max_tokens or DEFAULT_MAX_TOKENS),
                stream=flag(body, "stream"),
            ),
            stream=flag(body, "stream"),
            wants_usage=flag(mapping(body, "stream_options"), "include_usage"),
            wants_token_ids=flag(body, "return_token_ids"),
            decode=speller(decode, "logprobs") if wants_logprobs else None,
        )

    def error(self, refusal: Refusal) -> bytes:
        """Spell a refusal as OpenAI does."""
        return msgspec.json.encode(error_body(refusal))


def read_prompt(value: object) -> tuple[str | None, Sequence[int] | None]:
    """Return the prompt as text or as token ids.

    Raises:
        Refusal: it is neither, or several.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value, None
    # A boolean is an int for Python, and none for JSON.
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return None, value
    raise wrong("prompt", value, ONE_PROMPT)


@dataclass(frozen=True, kw_only=True)
class CompletionsQuestion:
    """One completion request, and how its client wants to hear the answer."""

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
            said = self.choice(index, "".join(choice.text), choice.finish_reason, choice.token_ids, choice.logprobs)
            if self.wants_token_ids:
                said["prompt_token_ids"] = answer.prompt_token_ids
            choices.append(said)
        return msgspec.json.encode(self.head(answer) | {"choices": choices, "usage": answer.usage})

    def first(self, answer: Answer) -> bytes:
        """Spell the prompt's tokens where they were asked for; otherwise a stream opens with its first piece."""
        if not self.wants_token_ids:
            return b""
        said = self.choice(0, "", None, (), ()) | {"prompt_token_ids": answer.prompt_token_ids}
        return event(self.head(answer) | {"choices": [said]})

    def chunk(self, answer: Answer, delta: Delta) -> bytes:
        """Spell a piece."""
        wants_tokens = self.wants_token_ids or self.decode is not None
        if not delta.text and delta.finish_reason is None and not (delta.token_ids and wants_tokens):
            return b""
        said = self.choice(delta.index, delta.text, delta.finish_reason, delta.token_ids, delta.logprobs)
        return event(self.head(answer) | {"choices": [said]})

    def last(self, answer: Answer) -> bytes:
        """Spell the usage, when asked for, and the end."""
        usage = event(self.head(answer) | {"choices": [], "usage": answer.usage}) if self.wants_usage else b""
        return usage + DONE

    def error_event(self, refusal: Refusal) -> bytes:
        """Spell a failure within a stream; OpenAI's clients raise it."""
        return event(error_body(refusal))

    def head(self, answer: Answer) -> dict[str, object]:
        """Return what every body begins with."""
        return {
            "id": f"cmpl-{answer.answer_id}",
            "object": "text_completion",
            "created": answer.created_seconds,
            "model": self.request.model,
        }

    def choice(
        self, index: int, text: str, finish_reason: str | None, token_ids: Sequence[int], logprobs: Sequence[float]
    ) -> dict[str, object]:
        """Return one choice, or a piece of it."""
        said: dict[str, object] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self.decode is not None:
            spelled = token_logprobs(token_ids, logprobs, self.decode)
            # Only sampled tokens have log-probabilities here, so no alternatives stand beside them.
            said["logprobs"] = {
                "tokens": [token["token"] for token in spelled],
                "token_logprobs": list(logprobs),
                "top_logprobs": None,
                "text_offset": None,
            }
        if self.wants_token_ids:
            said["token_ids"] = token_ids
        return said
