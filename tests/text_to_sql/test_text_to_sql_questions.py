"""The questions: buckets share no combination, the final one holds what no other has, gold queries run."""

import itertools
import json
from collections import Counter

import pytest

from examples.text_to_sql import databases, questions
from examples.text_to_sql.plans import Condition, Join, Plan, Term, render
from examples.text_to_sql.templates import KNOWN_TEMPLATES, NEW_TEMPLATES


def take(bucket: questions.Bucket, count: int, seed: int = 0) -> list[questions.Question]:
    return list(itertools.islice(questions.stream(bucket, seed=seed), count))


def test_no_two_buckets_share_a_combination_or_a_gold_query_of_one_database() -> None:
    drawn = {name: take(name, count, seed=3) for name, count in {"train": 3000, "tuning": 600, "final": 500}.items()}

    for one, other in itertools.combinations(drawn, 2):
        assert not {q.combination for q in drawn[one]} & {q.combination for q in drawn[other]}
        assert not {(q.database, q.sql) for q in drawn[one]} & {(q.database, q.sql) for q in drawn[other]}


def test_the_final_bucket_counts_at_least_300_combinations_once_each() -> None:
    final = questions.load("final")

    assert len({q.combination for q in final}) == len(final) == 500
    assert Counter(q.held_out for q in final) == {
        "in_distribution": 300,
        "new_template": 100,
        "new_database": 100,
    }


def test_two_templates_and_one_database_stand_in_the_final_bucket_only() -> None:
    seen = take("train", 2000) + take("tuning", 500)
    final = questions.load("final")

    assert {q.template for q in seen} == set(KNOWN_TEMPLATES)
    assert {q.template for q in final} == {*KNOWN_TEMPLATES, *NEW_TEMPLATES}
    assert len(NEW_TEMPLATES) == 2
    assert {q.database for q in final} - {q.database for q in seen} == {databases.NEW_DATABASE}


def test_what_the_final_bucket_alone_holds_is_marked() -> None:
    for question in questions.load("final"):
        expected = "in_distribution"
        if question.template in NEW_TEMPLATES:
            expected = "new_template"
        if question.database == databases.NEW_DATABASE:
            expected = "new_database"
        assert question.held_out == expected


@pytest.mark.parametrize("bucket", ["train", "tuning", "final"])
def test_every_gold_query_runs_and_returns_rows(bucket: questions.Bucket) -> None:
    for question in take(bucket, 300):
        result = databases.query(databases.path(question.database), question.sql)
        assert result.error is None
        assert result.rows


@pytest.mark.parametrize("bucket", ["train", "tuning"])
def test_a_seed_always_gives_the_same_questions(bucket: questions.Bucket) -> None:
    assert questions.load(bucket, count=50, seed=1) == questions.load(bucket, count=50, seed=1)
    assert questions.load(bucket, count=50, seed=1) != questions.load(bucket, count=50, seed=2)


def test_a_task_is_plain_json() -> None:
    task = questions.load("tuning", count=1)[0].task

    assert json.loads(json.dumps(task)) == task
    assert {"question", "database", "gold_sql"} <= set(task)


def test_an_unknown_bucket_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="no bucket 'test'; choose one of train, tuning, final"):
        questions.load("test")  # type: ignore[arg-type]  # the mistake under test


def test_asking_for_more_combinations_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "PATIENCE", 50)

    with pytest.raises(ValueError, match=r"bucket 'tuning' has only \d+ combinations, not 100000"):
        questions.load("tuning", count=100_000)


def test_a_plan_renders_every_clause_in_order() -> None:
    plan = Plan(
        "team", (Term("city"), Term("*", "COUNT")), Join("player", "team.id", "player.team_id"),
        (Condition("wins", ">", "3"), Condition("city", "=", "'Oslo'")), "city",
        Term("wins", "AVG"), "DESC", 2,
    )  # fmt: skip

    assert render(plan) == (
        "SELECT city, COUNT(*) FROM team JOIN player ON team.id = player.team_id "
        "WHERE wins > 3 AND city = 'Oslo' GROUP BY city ORDER BY AVG(wins) DESC LIMIT 2"
    )
