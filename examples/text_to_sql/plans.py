"""Query plans: the parts of a SELECT, so that a demonstration can get one part wrong, and their SQL."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A selected or ordering expression: a column, perhaps inside a function."""

    column: str
    function: str | None = None
    distinct: bool = False

    @property
    def sql(self) -> str:
        inner = f"DISTINCT {self.column}" if self.distinct else self.column
        return f"{self.function}({inner})" if self.function else inner


@dataclass(frozen=True)
class Condition:
    """One comparison of the WHERE clause."""

    column: str
    operator: str
    value: str
    """As it stands in SQL: text values keep their quotes."""

    @property
    def sql(self) -> str:
        return f"{self.column} {self.operator} {self.value}"


@dataclass(frozen=True)
class Join:
    """A second table and the two columns that must be equal."""

    table: str
    left: str
    right: str

    @property
    def sql(self) -> str:
        return f"JOIN {self.table} ON {self.left} = {self.right}"


@dataclass(frozen=True)
class Plan:
    """A SELECT."""

    table: str
    select: tuple[Term, ...]
    join: Join | None = None
    where: tuple[Condition, ...] = ()
    group: str | None = None
    order: Term | None = None
    direction: str = "ASC"
    limit: int | None = None
    spells_limit_as_top: bool = False
    """Write `SELECT TOP n`, as another dialect does; SQLite refuses it."""


def render(plan: Plan) -> str:
    """Write the plan as SQL."""
    top = f"TOP {plan.limit} " if plan.limit and plan.spells_limit_as_top else ""
    parts = [f"SELECT {top}{', '.join(term.sql for term in plan.select)} FROM {plan.table}"]
    if plan.join:
        parts.append(plan.join.sql)
    if plan.where:
        parts.append("WHERE " + " AND ".join(condition.sql for condition in plan.where))
    if plan.group:
        parts.append(f"GROUP BY {plan.group}")
    if plan.order:
        parts.append(f"ORDER BY {plan.order.sql} {plan.direction}")
    if plan.limit and not top:
        parts.append(f"LIMIT {plan.limit}")
    return " ".join(parts)
