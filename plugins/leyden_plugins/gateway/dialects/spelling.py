"""Spell what several dialects say alike: events, OpenAI's errors, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from leyden_plugins.gateway.dialects import Decode
from leyden_plugins.gateway.dialects.fields import unsupported
from leyden_plugins.gateway.refusal import Refusal

DONE = b"data: [DONE]\n\n"


def event(value: object, name: str | None = None) -> bytes:
    """Return one server-sent event."""
    data = b"data: " + msgspec.json.encode(value) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


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


def function_of(call: Mapping[str, object]) -> Mapping[str, object]:
    """Return the name and arguments of a chat tool call."""
    function = call["function"]
    assert isinstance(function, Mapping), "engines give OpenAI tool calls"
    return function


def speller(decode: Decode | None, field: str) -> Decode:
    """Return what spells the tokens of asked log-probabilities.

    Raises:
        Refusal: this engine spells none.
    """
    if decode is None:
        raise unsupported(field, "needs the text of single tokens, which this engine does not give; remove it")
    return decode


def token_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[float], decode: Decode | None
) -> list[dict[str, object]]:
    """Return OpenAI's log-probabilities of sampled tokens; none without `decode`."""
    if decode is None:
        return []
    content: list[dict[str, object]] = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        text = decode([token_id])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return content
