"""The kinds of question: each template draws a wording, the plan that answers it, and what makes it unique.

A template's `parts` name everything that its query depends on (table, columns, operator, values), and nothing
of the wording: two questions with equal parts have the same query.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.text_to_sql.databases import CATEGORIES, Database, Table, path, query
from examples.text_to_sql.plans import Condition, Join, Plan, Term

OPERATORS = {
    ">": ("more than", "above", "over"),
    ">=": ("at least", "no less than"),
    "<": ("less than", "below", "under"),
    "<=": ("at most", "no more than"),
}
FUNCTIONS = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "combined"),
    "MAX": ("highest", "largest"),
    "MIN": ("lowest", "smallest"),
}
GROUP_FUNCTIONS = {"AVG": "average", "SUM": "total", "MAX": "maximum", "MIN": "minimum"}
DIRECTIONS = {"DESC": ("highest", "largest"), "ASC": ("lowest", "smallest")}

NAME = Term("name")
COUNT = Term("*", "COUNT")


@dataclass(frozen=True)
class Draft:
    """A question before it has a place in a bucket."""

    text: str
    plan: Plan
    parts: tuple[str, ...]


@functools.cache
def live_values(database: str, table: str, column: str) -> list[str]:
    """Return the values of a column in the live database, smallest first."""
    result = query(path(database), f"SELECT DISTINCT {column} FROM {table} ORDER BY {column}")
    return [str(value) for (value,) in result.rows]


class Draw:
    """Draws the pieces of one question on one database."""

    def __init__(self, rng: random.Random, database: Database) -> None:
        self.rng = rng
        self.database = database

    def one(self, *options: str) -> str:
        return self.rng.choice(options)

    def table(self) -> Table:
        return self.rng.choice(self.database.tables)

    def number(self, table: Table) -> str:
        return self.rng.choice(table.numbers)

    def function(self) -> tuple[str, str]:
        """Return an aggregate function and a word for it."""
        name = self.rng.choice(list(FUNCTIONS))
        return name, self.one(*FUNCTIONS[name])

    def direction(self) -> tuple[str, str]:
        """Return a sort direction and a word for it."""
        name = self.rng.choice(list(DIRECTIONS))
        return name, self.one(*DIRECTIONS[name])

    def category(self, table: Table) -> tuple[str, str, Condition]:
        """Return a text column, one of its values, and the condition that they are equal."""
        column = self.rng.choice(table.categories)
        value = self.one(*CATEGORIES[column])
        return column, value, Condition(column, "=", f"'{value}'")

    def comparison(self, table: Table) -> tuple[str, str, Condition]:
        """Return a number column, a wording of a comparison with a value that occurs, and the condition."""
        column = self.number(table)
        operator = self.rng.choice(list(OPERATORS))
        value = self.rng.choice(live_values(self.database.name, table.name, column)[1:-1])
        return column, f"{self.one(*OPERATORS[operator])} {value}", Condition(column, operator, value)


def filter_category(draw: Draw) -> Draft:
    table = draw.database.parent
    column, value, condition = draw.category(table)
    text = draw.one(
        f"List the names of {table.name}s with {column} {value}.",
        f"Which {table.name}s have {column} {value}?",
        f"Name the {table.name}s whose {column} is {value}.",
    )
    return Draft(text, Plan(table.name, (NAME,), where=(condition,)), (table.name, condition.sql))


def filter_number(draw: Draw) -> Draft:
    table = draw.database.parent
    column, words, condition = draw.comparison(table)
    text = draw.one(
        f"List the names of {table.name}s with {column} {words}.",
        f"Which {table.name}s have {column} {words}?",
        f"Name the {table.name}s whose {column} is {words}.",
    )
    return Draft(text, Plan(table.name, (NAME,), where=(condition,)), (table.name, condition.sql))


def count_category(draw: Draw) -> Draft:
    table = draw.table()
    column, value, condition = draw.category(table)
    text = draw.one(f"How many {table.name}s have {column} {value}?", f"Count the {table.name}s with {column} {value}.")
    return Draft(text, Plan(table.name, (COUNT,), where=(condition,)), (table.name, condition.sql))


def count_number(draw: Draw) -> Draft:
    table = draw.table()
    column, words, condition = draw.comparison(table)
    text = draw.one(f"How many {table.name}s have {column} {words}?", f"Count the {table.name}s with {column} {words}.")
    return Draft(text, Plan(table.name, (COUNT,), where=(condition,)), (table.name, condition.sql))


def aggregate(draw: Draw) -> Draft:
    table = draw.table()
    column, (function, word) = draw.number(table), draw.function()
    term = Term(column, function)
    text = draw.one(
        f"What is the {word} {column} of all {table.name}s?", f"Give the {word} {column} over {table.name}s."
    )
    return Draft(text, Plan(table.name, (term,)), (table.name, term.sql))


def aggregate_category(draw: Draw) -> Draft:
    table = draw.table()
    column, (function, word) = draw.number(table), draw.function()
    key, value, condition = draw.category(table)
    term = Term(column, function)
    text = draw.one(
        f"What is the {word} {column} of {table.name}s with {key} {value}?",
        f"Give the {word} {column} over {table.name}s whose {key} is {value}.",
    )
    return Draft(text, Plan(table.name, (term,), where=(condition,)), (table.name, term.sql, condition.sql))


def extreme(draw: Draw) -> Draft:
    table = draw.database.parent
    column, (direction, word) = draw.number(table), draw.direction()
    text = draw.one(f"Which {table.name} has the {word} {column}?", f"Name the {table.name} with the {word} {column}.")
    plan = Plan(table.name, (NAME,), order=Term(column), direction=direction, limit=1)
    return Draft(text, plan, (table.name, column, direction))


def extremes(draw: Draw) -> Draft:
    table = draw.database.parent
    column, (direction, word), count = draw.number(table), draw.direction(), draw.rng.randint(2, 6)
    text = draw.one(
        f"Which {count} {table.name}s have the {word} {column}?",
        f"Name the {count} {table.name}s with the {word} {column}.",
    )
    plan = Plan(table.name, (NAME,), order=Term(column), direction=direction, limit=count)
    return Draft(text, plan, (table.name, column, direction, str(count)))


def group_count(draw: Draw) -> Draft:
    table = draw.table()
    key = draw.one(*table.categories)
    text = draw.one(f"How many {table.name}s are there for each {key}?", f"Count the {table.name}s per {key}.")
    return Draft(text, Plan(table.name, (Term(key), COUNT), group=key), (table.name, key))


def group_aggregate(draw: Draw) -> Draft:
    table = draw.table()
    key, column, (function, word) = draw.one(*table.categories), draw.number(table), draw.function()
    term = Term(column, function)
    text = draw.one(
        f"What is the {word} {column} of {table.name}s for each {key}?",
        f"Give the {word} {column} of {table.name}s per {key}.",
    )
    return Draft(text, Plan(table.name, (Term(key), term), group=key), (table.name, key, term.sql))


def group_extreme(draw: Draw) -> Draft:
    table = draw.table()
    key, column, (function, _) = draw.one(*table.categories), draw.number(table), draw.function()
    direction, word = draw.direction()
    term, noun = Term(column, function), GROUP_FUNCTIONS[function]
    text = draw.one(
        f"Which {key} has the {word} {noun} {column} of {table.name}s?",
        f"Name the {key} with the {word} {noun} {column} over {table.name}s.",
    )
    plan = Plan(table.name, (Term(key),), group=key, order=term, direction=direction, limit=1)
    return Draft(text, plan, (table.name, key, term.sql, direction))


def count_distinct(draw: Draw) -> Draft:
    table = draw.table()
    column = draw.one(*table.categories, *table.numbers)
    text = draw.one(
        f"How many different {column} values do {table.name}s have?",
        f"Count the distinct {column} of {table.name}s.",
    )
    return Draft(text, Plan(table.name, (Term(column, "COUNT", distinct=True),)), (table.name, column))


def on_foreign_key(database: Database) -> Join:
    """Return the join of the parent with its children."""
    child = database.child.name
    return Join(child, f"{database.parent.name}.id", f"{child}.{database.foreign_key}")


def join_list(draw: Draw) -> Draft:
    parent, child = draw.database.parent.name, draw.database.child
    if draw.rng.random() < 0.5:
        column, words, condition = draw.category(child)
    else:
        column, words, condition = draw.comparison(child)
    where = Condition(f"{child.name}.{column}", condition.operator, condition.value)
    text = draw.one(
        f"Which {parent}s have a {child.name} with {column} {words}?",
        f"Name the {parent}s that have some {child.name} with {column} {words}.",
    )
    select = (Term(f"{parent}.name", distinct=True),)
    return Draft(text, Plan(parent, select, on_foreign_key(draw.database), (where,)), (parent, where.sql))


def join_aggregate(draw: Draw) -> Draft:
    parent, child = draw.database.parent.name, draw.database.child
    name = draw.rng.choice(live_values(draw.database.name, parent, "name"))
    column = draw.number(child)
    if draw.rng.random() < 0.2:
        term = COUNT
        text = draw.one(
            f"How many {child.name}s does {parent} {name} have?",
            f"Count the {child.name}s of {parent} {name}.",
        )
    else:
        function, word = draw.function()
        term = Term(f"{child.name}.{column}", function)
        text = draw.one(
            f"What is the {word} {column} of {child.name}s of {parent} {name}?",
            f"Give the {word} {column} over {child.name}s of {parent} {name}.",
        )
    where = Condition(f"{parent}.name", "=", f"'{name}'")
    return Draft(text, Plan(parent, (term,), on_foreign_key(draw.database), (where,)), (parent, term.sql, name))


def two_conditions(draw: Draw) -> Draft:
    table = draw.database.parent
    key, value, first = draw.category(table)
    column, words, second = draw.comparison(table)
    counts = draw.rng.random() < 0.5
    question = "How many" if counts else "Which"
    text = f"{question} {table.name}s with {key} {value} have {column} {words}?"
    term = COUNT if counts else NAME
    plan = Plan(table.name, (term,), where=(first, second))
    return Draft(text, plan, (table.name, term.sql, first.sql, second.sql))


def extreme_category(draw: Draw) -> Draft:
    table = draw.database.parent
    key, value, condition = draw.category(table)
    column, (direction, word) = draw.number(table), draw.direction()
    text = draw.one(
        f"Which {table.name} with {key} {value} has the {word} {column}?",
        f"Name the {table.name} with the {word} {column} whose {key} is {value}.",
    )
    plan = Plan(table.name, (NAME,), where=(condition,), order=Term(column), direction=direction, limit=1)
    return Draft(text, plan, (table.name, column, direction, condition.sql))


def count_distinct_category(draw: Draw) -> Draft:
    table = draw.table()
    column = draw.number(table)
    key, value, condition = draw.category(table)
    text = draw.one(
        f"How many different {column} values do {table.name}s with {key} {value} have?",
        f"Count the distinct {column} of {table.name}s whose {key} is {value}.",
    )
    plan = Plan(table.name, (Term(column, "COUNT", distinct=True),), where=(condition,))
    return Draft(text, plan, (table.name, column, condition.sql))


def named(*templates: Callable[[Draw], Draft]) -> dict[str, Callable[[Draw], Draft]]:
    """Key templates by their function's name."""
    return {template.__name__: template for template in templates}


KNOWN_TEMPLATES = named(
    filter_category, filter_number, count_category, count_number, aggregate, aggregate_category, extreme,
    extremes, group_count, group_aggregate, group_extreme, count_distinct, join_list, join_aggregate,
    two_conditions,
)  # fmt: skip
NEW_TEMPLATES = named(extreme_category, count_distinct_category)
"""Asked only in the final bucket."""
