"""Pairs of rollouts of one task, of which one went better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from leyden.interfaces import Transition

Choice = Literal["best_worst", "all"]
"""Of each group the highest return against the lowest; or every two rollouts whose returns differ."""


@dataclass(frozen=True)
class Pair:
    """Two rollouts, by id."""

    chosen: str
    rejected: str


def returns_of(transitions: Sequence[Transition]) -> dict[str, dict[str, float]]:
    """Return group -> rollout -> the policy's return there, the mean of what credit assignment gave its calls."""
    values: dict[str, dict[str, list[float]]] = {}
    for one in transitions:
        values.setdefault(one.group_id, {}).setdefault(one.rollout_id, []).append(one.value)
    return {name: {one: fmean(found) for one, found in group.items()} for name, group in values.items()}


def pairs_of(returns: dict[str, float], choice: Choice, *, least_gap: float) -> list[Pair]:
    """Return the pairs of one group, in the order of its rollouts; of equal returns the first stands for all.

    Args:
        returns: rollout -> return.
        choice: which pairs.
        least_gap: between two returns that are compared; equal ones never are.
    """
    if choice == "best_worst":
        best = max(returns, key=lambda one: returns[one])
        worst = min(returns, key=lambda one: returns[one])
        candidates = [(best, worst)]
    else:
        candidates = [(one, other) for one in returns for other in returns]
    return [
        Pair(one, other)
        for one, other in candidates
        if returns[one] > returns[other] and returns[one] - returns[other] >= least_gap
    ]
