"""The demo's SQLite databases: their schemas, their contents, and reading them safely.

Every database exists as several instances with the same schema and different rows. The agent works on the
live one (instance 0); the reward compares on all of them, so a query that is right by luck is not right.

The trap: queries come from a language model. `query` opens the file read-only, allows nothing but reading
tables and calling harmless functions, and stops a query that runs too long.
"""

import functools
import os
import random
import sqlite3
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

INSTANCES = 2
"""Instances of each database; instance 0 is the live one."""

PARENT_ROWS = 24
CHILD_ROWS = 60
MAX_ROWS = 200
"""Rows of a result that are kept; a longer result is cut here."""

QUERY_SECONDS = 2.0
"""How long one query may run before it is stopped."""

NAMES = (
    "Alice", "Bruno", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karen", "Leo",
    "Maria", "Nina", "Oscar", "Paula", "Quinn", "Rosa", "Simon", "Tara", "Umar", "Vera", "Walter",
    "Xenia", "Yusuf", "Zoe", "Adam", "Bella", "Cesar", "Diana",
)  # fmt: skip

CATEGORIES: dict[str, tuple[str, ...]] = {
    "country": ("France", "Spain", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway"),
    "city": ("Paris", "Madrid", "Tokyo", "Rio", "Nairobi", "Toronto", "Delhi", "Oslo"),
    "job": ("clerk", "engineer", "manager", "driver", "analyst"),
    "product": ("lamp", "chair", "phone", "desk", "camera"),
    "genre": ("drama", "crime", "poetry", "travel", "history"),
    "position": ("keeper", "defender", "striker", "winger"),
}
"""The values of each text column but `name`."""

NUMBERS: dict[str, range] = {
    "age": range(20, 61),
    "fans": range(100, 901, 10),
    "year": range(2010, 2025),
    "crowd": range(100, 901, 50),
    "budget": range(100, 901, 20),
    "floor": range(1, 10),
    "salary": range(30, 91, 2),
    "points": range(0, 91, 3),
    "price": range(5, 81, 5),
    "awards": range(0, 13),
    "pages": range(80, 601, 20),
    "wins": range(0, 41),
    "titles": range(0, 13),
    "goals": range(0, 31),
}
"""The values of each integer column."""

READ_ACTIONS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ})
FUNCTIONS = frozenset(
    {
        "avg",
        "count",
        "sum",
        "total",
        "min",
        "max",
        "abs",
        "round",
        "length",
        "lower",
        "upper",
        "coalesce",
        "like",
    }
)
"""The only SQL functions a query may call; none can allocate much memory or touch a file."""


@dataclass(frozen=True)
class Table:
    """A table with an integer key `id` and these further columns."""

    name: str
    columns: tuple[str, ...]

    @property
    def categories(self) -> list[str]:
        return [column for column in self.columns if column in CATEGORIES]

    @property
    def numbers(self) -> list[str]:
        return [column for column in self.columns if column in NUMBERS]


@dataclass(frozen=True)
class Database:
    """A parent table, whose rows have names, and a child table that refers to it."""

    name: str
    parent: Table
    child: Table

    @property
    def tables(self) -> tuple[Table, Table]:
        return self.parent, self.child

    @property
    def foreign_key(self) -> str:
        return self.child.columns[0]


def declare(name: str, parent: str, child: str) -> Database:
    """Build a database from `table column column ...` lines."""
    tables = [Table(line.split()[0], tuple(line.split()[1:])) for line in (parent, child)]
    return Database(name, tables[0], tables[1])


DATABASES: dict[str, Database] = {
    database.name: database
    for database in (
        declare("music", "singer name country age fans", "concert singer_id city year crowd"),
        declare("company", "department name city budget floor", "employee department_id job salary age"),
        declare("shop", "customer name city age points", "purchase customer_id product price year"),
        declare("library", "author name country age awards", "book author_id genre pages year"),
        declare("sport", "team name city wins titles", "player team_id position goals age"),
        declare("tour", "team name country fans budget", "concert team_id city price year"),
    )
}

NEW_DATABASE = "tour"
"""Asked about only in the final bucket. Its words are known from the others, their combination is new."""


@dataclass(frozen=True)
class Result:
    """What a query returned: rows, or the text of SQLite's error."""

    rows: tuple[tuple[object, ...], ...]
    error: str | None = None


def path(name: str, instance: int = 0) -> Path:
    """Return the SQLite file of one instance, written on the first use.

    Raises:
        KeyError: no such database.
    """
    database = DATABASES[name]
    folder = Path(tempfile.gettempdir()) / f"text_to_sql-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    file = folder / f"{name}-{instance}.sqlite"
    return write(database, instance, file)


@functools.cache
def write(database: Database, instance: int, file: Path) -> Path:
    """Write one instance afresh, once a process; other processes never see half a file."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, suffix=".draft")
    os.close(handle)
    connection = sqlite3.connect(draft)
    try:
        fill(connection, database, random.Random(f"{database.name}-{instance}"))
        connection.commit()
    finally:
        connection.close()
    os.replace(draft, file)
    return file


def fill(connection: sqlite3.Connection, database: Database, rng: random.Random) -> None:
    """Create both tables and draw their rows."""
    names = rng.sample(NAMES, PARENT_ROWS)
    for table, count in ((database.parent, PARENT_ROWS), (database.child, CHILD_ROWS)):
        columns = ", ".join(f"{column} {column_type(column)}" for column in table.columns)
        connection.execute(f"CREATE TABLE {table.name} (id INTEGER PRIMARY KEY, {columns})")
        marks = ", ".join("?" * (1 + len(table.columns)))
        for row in range(count):
            values = [draw_value(column, names[row % PARENT_ROWS], rng) for column in table.columns]
            connection.execute(f"INSERT INTO {table.name} VALUES ({marks})", [row + 1, *values])


def column_type(column: str) -> str:
    """Return the SQL type of a column; every number and foreign key is an integer."""
    return "TEXT" if column == "name" or column in CATEGORIES else "INTEGER"


def draw_value(column: str, name: str, rng: random.Random) -> str | int:
    """Draw the value of one column; `name` is the row's own name."""
    if column == "name":
        return name
    if column in CATEGORIES:
        return rng.choice(CATEGORIES[column])
    if column in NUMBERS:
        return rng.choice(NUMBERS[column])
    return rng.randint(1, PARENT_ROWS)


def allow(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Decide for SQLite's authorizer: reading and harmless functions only."""
    if action in READ_ACTIONS or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def query(file: str | Path, sql: str) -> Result:
    """Run one SELECT on a database file; whatever is wrong with the query becomes `error`.

    Raises:
        FileNotFoundError: there is no such database file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no database file {str(file)!r}; databases.path(name) writes one")
    deadline = time.monotonic() + QUERY_SECONDS
    connection = sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=ro", uri=True)
    try:
        connection.set_authorizer(allow)
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        return Result(tuple(connection.execute(sql).fetchmany(MAX_ROWS)))
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return Result((), str(error) or type(error).__name__)
    finally:
        connection.close()


def schema(file: str | Path) -> str:
    """Describe the tables of a database file, one `table(column, ...)` a line."""
    connection = sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=ro", uri=True)
    try:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        columns = {table: [row[1] for row in connection.execute(f"PRAGMA table_info({table})")] for (table,) in tables}
    finally:
        connection.close()
    return "\n".join(f"{table}({', '.join(names)})" for table, names in columns.items())
