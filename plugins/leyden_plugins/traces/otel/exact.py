"""Exact tokens from a recorded answer: vLLM returns them when asked; instrumentations that keep raw answers keep them.

One trap: nobody knows from a trace at which temperature or behind which mask these were sampled, so such a completion
is marked off-distribution: to be imitated, never trained by RL.
"""

from __future__ import annotations

from collections.abc import Mapping

from leyden.spans import Choice, Completion, Status
from leyden_plugins.traces.otel.dialects.reading import items
from leyden_plugins.traces.otel.spans import RawSpan


def completion(raw: RawSpan, response: Mapping[str, object] | None, *, rollout_id: str, role: str) -> Completion | None:
    """Return the completion of an answer with token ids for the prompt and every choice, else `None`."""
    body = response or {}
    choices = [_choice(index, one) for index, one in enumerate(items(body.get("choices")))]
    prompt = _ids(body.get("prompt_token_ids")) or next(
        (ids for one in items(body.get("choices")) if (ids := _ids(one.get("prompt_token_ids")))), None
    )
    complete = [one for one in choices if one is not None]
    if raw.is_error or not prompt or not complete or len(complete) != len(choices):
        return None
    return Completion(
        span_id=raw.span_id,
        http_attempt=0,
        rollout_id=rollout_id,
        attempt=1,
        role=role,
        policy="",
        version=0,
        prompt_token_ids=prompt,
        choices=complete,
        sampling={},
        off_distribution=True,
        status=Status.OK,
        delivered=True,
        start_ns=raw.start_ns,
        first_token_ns=raw.start_ns,
        end_ns=raw.end_ns,
    )


def _choice(index: int, choice: Mapping[str, object]) -> Choice | None:
    tokens = _ids(choice.get("token_ids"))
    if not tokens:
        return None
    told = choice.get("logprobs")
    found = [one.get("logprob") for one in items(told.get("content") if isinstance(told, Mapping) else None)]
    logprobs = [float(one) for one in found if isinstance(one, int | float)]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    return Choice(
        index=index,
        token_ids=tokens,
        logprobs=logprobs if len(logprobs) == len(tokens) else [0.0] * len(tokens),
        finish_reason=str(choice.get("finish_reason") or "stop"),
        text=text if isinstance(text, str) else "",
    )


def _ids(value: object) -> list[int] | None:
    is_list = isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
    return list(value) if is_list and isinstance(value, list) else None
