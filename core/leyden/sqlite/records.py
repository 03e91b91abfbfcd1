"""Keep spans, completions and rewards in the `records` table.

One idea: all three are rows of one table with one counter, so a single number is the order of arrival and the
cursor of the stream. One trap: a completion may be packed only against one that is really stored, so copies are
sorted out before anything is packed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from leyden.errors import RewardError, StoreError
from leyden.spans import Completion, Record, Reward
from leyden.sqlite.codec import EncodedRecord, RecordCodec
from leyden.sqlite.packing import PackedTokens, PromptIndex, PromptReader

_Key = tuple[str, int, str]

_ROWS_A_STATEMENT = (256, 32, 4, 1)
"""Statements of few sizes stay prepared; one statement of many rows costs one turn at the interpreter lock."""


class RecordWriter:
    """Inserts records; lives in the writer's thread."""

    def __init__(self, connection: sqlite3.Connection, codec: RecordCodec) -> None:
        self._codec = codec
        self._index = PromptIndex()
        (last,) = connection.execute("SELECT coalesce(max(sequence), 0) FROM records").fetchone()
        self._sequence: int = last

    def insert(self, connection: sqlite3.Connection, payloads: Sequence[object]) -> Sequence[object]:
        """Store the records of several callers; return `None` or a `RewardError` each.

        A conflicting reward costs only itself: the other records of its call are stored.
        """
        calls = cast("Sequence[Sequence[EncodedRecord]]", payloads)
        try:
            known = self._stored_rewards(connection, [record for call in calls for record in call])
            fresh: dict[_Key, EncodedRecord] = {}
            results = [self._sort_out(call, known, fresh) for call in calls]
            self._insert_rows(connection, fresh.values())
        except BaseException:
            # The transaction will be undone, and the index must not know what is not stored.
            self._index = PromptIndex()
            raise
        return results

    def forget(self, rollout_id: str, attempt: int) -> None:
        """Drop what is remembered of a finished attempt."""
        self._index.forget(rollout_id, attempt)

    def _stored_rewards(
        self, connection: sqlite3.Connection, records: Sequence[EncodedRecord]
    ) -> Mapping[_Key, float | None]:
        """Return the keys that are stored already, with the value of those that are rewards."""
        known: dict[_Key, float | None] = {}
        for chunk in _chunks(records):
            marks = ",".join(["(?,?,?)"] * len(chunk))
            query = (
                "SELECT r.rollout_id, r.attempt, r.key, CASE WHEN substr(r.key, 1, 1) = 'r' THEN r.body END "
                f"FROM (VALUES {marks}) AS asked JOIN records AS r "
                "ON r.rollout_id = asked.column1 AND r.attempt = asked.column2 AND r.key = asked.column3"
            )
            keys = [field for record in chunk for field in (record.rollout_id, record.attempt, record.key)]
            for rollout_id, attempt, key, body in connection.execute(query, keys):
                reward = None if body is None else cast(Reward, self._codec.decode_record(body, 0)).value
                known[(rollout_id, attempt, key)] = reward
        return known

    def _sort_out(
        self,
        call: Sequence[EncodedRecord],
        known: Mapping[_Key, float | None],
        fresh: dict[_Key, EncodedRecord],
    ) -> RewardError | None:
        """Add the call's new records to `fresh`; return the first conflict between rewards."""
        conflict: RewardError | None = None
        for record in call:
            key = (record.rollout_id, record.attempt, record.key)
            if key in known:
                earlier = known[key]
            elif key in fresh:
                earlier = fresh[key].reward
            else:
                fresh[key] = record
                continue
            if record.reward is not None and earlier != record.reward and conflict is None:
                conflict = RewardError(
                    f"rollout {record.rollout_id!r} already has reward {record.key[1:]} with value {earlier!r}, now "
                    f"{record.reward!r}; give each reward once, or tell several apart by `index`"
                )
        return conflict

    def _insert_rows(self, connection: sqlite3.Connection, records: Iterable[EncodedRecord]) -> None:
        for chunk in _chunks(list(records)):
            values: list[object] = []
            for record in chunk:
                self._sequence += 1
                tokens = None
                if record.numbers is not None:
                    packed = self._index.pack(record.rollout_id, record.attempt, record.key, record.numbers)
                    tokens = self._codec.encode_tokens(packed)
                values += (self._sequence, record.rollout_id, record.attempt, record.key, record.body, tokens)
            marks = ",".join(["(?,?,?,?,?,?)"] * len(chunk))
            connection.execute(f"INSERT INTO records VALUES {marks}", values)


class RecordReader:
    """Reads records; lives in the reader's thread."""

    def __init__(self, connection: sqlite3.Connection, codec: RecordCodec) -> None:
        self._connection = connection
        self._codec = codec

    def of_rollouts(self, rollout_ids: Sequence[str], *, is_late: bool = False) -> Mapping[str, list[Record]]:
        """Return the records of the latest attempt of each rollout, or of all the others, in store order."""
        found: dict[str, list[Record]] = {rollout_id: [] for rollout_id in rollout_ids}
        query = (
            "SELECT r.sequence, r.body, r.tokens FROM records AS r JOIN rollouts AS o USING (rollout_id) "
            f"WHERE r.rollout_id = ? AND r.attempt {'!=' if is_late else '='} o.attempt ORDER BY r.sequence"
        )
        for rollout_id, records in found.items():
            records.extend(self._decode(self._connection.execute(query, (rollout_id,)).fetchall()))
        return found

    def after(self, cursor: int, limit: int) -> list[tuple[int, Record]]:
        """Return at most `limit` records with a sequence above `cursor`."""
        query = "SELECT sequence, body, tokens FROM records WHERE sequence > ? ORDER BY sequence LIMIT ?"
        rows = self._connection.execute(query, (cursor, limit)).fetchall()
        return [(row[0], record) for row, record in zip(rows, self._decode(rows), strict=True)]

    def _decode(self, rows: Sequence[tuple[int, bytes, bytes | None]]) -> Iterator[Record]:
        prompts = PromptReader(self._packed_tokens)
        for sequence, body, tokens in rows:
            record = self._codec.decode_record(body, sequence)
            if isinstance(record, Completion) and tokens is not None:
                prompts.fill(record, self._codec.decode_tokens(tokens))
            yield record

    def _packed_tokens(self, rollout_id: str, attempt: int, key: str) -> PackedTokens:
        query = "SELECT tokens FROM records WHERE rollout_id = ? AND attempt = ? AND key = ?"
        row = self._connection.execute(query, (rollout_id, attempt, key)).fetchone()
        if row is None:
            raise StoreError(
                f"completion {key[1:]!r} of rollout {rollout_id!r} is missing, and later prompts are stored "
                "relative to it: the file was changed by hand or is damaged; restore a copy"
            )
        return self._codec.decode_tokens(row[0])


def _chunks(records: Sequence[EncodedRecord]) -> Iterator[Sequence[EncodedRecord]]:
    """Cut into pieces of a few fixed sizes."""
    start = 0
    for size in _ROWS_A_STATEMENT:
        while len(records) - start >= size:
            yield records[start : start + size]
            start += size
