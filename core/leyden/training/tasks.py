"""The user's tasks, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from leyden.errors import DatasetError


def checked_tasks(tasks: Iterable[object], *, name: str, may_be_empty: bool = False) -> Sequence[object]:
    """Return the tasks as plain JSON values: the same ones in this process, in a worker and in the store.

    Raises:
        DatasetError: not iterable, empty, or a task that is not a JSON value; names its position.
    """
    if isinstance(tasks, str | bytes) or not isinstance(tasks, Iterable):
        raise DatasetError(f"{name} must be a sequence of JSON values (usually dicts), got {tasks!r}")
    found = list(tasks)
    if not found and not may_be_empty:
        raise DatasetError(f"{name} is empty; give at least one task")
    for index, task in enumerate(found):
        if task is None:
            raise DatasetError(f"{name}[{index}] is None; a task is a JSON value such as a dict")
        try:
            found[index] = msgspec.json.decode(msgspec.json.encode(task))  # a tuple becomes a list, as in a worker
            msgspec.msgpack.encode(found[index])  # which knows no integers beyond 64 bits
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise DatasetError(
                f"{name}[{index}] is not a JSON value ({error}): {task!r}. Tasks are stored and sent to workers; "
                "give plain dicts, lists, strings, numbers and booleans"
            ) from error
    return found
