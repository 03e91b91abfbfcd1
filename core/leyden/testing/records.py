"""Build valid records with few words: every field has a default, keywords say what a test is about."""

from __future__ import annotations

from collections.abc import Sequence

from leyden.spans import (
    Choice,
    Completion,
    Kind,
    Mode,
    Reward,
    Rollout,
    Span,
    Status,
    Update,
    new_id,
)


def a_rollout(rollout_id: str = "rollout-1", **changes: object) -> Rollout:
    """Return a queued rollout."""
    fields: dict[str, object] = {
        "task": {"question": "How many?"},
        "task_id": "task-1",
        "group_id": "group-1",
        "mode": Mode.TRAIN,
        "step": 1,
    }
    return Rollout(rollout_id=rollout_id, **(fields | changes))  # type: ignore[arg-type]  # the caller's fields


def a_span(rollout_id: str = "rollout-1", **changes: object) -> Span:
    """Return a finished tool span of the first attempt, with its own id."""
    fields: dict[str, object] = {
        "span_id": new_id(),
        "parent_id": None,
        "attempt": 1,
        "kind": Kind.TOOL,
        "name": "execute",
        "role": "main",
        "start_ns": 1_000,
        "end_ns": 2_000,
    }
    return Span(rollout_id=rollout_id, **(fields | changes))  # type: ignore[arg-type]  # the caller's fields


def a_completion(
    rollout_id: str = "rollout-1",
    *,
    prompt: Sequence[int] = (1, 2, 3),
    answer: Sequence[int] = (4, 5),
    **changes: object,
) -> Completion:
    """Return a delivered completion of the first attempt, with its own span id and one choice."""
    fields: dict[str, object] = {
        "span_id": new_id(),
        "http_attempt": 0,
        "attempt": 1,
        "role": "main",
        "policy": "policy",
        "version": 0,
        "prompt_token_ids": list(prompt),
        "choices": [a_choice(answer)],
        "sampling": {"temperature": 1.0},
        "off_distribution": False,
        "status": Status.OK,
        "delivered": True,
        "start_ns": 1_000,
        "first_token_ns": 1_500,
        "end_ns": 2_000,
    }
    return Completion(rollout_id=rollout_id, **(fields | changes))  # type: ignore[arg-type]  # the caller's fields


def a_choice(answer: Sequence[int] = (4, 5), **changes: object) -> Choice:
    """Return a choice that ended by itself, each token with a log-probability that float32 holds exactly."""
    fields: dict[str, object] = {
        "index": 0,
        "token_ids": list(answer),
        "logprobs": [-0.5] * len(answer),
        "finish_reason": "stop",
    }
    return Choice(**(fields | changes))  # type: ignore[arg-type]  # the caller's fields


def a_reward(rollout_id: str = "rollout-1", value: float = 1.0, **changes: object) -> Reward:
    """Return a reward of the first attempt of a whole rollout."""
    fields: dict[str, object] = {"attempt": 1, "name": "reward"}
    return Reward(rollout_id=rollout_id, value=value, **(fields | changes))  # type: ignore[arg-type]  # the caller's


def an_update(rollout_ids: Sequence[str] = ("rollout-1",), **changes: object) -> Update:
    """Return an entry of the update ledger, with its own id."""
    fields: dict[str, object] = {"update_id": new_id(), "policy": "policy", "step": 1, "version": 1}
    return Update(rollout_ids=list(rollout_ids), **(fields | changes))  # type: ignore[arg-type]  # the caller's fields
