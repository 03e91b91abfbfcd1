"""How a search ends before its method does, and work that is done side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class SearchOver(Exception):
    """Ends a search with the best that it has found; says why."""


async def together(work: Sequence[Coroutine[object, object, Result]]) -> list[Result]:
    """Wait for all; when one raises, end the others first."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
