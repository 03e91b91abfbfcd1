"""What is read from a judge's answer."""

import pytest

from leyden_plugins.rewards.showing import score_in


@pytest.mark.parametrize(
    "text",
    [
        '{"reason": "ok", "score": 0.9}',
        '<think>first guess {"score": 0.1}, no</think>{"reason": "ok", "score": 0.9}',
        'I compare {a, b}.\n```json\n{"reason": "ok", "score": 0.9}\n```',
        'A draft: {"score": 0.1}. Finally: {"reason": "ok", "score": 0.9}',
    ],
)
def test_the_score_is_the_last_one_behind_a_models_thoughts(text: str) -> None:
    assert score_in(text) == (0.9, "ok")


def test_an_answer_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no JSON object with 'score'"):
        score_in('<think>{"score": 1}</think> I cannot say {that}')
