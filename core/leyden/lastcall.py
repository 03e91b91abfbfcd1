"""Find the model call that a piece of agent code has just made, so that it can be rewarded.

One idea: calls remember the call before them in their context, which tasks and threads inherit; so the calls of a
branch are those that follow on what it has called itself.
One trap: a task does not give its context back. What only child tasks called is found by the agent, tool or role around
it, and where branches share even that, by the rollout: the latest of all.
"""

from __future__ import annotations

from leyden.context import MadeCall, RolloutContext, current, latest_call
from leyden.errors import RewardError


def last_call(role: str | None = None) -> str | None:
    """Return the span id of the latest model call made here: `emit_reward(0.3, span=last_call())`.

    "Here" is as narrow as it can be: the calls of this task or thread and of those it started, made inside the agent,
    tool or role that is at work; where there is none, those of whoever started it, and so on to the whole rollout. So
    branches that run side by side each find their own call.

    Args:
        role: the latest call of this role; `None` takes any.

    Returns:
        `None` outside a rollout (a deployed app), where rewards go nowhere.

    Raises:
        RewardError: the rollout has no such call, so a reward for it would credit the wrong one.
    """
    frame = current()
    if frame is None or frame.rollout is None:
        return None
    rollout = frame.rollout
    calls = [call for call in rollout.calls if role in (None, call.role)]
    if not calls:
        spoken = sorted({call.role for call in rollout.calls})
        raise RewardError(
            f"rollout {rollout.rollout_id!r} has no model call{'' if role is None else f' of role {role!r}'} yet "
            f"(roles that spoke: {spoken!r}); reward a call after it was made"
        )
    inside = [call for call in calls if _is_inside(rollout, call.span_id, frame.span_id)]
    made = latest_call()
    while made is not None:
        for some in (inside, calls):
            own = [call for call in some if _follows(call, made)]
            if own:
                return own[-1].span_id
        made = made.before
    return (inside or calls)[-1].span_id


def _is_inside(rollout: RolloutContext, span_id: str | None, around: str | None) -> bool:
    while span_id is not None and span_id != around:
        span_id = rollout.parents.get(span_id)
    return span_id is not None


def _follows(call: MadeCall | None, made: MadeCall) -> bool:
    while call is not None and call is not made:
        call = call.before
    return call is not None
