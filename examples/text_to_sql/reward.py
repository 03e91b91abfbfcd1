"""The reward: 1.0 for a query with the same rows as the gold query, on every instance of the database."""

from collections.abc import Mapping

from examples.text_to_sql.databases import INSTANCES, Result, path, query


def comparable(result: Result, *, ordered: bool) -> list[tuple[object, ...]]:
    """Return rows for comparison: floats rounded, sorted where the order carries no meaning."""
    rows = [tuple(round(cell, 4) if isinstance(cell, float) else cell for cell in row) for row in result.rows]
    return rows if ordered else sorted(rows, key=repr)


def is_correct(database: str, sql: str, gold_sql: str) -> bool:
    """Tell whether `sql` returns the rows of `gold_sql` on every instance of the database.

    Raises:
        ValueError: the gold query itself fails.
    """
    ordered = "ORDER BY" in gold_sql
    for instance in range(INSTANCES):
        file = path(database, instance)
        gold, answer = query(file, gold_sql), query(file, sql)
        if gold.error is not None:
            raise ValueError(f"gold query {gold_sql!r} fails on {database!r}: {gold.error}")
        if answer.error is not None:
            return False
        if comparable(answer, ordered=ordered) != comparable(gold, ordered=ordered):
            return False
    return True


def reward(task: Mapping[str, str], sql: str | None) -> float:
    """Score the query that an agent ended with; an agent without one scores 0."""
    return float(bool(sql) and is_correct(task["database"], str(sql), task["gold_sql"]))
