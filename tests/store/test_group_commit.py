"""Callers that wait together share a commit, and one that fails fails alone."""

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from leyden.errors import StoreError
from leyden.sqlite import SQLiteStore
from leyden.sqlite.writer import GroupWriter
from leyden.testing.records import a_completion, a_reward, a_rollout, a_span, an_update


def writer_of(path: Path) -> tuple[GroupWriter, list[str]]:
    """Return a writer and the statements it will run."""
    statements: list[str] = []
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("CREATE TABLE kept (x INTEGER)")
    connection.set_trace_callback(statements.append)
    return GroupWriter(connection, path), statements


def keep(connection: sqlite3.Connection, payloads: Sequence[object]) -> Sequence[object]:
    """Insert each payload; answer with it."""
    connection.executemany("INSERT INTO kept VALUES (?)", [(payload,) for payload in payloads])
    return list(payloads)


def test_callers_that_wait_together_share_commits(tmp_path: Path) -> None:
    writer, statements = writer_of(tmp_path / "x.db")

    async def main() -> list[object]:
        return await asyncio.gather(*(writer.submit(keep, number) for number in range(500)))

    assert asyncio.run(main()) == list(range(500))
    writer.close()
    assert statements.count("COMMIT") < 50
    assert sum(statement.startswith("INSERT") for statement in statements) == 500


def test_work_that_raises_is_undone_and_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    writer, _ = writer_of(path)

    def fails(connection: sqlite3.Connection, payloads: Sequence[object]) -> Sequence[object]:
        keep(connection, payloads)
        raise StoreError("no")

    async def main() -> list[object]:
        works = [writer.submit(keep, 1), writer.submit(fails, 2), writer.submit(keep, 3)]
        return await asyncio.gather(*works, return_exceptions=True)

    first, second, third = asyncio.run(main())
    writer.close()
    assert (first, third) == (1, 3)
    assert isinstance(second, StoreError)
    assert sqlite3.connect(path).execute("SELECT x FROM kept ORDER BY x").fetchall() == [(1,), (3,)]


def test_closing_commits_what_waits_and_refuses_what_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    writer, _ = writer_of(path)

    async def main() -> None:
        waiting = [asyncio.ensure_future(writer.submit(keep, number)) for number in range(20)]
        await asyncio.sleep(0)
        await asyncio.to_thread(writer.close)
        assert await asyncio.gather(*waiting) == list(range(20))
        with pytest.raises(StoreError, match="closed"):
            await writer.submit(keep, 99)

    asyncio.run(main())
    assert sqlite3.connect(path).execute("SELECT count(*) FROM kept").fetchone() == (20,)


def test_several_event_loops_write_one_store(tmp_path: Path) -> None:
    async def main() -> int:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_rollouts([a_rollout(attempt=1)])

            def other_loop() -> None:
                asyncio.run(store.add_records([a_span()]))

            threads = [threading.Thread(target=other_loop) for _ in range(5)]
            for thread in threads:
                thread.start()
            await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
            [records] = await store.records(["rollout-1"])
            return len(records.spans)

    assert asyncio.run(main()) == 5


def test_a_refused_update_undoes_nothing_of_its_neighbours(tmp_path: Path) -> None:
    async def main() -> tuple[list[object], int, int]:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_rollouts([a_rollout(attempt=1)])
            answers = await asyncio.gather(
                store.add_records([a_span()]),
                store.add_updates([an_update(["a"]), an_update(["b", "b"])]),
                store.add_records([a_completion(), a_reward()]),
                store.next_version("p"),
                return_exceptions=True,
            )
            [records] = await store.records(["rollout-1"])
            return list(answers), len(records.spans) + len(records.completions), len(await store.updates())

    answers, records, updates = asyncio.run(main())
    assert [type(answer) for answer in answers] == [type(None), StoreError, type(None), int]
    assert (records, updates) == (2, 0)


def test_records_written_one_by_one_keep_the_order_of_their_caller(tmp_path: Path) -> None:
    async def main() -> list[str]:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_rollouts([a_rollout(attempt=1)])
            calls = [store.add_records([a_span(name=str(number))]) for number in range(200)]
            await asyncio.gather(*calls)
            [records] = await store.records(["rollout-1"])
            return [span.name for span in records.spans]

    assert asyncio.run(main()) == [str(number) for number in range(200)]


def test_a_completion_undone_with_its_batch_is_never_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fails after its prompts were packed must leave nothing behind in memory."""

    async def main() -> list[int]:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_rollouts([a_rollout(attempt=1)])
            poison = a_span(attempt=None)  # NOT NULL in the schema: the insert itself fails
            with pytest.raises(StoreError, match=r"store\.db' refused a write: NOT NULL"):
                await store.add_records([a_completion(prompt=range(20)), poison])
            await store.add_records([a_completion(prompt=range(25))])
            [records] = await store.records(["rollout-1"])
            return [len(completion.prompt_token_ids) for completion in records.completions]

    assert asyncio.run(main()) == [25]
