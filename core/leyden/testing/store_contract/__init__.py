"""Check that a store keeps the duties of `leyden.interfaces.Store`.

One idea: a check is an async function of `make_store`, which opens an empty store, so any test framework can run
it: `asyncio.run(check(make_store))` for each of `CHECKS`. A store that outlives its process also passes
`DURABLE_CHECKS`, which call `make_store` again and expect the same data. What is broken raises `AssertionError`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import ModuleType

from leyden.testing.store_contract import durability, records, rollouts, training
from leyden.testing.store_contract.harness import MakeStore

__all__ = ["CHECKS", "DURABLE_CHECKS", "Check", "MakeStore"]

Check = Callable[[MakeStore], Awaitable[None]]


def _checks_of(*modules: ModuleType) -> tuple[Check, ...]:
    return tuple(check for module in modules for name, check in vars(module).items() if name.startswith("check_"))


CHECKS = _checks_of(rollouts, records, training)
"""Duties of every store."""

DURABLE_CHECKS = _checks_of(durability)
"""Duties of a store that outlives its process: `make_store` must open the same data again."""
