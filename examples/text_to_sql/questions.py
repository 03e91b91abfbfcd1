"""The demo's questions in three buckets that share no combination.

A *combination* is everything a query depends on: database, template, table, columns, operator and values.
Its hash decides its bucket, so a question of one bucket never has the query of a question of another:

    train    demonstrations and reinforcement learning; drawn with repetition, without end
    tuning   every choice of design is judged here; each combination once
    final    opened once, for the reported figures; each combination once

The final bucket alone holds the templates and the database that nothing else has seen; `held_out` names them.
The trap: the same combination has several wordings, so count combinations, not questions.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from examples.text_to_sql.databases import DATABASES, NEW_DATABASE, path, query
from examples.text_to_sql.plans import Plan, render
from examples.text_to_sql.templates import KNOWN_TEMPLATES, NEW_TEMPLATES, Draw

Bucket = Literal["train", "tuning", "final"]
HeldOut = Literal["in_distribution", "new_template", "new_database"]

KNOWN_DATABASES = tuple(name for name in DATABASES if name != NEW_DATABASE)
TENTHS: dict[Bucket, range] = {"train": range(4, 10), "tuning": range(2, 4), "final": range(0, 2)}
"""Which tenths of the hashed combinations belong to which bucket."""

SIZES: dict[Bucket, int] = {"train": 2048, "tuning": 300, "final": 500}
"""How many questions `load` returns without a count."""

FINAL_CYCLE: tuple[HeldOut, ...] = (
    "in_distribution", "new_template", "in_distribution", "new_database", "in_distribution",
)  # fmt: skip
"""The kinds of the final bucket in turn: of 500 questions 300, 100 and 100."""

PATIENCE = 20_000
"""Draws without a new combination after which a bucket counts as exhausted."""


@dataclass(frozen=True)
class Question:
    """A question about a database, with the query that answers it."""

    text: str
    database: str
    template: str
    combination: str
    held_out: HeldOut
    """What the training data had not seen but for the combination itself."""
    plan: Plan

    @property
    def sql(self) -> str:
        """The gold query."""
        return render(self.plan)

    @property
    def task(self) -> dict[str, str]:
        """The question as a JSON-able task; `database` is a name (`databases.path` gives its file)."""
        return {
            "question": self.text,
            "database": self.database,
            "gold_sql": self.sql,
            "template": self.template,
            "combination": self.combination,
            "held_out": self.held_out,
        }


def bucket(question: Question) -> Bucket:
    """Return the only bucket that may hold the question."""
    if question.held_out != "in_distribution":
        return "final"
    tenth = int.from_bytes(hashlib.sha256(question.combination.encode()).digest()[:8], "big") % 10
    return next(name for name, tenths in TENTHS.items() if tenth in tenths)


@functools.lru_cache(maxsize=100_000)
def has_rows(database: str, sql: str) -> bool:
    """Tell whether the gold query returns anything: no wrong query should be right by returning nothing."""
    return bool(query(path(database), sql).rows)


def draw(rng: random.Random, held_out: HeldOut = "in_distribution") -> Question:
    """Draw a question of any bucket: database and template uniformly, then its pieces."""
    database = NEW_DATABASE if held_out == "new_database" else rng.choice(KNOWN_DATABASES)
    templates = NEW_TEMPLATES if held_out == "new_template" else KNOWN_TEMPLATES
    template = rng.choice(list(templates))
    draft = templates[template](Draw(rng, DATABASES[database]))
    combination = "/".join((database, template, *draft.parts))
    return Question(draft.text, database, template, combination, held_out, draft.plan)


def sample(rng: random.Random, name: Bucket, held_out: HeldOut = "in_distribution") -> Question:
    """Draw a question of one bucket, with an answer that is not empty; combinations may repeat.

    Raises:
        ValueError: the bucket has no question of that kind.
    """
    for _ in range(PATIENCE):
        question = draw(rng, held_out)
        if bucket(question) == name and has_rows(question.database, question.sql):
            return question
    raise ValueError(f"bucket {name!r} holds no {held_out!r} question")


def stream(name: Bucket, *, seed: int) -> Iterator[Question]:
    """Yield questions of a bucket: without end for `train`, each combination once for the others.

    Raises:
        ValueError: unknown bucket.
    """
    if name not in get_args(Bucket):
        raise ValueError(f"no bucket {name!r}; choose one of {', '.join(get_args(Bucket))}")
    rng = random.Random(f"{name}-{seed}")
    if name == "train":
        while True:
            yield sample(rng, name)
    kinds: tuple[HeldOut, ...] = FINAL_CYCLE if name == "final" else ("in_distribution",)
    seen: set[str] = set()
    for kind in itertools.cycle(kinds):
        draws = (sample(rng, name, kind) for _ in range(PATIENCE))
        fresh = next((question for question in draws if question.combination not in seen), None)
        if fresh is None:
            return
        seen.add(fresh.combination)
        yield fresh


def load(name: Bucket, *, count: int | None = None, seed: int = 0) -> list[Question]:
    """Return the first `count` questions of a bucket's stream (without a count, see `SIZES`).

    Raises:
        ValueError: unknown bucket, or one with fewer than `count` combinations.
    """
    count = SIZES.get(name) if count is None else count
    questions = list(itertools.islice(stream(name, seed=seed), count))
    if len(questions) != count:
        raise ValueError(f"bucket {name!r} has only {len(questions)} combinations, not {count}")
    return questions
