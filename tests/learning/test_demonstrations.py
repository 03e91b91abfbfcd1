"""What a policy may imitate: every whole call of its roles, whoever answered, and what RL never sees."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from leyden import mdp
from leyden.credit import discounted, per_turn
from leyden.demonstrations import Demonstrations, Source, demonstrations
from leyden.errors import ConfigurationError
from leyden.interfaces import GenerationRequest, RolloutRecords
from leyden.roles import Policy
from leyden.spans import Completion, Kind, RolloutState, Span, Status
from leyden.testing.records import a_span
from leyden_plugins.algorithms.rl.checks import on_distribution
from tests.learning.builders import call, choice, records, reward

WRITER, CHECKER = Policy("sql", roles=["writer"]), Policy("check", roles=["*"])
POLICIES = (WRITER, CHECKER)


def spell(request: GenerationRequest, answer: Mapping[str, object]) -> tuple[Sequence[int], Sequence[int]] | None:
    """Write a conversation in bytes: the prompt `user: Why?|`, the answer its text and a 0."""
    prompt = "".join(f"{message['role']}: {message['content']}|" for message in request.messages)
    if answer["content"] == "unspeakable":
        return None
    if answer["content"] == "refused":
        raise ConfigurationError("the model's chat template refuses these messages: no. Roles in order: ['user']")
    return list(prompt.encode()), [*str(answer["content"]).encode(), 0]


def recorded(*answers: str, span_id: str = "s0", role: str = "writer", start_ns: int = 0, **changes: object) -> Span:
    attributes: dict[str, object] = {
        "gen_ai.input.messages": [{"role": "user", "content": "Why?"}],
        "gen_ai.output.messages": [{"role": "assistant", "content": answer} for answer in answers],
    }
    attributes |= changes.pop("attributes", {})  # type: ignore[arg-type]  # a dict, or missing
    return a_span(
        "r0",
        span_id=span_id,
        kind=Kind.MODEL_CALL,
        name="chat",
        role=role,
        start_ns=start_ns,
        end_ns=start_ns + 1,
        attributes=attributes,
        **changes,
    )


def shown(
    *spans: Span,
    completions: Sequence[Completion] = (),
    source: Source | None = None,
    one: RolloutRecords | None = None,
    **options: object,
) -> Demonstrations:
    found = replace(one or records(*completions), spans=spans)
    made = source or Source(policy=WRITER, policies=POLICIES, tokenise=spell)
    return demonstrations(found, made, **options)  # type: ignore[arg-type]


def test_calls_that_anybody_answered_are_shown_with_what_is_known_of_their_tokens() -> None:
    teacher = call([1], choice([2, 3]), span_id="s1", policy="teacher", version=7, start_ns=2)
    found = shown(recorded("Because."), completions=[teacher])
    text, exact = found.transitions
    assert (text.is_retokenised, bytes(text.prompt_token_ids), bytes(text.token_ids)) == (
        True,
        b"user: Why?|",
        b"Because.\0",
    )
    assert list(text.logprobs) == [0.0] * 9
    assert (exact.is_retokenised, exact.token_ids, list(exact.logprobs)) == (False, [2, 3], [-1.0, -1.0])
    assert {one.policy for one in found.transitions} == {"sql"}
    assert not found.unusable


def test_the_first_policy_that_matches_a_role_has_it() -> None:
    spans = [recorded("a"), recorded("b", span_id="s1", role="checker", start_ns=5)]
    assert [one.role for one in shown(*spans).transitions] == ["writer"]
    theirs = Source(policy=CHECKER, policies=POLICIES, tokenise=spell)
    assert [one.role for one in shown(*spans, source=theirs).transitions] == ["checker"]


def test_without_exact_recorded_tokens_of_another_tokenizer_are_left_alone() -> None:
    source = Source(policy=WRITER, policies=POLICIES, tokenise=spell, exact=False)
    completion = call([1], choice([2, 3]), span_id="s0")
    (one,) = shown(recorded("Because."), completions=[completion], source=source).transitions
    assert one.is_retokenised and bytes(one.token_ids) == b"Because.\0"
    assert shown(completions=[completion], source=source).unusable == {"it was recorded without its messages": 1}


def test_an_answer_that_never_arrived_is_no_demonstration() -> None:
    lost = call([1], choice([2]), span_id="s0", delivered=False)
    failed = shown(recorded("x", status=Status.INTERRUPTED), completions=[lost])
    assert (failed.transitions, failed.unusable) == ([], {})
    (again,) = shown(recorded("x"), completions=[lost]).transitions  # another server answered in the end
    assert again.is_retokenised


def test_rl_never_sees_tokens_that_were_made_from_text() -> None:
    both = replace(records(call([1], choice([2]), span_id="s1")), spans=[recorded("Because.")])
    assert [one.span_id for one in mdp.transitions(both, POLICIES)] == ["s1"]
    (made, _) = shown(recorded("Because."), completions=both.completions).transitions
    assert made.off_distribution
    with pytest.raises(ConfigurationError, match="were not sampled from log-softmax"):
        on_distribution([made], [], "error")


def test_returns_are_those_of_credit_assignment_over_all_calls_of_the_role() -> None:
    spans = [recorded("a", span_id="s0"), recorded("b", span_id="s2", start_ns=20)]
    exact = call([1], choice([2]), span_id="s1", start_ns=10)
    one = records(exact, total=1.0, rewards=[reward(0.25, span="s2")])
    found = shown(*spans, one=one, credit=discounted(0.5)).transitions
    assert [(each.span_id, each.turn, each.value) for each in found] == [
        ("s0", 0, 0.25),
        ("s1", 1, 0.5),
        ("s2", 2, 1.25),
    ]


def test_turns_are_counted_over_the_calls_of_all_roles_with_tokens_or_without() -> None:
    spans = [recorded("a", span_id="s0"), recorded("b", span_id="c0", role="checker", start_ns=10)]
    one = records(total=0.0, rewards=[reward(1.0, span="c0")])
    (found,) = shown(*spans, one=one, credit=per_turn(0.5, across_roles=True)).transitions
    assert (found.span_id, found.value) == ("s0", 0.5)


def test_rollouts_without_a_reward_are_shown_and_unfinished_ones_are_not() -> None:
    (one,) = shown(recorded("a"), one=records(total=None)).transitions
    assert one.value == 0.0
    assert shown(recorded("a"), one=records(state=RolloutState.RUNNING)).transitions == []


def test_of_several_answers_the_rewarded_one_counts() -> None:
    assert shown(recorded("a", "b")).unusable == {
        "it has several answers, and nothing says with which the agent went on": 1
    }
    chosen = records(rewards=[reward(1.0, span="s0", index=1)])
    (one,) = shown(recorded("a", "b"), one=chosen).transitions
    assert (bytes(one.token_ids), one.choice_index) == (b"b\0", 1)


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        (recorded("unspeakable"), "does not write its answer"),
        (recorded("refused"), "chat template refuses these messages: no$"),
        (recorded("x", attributes={"gen_ai.input.messages": None}), "without its messages"),
        (recorded("x", attributes={"gen_ai.operation.name": "text_completion"}), "text completion"),
        (recorded("x", attributes={"leyden.previous_response": "resp_1"}), "goes on from an answer"),
        (recorded("x", attributes={"gen_ai.response.finish_reasons": ["length"]}), "was cut short"),
        (recorded("x" * 100), "longer than the 50 tokens"),
        (
            recorded(
                "",
                attributes={
                    "gen_ai.output.messages": [
                        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
                    ]
                },
            ),
            "nobody recorded which tools",
        ),
    ],
)
def test_calls_that_cannot_be_tokenised_are_counted_with_the_reason(span: Span, reason: str) -> None:
    found = shown(span, source=Source(policy=WRITER, policies=POLICIES, tokenise=spell, most_tokens=50))
    assert found.transitions == []
    ((told, count),) = found.unusable.items()
    assert re.search(reason, told) and count == 1


def test_an_engine_that_cannot_tokenise_is_refused_only_where_it_would_have_to() -> None:
    source = Source(policy=WRITER, policies=POLICIES, tokenise=None)
    assert len(shown(completions=[call([1], choice([2]))], source=source).transitions) == 1
    with pytest.raises(ConfigurationError, match="the engine cannot tokenise"):
        shown(recorded("Because."), source=source)
