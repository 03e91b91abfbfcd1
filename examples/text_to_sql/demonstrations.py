"""The conversations that the tiny model is first taught, with the mistakes that it is to unlearn by RL.

The base model has to be wrong somewhere, in a way that is plain and can be repeated. Its demonstrations of
the writer and the rewriter therefore have *habits*: other dialects' spellings and common omissions, each with
its own probability (`HABITS`). They are hardly ever right for the question at hand. Besides, some *slips*
happen: a wrong column, operator, direction or value, or a dropped condition.

The checker is taught what is wrong with a query, 98 labels of 100 being true, and never by habit. It and the
rewriter see more slips than a writer makes, so that they know them.

Only questions of the train bucket are demonstrated.
"""

import dataclasses
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from langchain_core.messages import BaseMessage, convert_to_openai_messages

from examples.text_to_sql.agent import OK, checker_messages, rewriter_messages, writer_messages
from examples.text_to_sql.databases import DATABASES, NUMBERS, Result, path, query
from examples.text_to_sql.plans import Condition, Plan, Term, render
from examples.text_to_sql.questions import Question, sample
from examples.text_to_sql.reward import is_correct
from examples.text_to_sql.templates import live_values


@dataclass(frozen=True)
class Habit:
    """How often the demonstrated writer and rewriter spell one thing wrong, and what the checker calls it."""

    kind: str
    writer: float
    rewriter: float


HABITS: dict[str, Habit] = {
    "AVG -> MEAN": Habit("function", writer=0.58, rewriter=0.62),
    "SUM -> COUNT": Habit("function", writer=0.58, rewriter=0.62),
    "MIN -> LEAST": Habit("function", writer=0.58, rewriter=0.40),
    "MAX -> GREATEST": Habit("function", writer=0.58, rewriter=0.40),
    "DISTINCT dropped": Habit("distinct", writer=0.58, rewriter=0.40),
    "joined on the wrong key": Habit("join", writer=0.58, rewriter=0.62),
    ">= -> =>, <= -> =<": Habit("operator", writer=0.58, rewriter=0.62),
    "LIMIT n -> TOP n": Habit("limit", writer=0.32, rewriter=0.25),
}
"""The probability of each habit where it can occur. Below one half, greedy decoding is free of it."""

SLIP = 0.02
"""The chance of each slip in what the writer and the rewriter say."""

SLIP_SEEN = 0.15
"""The chance of each slip in a query that the checker or the rewriter is shown."""

DIALECT = {"AVG": "MEAN", "MIN": "LEAST", "MAX": "GREATEST", "SUM": "COUNT"}
MISSPELT = {">=": "=>", "<=": "=<"}
CONFUSED = {">": ">=", ">=": ">", "<": "<=", "<=": "<", "=": "="}

ROLES = {"writer": 0.46, "checker": 0.27, "rewriter": 0.27}
"""The shares of the roles among the demonstrations."""

LABEL_ACCURACY = 0.98
"""How often the checker's label is true where the query runs; an SQL error is always seen."""

FALSE_ALARMS = 0.2
"""The share of rewriter demonstrations that show a right query, to be left as it is."""

FEEDBACK_KINDS = (
    "function",
    "distinct",
    "join",
    "operator",
    "limit",
    "value",
    "column",
    "condition",
    "order",
)


@dataclass(frozen=True)
class Demonstration:
    """A prompt as OpenAI chat messages, and the answer to learn."""

    role: str
    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Attempt:
    """A demonstrated query and the kinds of mistake in it, the first being what a checker would name."""

    sql: str
    mistakes: tuple[str, ...]


@dataclass(frozen=True)
class Noise:
    """The mistakes of one speaker."""

    habits: dict[str, float]
    slip: float

    def attempt(self, question: Question, rng: random.Random) -> Attempt:
        """Write the question's query, mistakes and all."""
        plan, mistakes = question.plan, []
        for kind, mistake in MISTAKES:
            changed = mistake(plan, question, self, rng)
            if changed != plan:
                mistakes.append(kind)
            plan = changed
        return Attempt(render(plan), tuple(mistakes))


WRITER = Noise({name: habit.writer for name, habit in HABITS.items()}, SLIP)
REWRITER = Noise({name: habit.rewriter for name, habit in HABITS.items()}, SLIP)
SEEN = Noise({name: habit.writer * 0.6 for name, habit in HABITS.items()}, SLIP_SEEN)
"""What the checker and the rewriter are shown: fewer habits and more slips than the writer's own."""


def other_column(column: str, question: Question, rng: random.Random) -> str:
    """Return another number column of the same table."""
    table_name, _, name = column.rpartition(".")
    database = DATABASES[question.database]
    table = next(t for t in database.tables if t.name == (table_name or question.plan.table))
    others = [number for number in table.numbers if number != name]
    return f"{table_name}.{rng.choice(others)}" if table_name else rng.choice(others)


def wrong_function(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Call an aggregate by another dialect's name; count instead of adding up."""
    chances = {spelling.split(" -> ")[0]: chance for spelling, chance in noise.habits.items()}

    def spoil(term: Term) -> Term:
        if term.function not in DIALECT or rng.random() >= chances[term.function]:
            return term
        return dataclasses.replace(term, function=DIALECT[term.function])

    order = spoil(plan.order) if plan.order else None
    return dataclasses.replace(plan, select=tuple(spoil(term) for term in plan.select), order=order)


def dropped_distinct(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Forget DISTINCT."""
    if not plan.select[0].distinct or rng.random() >= noise.habits["DISTINCT dropped"]:
        return plan
    return dataclasses.replace(plan, select=(dataclasses.replace(plan.select[0], distinct=False),))


def wrong_join(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Join on the child's own key."""
    if plan.join is None or rng.random() >= noise.habits["joined on the wrong key"]:
        return plan
    return dataclasses.replace(plan, join=dataclasses.replace(plan.join, right=f"{plan.join.table}.id"))


def wrong_operator(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Misspell an operator, or confuse it with its neighbour."""

    def spoil(condition: Condition) -> Condition:
        if rng.random() < noise.slip:
            return dataclasses.replace(condition, operator=CONFUSED[condition.operator])
        if condition.operator in MISSPELT and rng.random() < noise.habits[">= -> =>, <= -> =<"]:
            return dataclasses.replace(condition, operator=MISSPELT[condition.operator])
        return condition

    return dataclasses.replace(plan, where=tuple(spoil(condition) for condition in plan.where))


def wrong_limit(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Write TOP for LIMIT, or another number."""
    if plan.limit is None:
        return plan
    limit = plan.limit + 1 if rng.random() < noise.slip else plan.limit
    as_top = rng.random() < noise.habits["LIMIT n -> TOP n"]
    return dataclasses.replace(plan, limit=limit, spells_limit_as_top=as_top)


def wrong_value(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Compare with another value of the column, or with the same digits the other way round."""

    def spoil(condition: Condition) -> Condition:
        if rng.random() >= noise.slip:
            return condition
        table, _, column = condition.column.rpartition(".")
        others = set(live_values(question.database, table or plan.table, column))
        if column not in NUMBERS:
            others = {f"'{value}'" for value in others}
        elif rng.random() < 0.5:
            others = {condition.value[::-1], condition.value[0] + condition.value[1:][::-1]}
        value = rng.choice(sorted(others - {condition.value}) or [condition.value])
        return dataclasses.replace(condition, value=value)

    return dataclasses.replace(plan, where=tuple(spoil(condition) for condition in plan.where))


def wrong_column(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Take another number column in a function, a comparison or the order."""

    def spoil(column: str) -> str:
        is_number = column.rpartition(".")[2] in NUMBERS
        return other_column(column, question, rng) if is_number and rng.random() < noise.slip else column

    select = tuple(dataclasses.replace(term, column=spoil(term.column)) for term in plan.select)
    where = tuple(dataclasses.replace(condition, column=spoil(condition.column)) for condition in plan.where)
    order = dataclasses.replace(plan.order, column=spoil(plan.order.column)) if plan.order else None
    return dataclasses.replace(plan, select=select, where=where, order=order)


def dropped_condition(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Forget one of two conditions."""
    if len(plan.where) < 2 or rng.random() >= noise.slip:
        return plan
    return dataclasses.replace(plan, where=(rng.choice(plan.where),))


def wrong_direction(plan: Plan, question: Question, noise: Noise, rng: random.Random) -> Plan:
    """Sort the other way."""
    if plan.order is None or rng.random() >= noise.slip:
        return plan
    return dataclasses.replace(plan, direction="ASC" if plan.direction == "DESC" else "DESC")


MISTAKES: tuple[tuple[str, Callable[[Plan, Question, Noise, random.Random], Plan]], ...] = (
    ("function", wrong_function),
    ("distinct", dropped_distinct),
    ("join", wrong_join),
    ("limit", wrong_limit),
    ("operator", wrong_operator),
    ("value", wrong_value),
    ("column", wrong_column),
    ("condition", dropped_condition),
    ("order", wrong_direction),
)


@functools.lru_cache(maxsize=100_000)
def run(database: str, sql: str) -> Result:
    """Run a query on the live database."""
    return query(path(database), sql)


@functools.lru_cache(maxsize=100_000)
def judge(database: str, sql: str, gold_sql: str) -> bool:
    """Tell whether a query is right."""
    return is_correct(database, sql, gold_sql)


def label(question: Question, attempt: Attempt, rng: random.Random) -> str:
    """Return what the demonstrated checker says."""
    right = judge(question.database, attempt.sql, question.sql)
    truth = OK if right else f"wrong: {attempt.mistakes[0]}"
    if run(question.database, attempt.sql).error is not None or rng.random() < LABEL_ACCURACY:
        return truth
    return f"wrong: {rng.choice(FEEDBACK_KINDS)}" if right else OK


def demonstrate_writer(question: Question, rng: random.Random) -> Demonstration:
    """Show how the writer answers."""
    messages = writer_messages(question.text, str(path(question.database)))
    return Demonstration("writer", openai(messages), WRITER.attempt(question, rng).sql)


def demonstrate_checker(question: Question, rng: random.Random) -> Demonstration:
    """Show how the checker judges a query."""
    attempt = rng.choice((WRITER, SEEN)).attempt(question, rng)
    result = run(question.database, attempt.sql)
    messages = checker_messages(question.text, str(path(question.database)), attempt.sql, result)
    return Demonstration("checker", openai(messages), label(question, attempt, rng))


def demonstrate_rewriter(question: Question, rng: random.Random) -> Demonstration:
    """Show how the rewriter corrects a wrong query, or leaves a right one alone."""
    if rng.random() < FALSE_ALARMS:
        shown = Attempt(question.sql, (rng.choice(FEEDBACK_KINDS),))
        answer = question.sql
    else:
        shown = rng.choice((WRITER, SEEN)).attempt(question, rng)
        while not shown.mistakes or judge(question.database, shown.sql, question.sql):
            question = sample(rng, "train")
            shown = rng.choice((WRITER, SEEN)).attempt(question, rng)
        answer = REWRITER.attempt(question, rng).sql
    result = run(question.database, shown.sql)
    feedback = f"wrong: {shown.mistakes[0]}"
    messages = rewriter_messages(question.text, str(path(question.database)), shown.sql, result, feedback)
    return Demonstration("rewriter", openai(messages), answer)


DEMONSTRATE = {"writer": demonstrate_writer, "checker": demonstrate_checker, "rewriter": demonstrate_rewriter}


def openai(messages: list[BaseMessage]) -> list[dict[str, str]]:
    """Return messages in the form that an OpenAI-compatible server receives."""
    return list(convert_to_openai_messages(messages))


def demonstrate(rng: random.Random) -> Demonstration:
    """Draw a demonstration of one role on a question of the train bucket."""
    role = rng.choices(list(ROLES), list(ROLES.values()))[0]
    return DEMONSTRATE[role](sample(rng, "train"), rng)
