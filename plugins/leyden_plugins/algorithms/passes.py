"""Learning from what is stored: passes over rollouts of other runs, in batches of an order that a resume finds again.

One idea: what a step trains follows from its number alone, so nothing is saved, and steps may begin anywhere in a
chain. Every item belongs to one of `steps_per_epoch` shares, drawn once from the seed; a step trains its share in an
order of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Session

Item = TypeVar("Item")

Source = str | Path | Sequence[str | Path]
"""Run folders or stores."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often and in which pieces stored items are trained.

    Raises:
        ConfigurationError: a value below 1.
    """

    epochs: int = 1
    steps_per_epoch: int = 1
    batch_size: int = 16
    """Items an optimizer step."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must be at least 1")

    @property
    def steps(self) -> int:
        """Return how many steps all passes take."""
        return self.epochs * self.steps_per_epoch

    def batches(self, items: Sequence[Item], step: int) -> list[list[Item]]:
        """Return what a step trains: its share of the items, in batches of nearly equal size."""
        order = list(items)
        random.Random(f"{self.seed}/shares").shuffle(order)
        share = order[(step - 1) % self.steps_per_epoch :: self.steps_per_epoch]
        random.Random(f"{self.seed}/{step}").shuffle(share)
        count = -(-len(share) // self.batch_size)
        return [share[at * len(share) // count : (at + 1) * len(share) // count] for at in range(count)]


async def stored_groups(session: Session, source: Source) -> list[Group]:
    """Return the groups of all sources; those of several are kept apart by a number in front of their names."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    found: list[Group] = []
    for number, one in enumerate(sources):
        groups = await session.stored(one)
        found += groups if len(sources) == 1 else [_named(group, number) for group in groups]
    return found


def check_source(source: Source) -> None:
    """Refuse a source that names nothing.

    Raises:
        ConfigurationError: it is empty.
    """
    if not source:
        raise ConfigurationError(f"source={source!r} names no run; give its folder, such as source='runs/production'")


def _named(group: Group, number: int) -> Group:
    group_id = f"{number}/{group.group_id}"
    rollouts = [
        replace(
            one,
            rollout=msgspec.structs.replace(
                one.rollout, rollout_id=f"{number}/{one.rollout.rollout_id}", group_id=group_id
            ),
        )
        for one in group.rollouts
    ]
    return replace(group, group_id=group_id, rollouts=rollouts)
