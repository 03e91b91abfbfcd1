"""Opening: one writer, many readers, and clear refusals of files that are no store of ours."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from leyden.errors import StoreError
from leyden.spans import SCHEMA_VERSION
from leyden.sqlite import SQLiteStore
from leyden.sqlite import file as sqlite_file
from leyden.sqlite.migrations import APPLICATION_ID, MIGRATIONS, migrate
from leyden.testing.records import a_completion, a_rollout, a_span
from leyden.testing.store_contract.harness import unnumbered

HOLD_OPEN = """
import asyncio, sys
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_rollout

async def main():
    async with await SQLiteStore.open(sys.argv[1]) as store:
        await store.add_rollouts([a_rollout()])
        print("open", flush=True)
        for line in iter(sys.stdin.readline, ""):
            await store.add_rollouts([a_rollout(line.strip())])
            print("added", flush=True)

asyncio.run(main())
"""


def open_and_close(path: Path, *, read_only: bool = False) -> None:
    """Open a store, which may raise, and close it."""

    async def main() -> None:
        await (await SQLiteStore.open(path, read_only=read_only)).close()

    asyncio.run(main())


def make_store(path: Path) -> None:
    """Write a store with one rollout and one span."""

    async def main() -> None:
        async with await SQLiteStore.open(path) as store:
            await store.add_rollouts([a_rollout(attempt=1)])
            await store.add_records([a_span(span_id="kept")])

    asyncio.run(main())


def edit(path: Path, statement: str, *parameters: object) -> None:
    """Change the file behind the store's back."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement, parameters)
    connection.close()


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_OPEN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match=rf"open for writing by process {holder.pid}.*read_only=True"):
            open_and_close(path)

        async def look() -> list[int]:
            assert holder.stdin is not None and holder.stdout is not None
            async with await SQLiteStore.open(path, read_only=True) as reader:
                before = len(await reader.rollouts())
                holder.stdin.write("rollout-2\n")
                holder.stdin.flush()
                await asyncio.to_thread(holder.stdout.readline)
                return [before, len(await reader.rollouts())]

        assert asyncio.run(look()) == [1, 2]
        holder.stdin.close()
        assert holder.wait(20) == 0
    open_and_close(path)  # the lock went with its process


def test_one_process_cannot_open_a_store_twice_for_writing(tmp_path: Path) -> None:
    async def main() -> None:
        async with await SQLiteStore.open(tmp_path / "store.db"):
            with pytest.raises(StoreError, match="by this process"):
                await SQLiteStore.open(tmp_path / "store.db")
        await (await SQLiteStore.open(tmp_path / "store.db")).close()

    asyncio.run(main())


def test_a_reader_follows_the_stream_of_a_writer(tmp_path: Path) -> None:
    async def main() -> object:
        async with await SQLiteStore.open(tmp_path / "store.db") as writer:
            async with await SQLiteStore.open(tmp_path / "store.db", read_only=True) as reader:
                following = asyncio.ensure_future(anext(reader.stream()))
                await asyncio.sleep(0.05)
                await writer.add_records([a_span(span_id="new")])
                _, record = await asyncio.wait_for(following, 10)
                return record

    assert getattr(asyncio.run(main()), "span_id", None) == "new"


def test_a_read_only_store_refuses_to_write_and_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_store(path)
    (tmp_path / "store.db.lock").unlink()

    async def main() -> None:
        async with await SQLiteStore.open(path, read_only=True) as store:
            with pytest.raises(StoreError, match="read_only=True"):
                await store.add_records([a_span()])

    asyncio.run(main())
    assert not (tmp_path / "store.db.lock").exists()


def test_a_clean_close_leaves_one_file_with_everything(tmp_path: Path) -> None:
    make_store(tmp_path / "store.db")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.db", "store.db.lock"]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes " * 200)
    with pytest.raises(StoreError, match=r"notes\.txt' is damaged or no Leyden store"):
        open_and_close(path, read_only=read_only)
    assert path.read_text() == "my notes " * 200
    open_and_close(tmp_path / "store.db")  # the refusal holds nothing that would block another store


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bank.db"
    edit(path, "CREATE TABLE accounts (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"bank\.db' is a database of another program"):
        open_and_close(path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_store(path)
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    path.write_bytes(bytes(damaged))

    async def main() -> None:
        async with await SQLiteStore.open(path, read_only=True) as store:
            await store.records(["rollout-1"])

    with pytest.raises(StoreError, match=r"store\.db' is damaged"):
        asyncio.run(main())


def test_a_missing_file_is_not_made_by_looking_at_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no store at .*store\.db"):
        open_and_close(tmp_path / "store.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"missing/store\.db"):
        open_and_close(tmp_path / "missing" / "store.db")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_of_a_newer_version_is_refused(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "store.db"
    make_store(path)
    edit(path, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreError, match=rf"store schema {len(MIGRATIONS) + 1} .* upgrade"):
        open_and_close(path, read_only=read_only)


NEWER = SCHEMA_VERSION + 1


@pytest.mark.parametrize(
    "body",
    [{"type": "span", "schema": NEWER, "renamed_field": 1}, msgspec.to_builtins(a_span(schema=NEWER))],
    ids=["unreadable", "readable"],
)
def test_a_record_of_a_newer_version_is_refused_when_it_is_read(tmp_path: Path, body: object) -> None:
    path = tmp_path / "store.db"
    make_store(path)
    edit(path, "UPDATE records SET body = ?", msgspec.msgpack.encode(body))

    async def main() -> None:
        async with await SQLiteStore.open(path, read_only=True) as store:
            await store.records(["rollout-1"])

    with pytest.raises(StoreError, match=rf"record 1.* schema {NEWER}.*upgrade"):
        asyncio.run(main())


def test_a_rollout_of_a_newer_version_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_store(path)
    edit(path, "UPDATE rollouts SET schema = ?", NEWER)

    async def main() -> None:
        async with await SQLiteStore.open(path, read_only=True) as store:
            await store.rollouts()

    with pytest.raises(StoreError, match=rf"rollout 'rollout-1': .* schema {NEWER}.*upgrade"):
        asyncio.run(main())


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_store(path)
    edit(path, "UPDATE records SET body = ?", b"\xc1")

    async def main() -> None:
        async with await SQLiteStore.open(path, read_only=True) as store:
            await store.records(["rollout-1"])

    with pytest.raises(StoreError, match="record 1 is damaged"):
        asyncio.run(main())


def test_a_missing_base_of_a_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def write() -> None:
        async with await SQLiteStore.open(path) as store:
            await store.add_rollouts([a_rollout(attempt=1)])
            await store.add_records([a_completion(span_id="first", prompt=range(9))])
            await store.add_records([a_completion(span_id="second", prompt=range(12))])

    async def read() -> None:
        async with await SQLiteStore.open(path, read_only=True) as store:
            await store.records(["rollout-1"])

    asyncio.run(write())
    edit(path, "DELETE FROM records WHERE key = 'cfirst/0'")
    with pytest.raises(StoreError, match="completion 'first/0' of rollout 'rollout-1' is missing"):
        asyncio.run(read())


def test_a_store_of_an_older_schema_is_brought_up_to_date_with_its_records(tmp_path: Path) -> None:
    path, old = tmp_path / "store.db", tmp_path / "old.db"
    make_store(path)
    connection = sqlite3.connect(old, isolation_level=None)
    migrate(connection, old, MIGRATIONS[:1])
    connection.execute(f"ATTACH '{path}' AS new")
    for table in ("rollouts", "records"):
        connection.execute(f"INSERT INTO main.{table} SELECT * FROM new.{table}")
    connection.close()

    with pytest.raises(StoreError, match=r"store schema 1 .* open it once for writing"):
        open_and_close(old, read_only=True)

    async def main() -> list[object]:
        async with await SQLiteStore.open(old) as store:
            [records] = await store.records(["rollout-1"])
            assert await store.next_version("policy") == 1
            return [unnumbered(span) for span in records.spans]

    assert asyncio.run(main()) == [a_span(span_id="kept")]
    open_and_close(old, read_only=True)


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path, MIGRATIONS)

    def fails_halfway(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        migrate(connection, path, [*MIGRATIONS, fails_halfway])
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    connection.close()


def test_a_migration_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, runs = tmp_path / "store.db", []
    make_store(path)
    add: Callable[[sqlite3.Connection], None] = lambda c: runs.append(c.execute("CREATE TABLE more (x)"))  # noqa: E731
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", [*MIGRATIONS, add])
    open_and_close(path)
    open_and_close(path)
    assert len(runs) == 1


def test_a_store_says_what_it_is_in_its_header(tmp_path: Path) -> None:
    make_store(tmp_path / "store.db")
    assert (tmp_path / "store.db").read_bytes()[68:72] == APPLICATION_ID.to_bytes(4, "big") == b"LEYD"


@pytest.mark.parametrize(("synchronous", "level"), [("normal", 1), ("full", 2)])
def test_the_store_syncs_as_asked(tmp_path: Path, synchronous: sqlite_file.Synchronous, level: int) -> None:
    connection = sqlite_file.open_for_writing(tmp_path / "store.db", synchronous)
    assert connection.execute("PRAGMA synchronous").fetchone() == (level,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
