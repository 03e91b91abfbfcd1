"""Remember what was answered, for protocols whose clients refer back to it by id.

One idea: a memory belongs to an admission, so it is gone when the rollout is over and no other rollout can ask it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import msgspec

MOST_REMEMBERED = 4096
"""Entries of an endpoint that is open to many callers; the ones not used for longest are forgotten."""


class Memory:
    """Values by id."""

    def __init__(self, most: int | None = None) -> None:
        """`most` bounds the number of entries; `None` keeps all until the memory itself is dropped."""
        self._most = most
        self._values: OrderedDict[str, object] = OrderedDict()
        self._shared: dict[bytes, Mapping[str, object]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> object | None:
        """Return what was put under `key`, or `None`."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: object) -> None:
        """Keep `value`, and forget the oldest entry when there are too many."""
        self._values[key] = value
        self._values.move_to_end(key)
        if self._most is not None and len(self._values) > self._most:
            self._values.popitem(last=False)

    def shared(self, value: Mapping[str, object]) -> Mapping[str, object]:
        """Return the equal value kept before, so that clients who send a whole conversation each turn cost O(T)."""
        if self._most is not None:
            return value
        return self._shared.setdefault(hashlib.blake2b(msgspec.json.encode(value), digest_size=16).digest(), value)
