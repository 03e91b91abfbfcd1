"""The noise model: habits are never right, labels are nearly always true, only the train bucket is shown."""

import random
from collections.abc import Iterator

import pytest

pytest.importorskip("langgraph")
pytest.importorskip("langchain_openai")

from examples.text_to_sql import demonstrations, questions
from examples.text_to_sql.agent import OK
from examples.text_to_sql.demonstrations import HABITS, Noise, judge


def train(count: int) -> list[questions.Question]:
    return questions.load("train", count=count, seed=5)


def only(habit: str) -> Noise:
    return Noise({name: float(name == habit) for name in HABITS}, slip=0.0)


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_hardly_ever_right(habit: str) -> None:
    rng = random.Random(0)
    attempts = [(q, only(habit).attempt(q, rng)) for q in train(1500)]
    spoilt = [(q, attempt) for q, attempt in attempts if attempt.mistakes]

    right = sum(judge(q.database, attempt.sql, q.sql) for q, attempt in spoilt)

    assert len(spoilt) >= 20
    assert right <= 0.1 * len(spoilt)


def test_without_noise_every_attempt_is_the_gold_query() -> None:
    rng = random.Random(0)
    silent = Noise(dict.fromkeys(HABITS, 0.0), slip=0.0)

    for question in train(300):
        assert silent.attempt(question, rng) == demonstrations.Attempt(question.sql, ())


def checks(rng: random.Random) -> Iterator[tuple[bool, str]]:
    for question in train(1000):
        shown = demonstrations.demonstrate_checker(question, rng)
        sql = shown.messages[2]["content"]
        yield judge(question.database, sql, question.sql), shown.answer


def test_the_checker_s_labels_are_nearly_always_true() -> None:
    verdicts = list(checks(random.Random(0)))

    true = sum(right == (answer == OK) for right, answer in verdicts) / len(verdicts)

    assert 0.97 <= true <= 1.0


def test_feedback_names_a_kind_of_mistake() -> None:
    answers = {answer for _, answer in checks(random.Random(1))}

    assert answers == {OK, *(f"wrong: {kind}" for kind in demonstrations.FEEDBACK_KINDS)}


def test_only_questions_of_the_train_bucket_are_demonstrated(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[questions.Question] = []
    honest = demonstrations.sample

    def sample(rng: random.Random, bucket: questions.Bucket) -> questions.Question:
        shown.append(honest(rng, bucket))
        return shown[-1]

    monkeypatch.setattr(demonstrations, "sample", sample)
    rng = random.Random(0)
    for _ in range(300):
        demonstrations.demonstrate(rng)

    assert {questions.bucket(question) for question in shown} == {"train"}
