"""The SQLite store keeps the contract of every store."""

import asyncio
from pathlib import Path

import pytest

from leyden.sqlite import SQLiteStore
from leyden.testing.store_contract import CHECKS, DURABLE_CHECKS, Check


@pytest.mark.parametrize("check", [*CHECKS, *DURABLE_CHECKS], ids=lambda check: check.__name__)
def test_sqlite_keeps_the_contract(check: Check, tmp_path: Path) -> None:
    asyncio.run(check(lambda: SQLiteStore.open(tmp_path / "store.db")))  # type: ignore[arg-type]  # a coroutine
