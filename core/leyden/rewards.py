"""Rewards: what an agent may return or emit, checked, and how named rewards become one total.

One idea: a reward has a value, a name and perhaps a target. Names combine as a weighted sum (`reward_weights`): those
of the whole rollout to its total, which needs every name that has a weight; those with a target to the return of the
calls they aim at, where a name without a weight counts as it is (weight 1) and weight 0 only measures.
One trap: `None` and `NO_REWARD` are not 0. A rollout without a reward leaves the baseline and the training data. A name
that was given, but only to roles or calls, is not missing: its share of the total is 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Final

from leyden.context import current
from leyden.errors import ConfigurationError, RewardError
from leyden.spans import Kind, Reward

DEFAULT_REWARD = "reward"
"""The name of a bare number that an agent or reward function returns."""


class NoReward:
    """The type of `NO_REWARD`."""

    _instance: NoReward | None = None

    def __new__(cls) -> NoReward:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __reduce__(self) -> tuple[object, ...]:
        return (NoReward, ())

    def __repr__(self) -> str:
        return "NO_REWARD"


NO_REWARD: Final = NoReward()
"""Return this to drop a rollout on purpose: no reward, no share in the baseline, no training."""


def checked(value: object, *, where: str) -> float:
    """Return `value` as a float.

    Raises:
        RewardError: not a finite int, float or bool; names `where`.
    """
    # Compared, because `math.isfinite` fails for integers that no float holds.
    if isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max:
        return float(value)
    raise RewardError(
        f"{where}: a reward is a finite float, int or bool (or a dict of named ones), got {value!r:.200} "
        f"of type {type(value).__name__}"
    )


def named(value: object, *, where: str) -> dict[str, float] | None:
    """Return what an agent returned as named rewards; `None` when it returned none.

    Raises:
        RewardError: a value of another type, NaN or infinity.
    """
    if value is None or value is NO_REWARD:
        return None
    if isinstance(value, Mapping):
        return {str(name): checked(one, where=f"{where}, reward {name!r}") for name, one in value.items()}
    return {DEFAULT_REWARD: checked(value, where=where)}


def total(rewards: Iterable[Reward], weights: Mapping[str, float]) -> float | None:
    """Return the weighted sum of the untargeted rewards; `None` when a name with a weight other than 0 is missing.

    A name with targeted rewards only is not missing; it adds 0.
    """
    sums: dict[str, float] = {}
    for reward in rewards:
        is_of_rollout = reward.target_role is None and reward.target_span is None
        sums[reward.name] = sums.get(reward.name, 0.0) + (reward.value if is_of_rollout else 0.0)
    needed = {name: weight for name, weight in weights.items() if weight != 0}
    if not needed.keys() <= sums.keys():
        return None
    return sum(weight * sums[name] for name, weight in needed.items())


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that can never give a total.

    Raises:
        ConfigurationError: empty, all zero, or not finite.
    """
    if not any(weights.values()) or not all(math.isfinite(weight) for weight in weights.values()):
        raise ConfigurationError(
            f"reward_weights={dict(weights)!r} gives no total: at least one weight must be a finite number other than 0"
        )


def emit_reward(
    value: float,
    name: str = DEFAULT_REWARD,
    *,
    role: str | None = None,
    span: str | None = None,
    index: int = 0,
) -> None:
    """Record a reward of the running rollout; does nothing outside one (a deployed app).

    Args:
        value: finite.
        name: weighted by `Trainer(reward_weights=...)`.
        role: credit this role's calls only.
        span: credit this model call only; `leyden.last_call()` names the latest one.
        index: tells apart several rewards of one name and target.

    Raises:
        RewardError: not a finite number, or the same (name, target, index) a second time.
    """
    frame = current()
    if frame is None or frame.rollout is None:
        return
    where = f"rollout {frame.rollout.rollout_id!r}"
    reward = Reward(
        rollout_id=frame.rollout.rollout_id,
        attempt=frame.rollout.attempt,
        name=name,
        value=checked(value, where=where),
        target_role=role,
        target_span=span,
        index=index,
    )
    frame.rollout.record(reward)
    _point_span(Kind.REWARD, name, value=reward.value)


def emit_message(text: str) -> None:
    """Record a message of the running rollout, for people to read."""
    _point_span(Kind.MESSAGE, "message", text=text)


def emit_event(name: str, **attributes: object) -> None:
    """Record that something happened in the running rollout; attributes are JSON values."""
    _point_span(Kind.EVENT, name, **attributes)


def _point_span(kind: Kind, name: str, **attributes: object) -> None:
    frame = current()
    if frame is None or frame.rollout is None:
        return
    span = frame.rollout.open(kind, name, frame.role, frame.span_id)
    span.attributes.update(attributes)
    span.close()
