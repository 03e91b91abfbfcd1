"""The databases and the reward: nothing but reading, errors as text, right on every instance."""

import sqlite3
import time
from pathlib import Path

import pytest

from examples.text_to_sql import databases
from examples.text_to_sql.reward import is_correct, reward

GOLD = "SELECT COUNT(*) FROM singer WHERE age > 30"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM singer",
        "DROP TABLE singer",
        "INSERT INTO singer (name) VALUES ('Eve')",
        "CREATE TEMP TABLE loot AS SELECT * FROM singer",
        "ATTACH DATABASE '/tmp/loot.sqlite' AS loot",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('loot')",
        "SELECT 1; DROP TABLE singer",
    ],
)
def test_a_query_can_only_read(sql: str) -> None:
    file = databases.path("music")
    before = file.read_bytes()

    result = databases.query(file, sql)

    assert result.error
    assert result.rows == ()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "SELEC name",
        "SELECT nothing FROM singer",
        "SELECT MEAN(age) FROM singer",
        "\x00",
        "SELECT '\ud800'",
    ],
)
def test_a_malformed_query_is_an_error_text_or_empty(sql: str) -> None:
    result = databases.query(databases.path("music"), sql)

    assert result.rows == ()
    assert result.error or not sql


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT COUNT(*) FROM concert a, concert b, concert c, concert d, concert e, concert f",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "SELECT length(zeroblob(900000000))",
    ],
)
def test_a_runaway_query_is_stopped(sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "QUERY_SECONDS", 0.2)
    since = time.monotonic()

    result = databases.query(databases.path("music"), sql)

    assert result.error
    assert time.monotonic() - since < 2


def test_a_missing_file_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no database file"):
        databases.query(tmp_path / "none.sqlite", "SELECT 1")

    assert list(tmp_path.iterdir()) == []


def test_the_schema_is_read_from_the_file() -> None:
    assert databases.schema(databases.path("music")) == (
        "singer(id, name, country, age, fans)\nconcert(id, singer_id, city, year, crowd)"
    )


def test_instances_share_the_schema_and_differ_in_rows() -> None:
    first, second = databases.path("sport", 0), databases.path("sport", 1)

    assert databases.schema(first) == databases.schema(second)
    assert databases.query(first, "SELECT * FROM team") != databases.query(second, "SELECT * FROM team")


def test_every_word_of_the_new_database_is_known_from_the_others() -> None:
    def words(names: set[str]) -> set[str]:
        tables = [table for name in names for table in databases.DATABASES[name].tables]
        return {word for table in tables for word in (table.name, *table.columns) if not word.endswith("_id")}

    new = {databases.NEW_DATABASE}

    assert words(new) <= words(set(databases.DATABASES) - new)


def test_the_reward_wants_the_rows_of_the_gold_query() -> None:
    task = {"database": "music", "gold_sql": GOLD}

    assert reward(task, "SELECT COUNT(id) FROM singer WHERE age >= 31") == 1.0
    assert reward(task, "SELECT COUNT(*) FROM singer") == 0.0
    assert reward(task, "SELECT COUNT(*) FROM singer WHERE age => 30") == 0.0
    assert reward(task, "") == reward(task, None) == 0.0


def test_a_query_that_is_right_on_the_live_instance_alone_is_wrong() -> None:
    (count,) = databases.query(databases.path("music"), GOLD).rows[0]
    lucky = f"SELECT {count}"

    assert databases.query(databases.path("music"), lucky) == databases.query(databases.path("music"), GOLD)
    assert not is_correct("music", lucky, GOLD)


def test_order_matters_only_where_the_question_asks_for_it() -> None:
    ordered = "SELECT name FROM singer ORDER BY age DESC LIMIT 2"

    assert is_correct("music", "SELECT name FROM singer ORDER BY name DESC", "SELECT name FROM singer")
    assert not is_correct("music", f"SELECT * FROM ({ordered}) ORDER BY name", ordered) or not is_correct(
        "music", f"SELECT * FROM ({ordered}) ORDER BY name DESC", ordered
    )


def test_a_gold_query_that_fails_is_an_exception() -> None:
    with pytest.raises(ValueError, match="gold query 'SELECT nothing' fails on 'music'"):
        is_correct("music", "SELECT 1", "SELECT nothing")


def test_the_files_are_sqlite_databases_that_other_processes_can_open() -> None:
    with sqlite3.connect(databases.path("library")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM author").fetchone() == (databases.PARENT_ROWS,)
