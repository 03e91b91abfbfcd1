"""What a store keeps when its process is killed or its disk is full."""

import asyncio
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from leyden.interfaces import Owner
from leyden.ownership import boot_id
from leyden.spans import Completion, Span
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_rollout

CALLERS = 8
SPANS_A_BATCH = 10

WRITE_UNTIL_KILLED = f"""
import asyncio, itertools, os, sys
from leyden.ownership import current_owner
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_completion, a_rollout, a_span

async def caller(store, number):
    for batch in itertools.count():
        name = f"{{number}}-{{batch}}"
        spans = [a_span(name=name) for _ in range({SPANS_A_BATCH})]
        await store.add_records([*spans, a_completion(prompt=range(batch))])
        os.write(1, f"{{name}}\\n".encode())

async def main():
    store = await SQLiteStore.open(sys.argv[1])
    await store.add_rollouts([a_rollout()])
    owner = current_owner()
    await store.start(["rollout-1"], owner=owner, lease_seconds=3600, versions={{}})
    os.write(1, f"{{owner.pid}} {{owner.process_start}}\\n".encode())
    await asyncio.gather(*(caller(store, number) for number in range({CALLERS})))

asyncio.run(main())
"""

WRITE_UNTIL_FULL = """
import asyncio, resource, sys
from leyden.errors import StoreError
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_rollout, a_span

async def main():
    store = await SQLiteStore.open(sys.argv[1])
    await store.add_rollouts([a_rollout(attempt=1)])
    stream = store.stream(10**9)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    limit = 512 * 1024
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    stored = 0
    try:
        for _ in range(10_000):
            await store.add_records([a_span(attributes={"text": "x" * 2_000}) for _ in range(5)])
            stored += 5
    except StoreError as error:
        print("first", error)
    for work in (store.add_records([a_span()]), store.next_version("p"), waiting):
        try:
            await asyncio.wait_for(work, 5)
        except StoreError as error:
            print("later", error)
    await asyncio.wait_for(store.close(), 5)
    print("stored", stored)

asyncio.run(main())
"""


def integrity(path: Path) -> str:
    """Return SQLite's own verdict on the file."""
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_writer_loses_nothing_it_has_acknowledged(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "store.db"
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        pid, process_start = writer.stdout.readline().split()
        time.sleep(random.Random(seed).uniform(0.0, 0.4))
        writer.kill()
        acknowledged = [line.strip() for line in writer.stdout if line.endswith("\n")]

    async def spans_seen_by_a_reader() -> int:
        async with await SQLiteStore.open(path, read_only=True) as store:
            [records] = await store.records(["rollout-1"])
            return len(records.spans)

    async def look() -> tuple[Counter[str], list[int], list[str], int]:
        async with await SQLiteStore.open(path) as store:
            reclaimed = list(await store.reclaim())
            started = await store.start(reclaimed, owner=owner, lease_seconds=60, versions={})
            late = await store.late_records("rollout-1")
            names = Counter(record.name for record in late if isinstance(record, Span))
            prompts = [record.prompt_token_ids for record in late if isinstance(record, Completion)]
            assert all(prompt == list(range(len(prompt))) for prompt in prompts)
            return names, [len(p) for p in prompts], reclaimed, started["rollout-1"]

    owner = Owner(pid=int(pid), process_start=process_start, boot_id=boot_id())
    seen = asyncio.run(spans_seen_by_a_reader())
    names, prompts, reclaimed, attempt = asyncio.run(look())
    assert seen == sum(names.values()), "a reader needs no writer to look at what a killed run has left"
    assert integrity(path) == "ok"
    assert set(acknowledged) <= set(names)
    assert set(names.values()) <= {SPANS_A_BATCH}, "a batch is stored whole or not at all"
    assert len(names) - len(acknowledged) <= CALLERS, "only batches in flight may be stored without an answer"
    assert len(prompts) == len(names)
    assert (reclaimed, attempt) == (["rollout-1"], 2), "a killed owner loses its lease at once, not in an hour"


def test_a_full_disk_is_reported_once_and_for_all_and_keeps_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    done = subprocess.run(
        [sys.executable, "-c", WRITE_UNTIL_FULL, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [first] = [line for line in done.stdout.splitlines() if line.startswith("first")]
    assert str(path) in first
    assert "last 5 records" in first
    assert "make room" in first
    assert "acknowledged before is safe" in first
    assert len(re.findall(r"^later .*store\.db", done.stdout, re.MULTILINE)) == 3
    stored = int(done.stdout.rpartition("stored ")[2])

    async def count() -> int:
        async with await SQLiteStore.open(path) as store:
            [records] = await store.records(["rollout-1"])
            await store.add_rollouts([a_rollout("rollout-2")])  # there is room again
            return len(records.spans)

    assert asyncio.run(count()) == stored > 0
    assert integrity(path) == "ok"


def test_a_cancelled_caller_does_not_disturb_the_others(tmp_path: Path) -> None:
    async def main() -> list[str]:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            calls = [asyncio.ensure_future(store.add_rollouts([a_rollout(f"r{i}")])) for i in range(50)]
            await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
            return [rollout.rollout_id for rollout in await store.rollouts()]

    assert {f"r{i}" for i in range(1, 50, 2)} <= set(asyncio.run(main()))


def test_a_program_that_forgets_to_close_still_ends_and_keeps_its_records(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from leyden.sqlite import SQLiteStore; from leyden.testing.records import a_rollout\n"
        "async def main():\n"
        "    store = await SQLiteStore.open(sys.argv[1]); await store.add_rollouts([a_rollout()])\n"
        "asyncio.run(main())"
    )
    path = tmp_path / "store.db"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60, env=dict(os.environ))

    async def count() -> int:
        async with await SQLiteStore.open(path, read_only=True) as store:
            return len(await store.rollouts())

    assert asyncio.run(count()) == 1
