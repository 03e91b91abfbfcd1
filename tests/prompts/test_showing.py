"""What a reflection model sees of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leyden.interfaces import RolloutRecords
from leyden.spans import Kind, Reward, Rollout, Span, Status
from leyden.testing.records import a_choice, a_completion, a_reward, a_rollout, a_span
from leyden_plugins.algorithms.prompt import showing
from leyden_plugins.algorithms.prompt.showing import cut, example, examples
from tests.prompts.desk import a_call

SYSTEM = {"role": "system", "content": "Be a secret."}
ASKED = {"role": "user", "content": "What is in the cellar?"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"where": "cellar"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "wine"}
ANSWER = {"role": "assistant", "content": "There is wine."}


def records(
    spans: Sequence[Span], *, rewards: Sequence[Reward] = (), rollout: Rollout | None = None, **changes: Any
) -> RolloutRecords:
    rollout = rollout or a_rollout(reward=0.5)
    return RolloutRecords(rollout=rollout, spans=spans, rewards=rewards, completions=changes.get("completions", ()))


def call(asked: object, said: object, **changes: Any) -> Span:
    attributes = {"gen_ai.input.messages": asked, "gen_ai.output.messages": said}
    fields = {"kind": Kind.MODEL_CALL, "role": "butler", "attributes": attributes, **changes}
    return a_span(**fields)


def test_a_conversation_that_grows_is_shown_once_without_its_system_message() -> None:
    first = call([SYSTEM, ASKED], [CALLS], start_ns=1)
    second = call([SYSTEM, ASKED, CALLS, RESULT], [ANSWER], start_ns=2)
    assert example(records([second, first]), "butler")["Conversation"].splitlines() == [
        "--- call 1 of 2 ---",
        "system: [the instructions above]",
        "user: What is in the cellar?",
        'answer: [calls look with {"where": "cellar"}]',
        "--- call 2 of 2, going on from the one before ---",
        "tool: wine",
        "answer: There is wine.",
    ]


def test_a_conversation_that_begins_anew_is_shown_anew() -> None:
    other = {"role": "user", "content": "And in the attic?"}
    shown = example(
        records([call([SYSTEM, ASKED], [ANSWER], start_ns=1), call([SYSTEM, other], [ANSWER], start_ns=2)]), "butler"
    )
    assert shown["Conversation"].count("system: [the instructions above]") == 2
    assert "secret" not in shown["Conversation"]


def test_only_rollouts_in_which_the_role_spoke_become_examples() -> None:
    mine, other = records([call([ASKED], [ANSWER])]), records([call([ASKED], [ANSWER], role="cook")])
    assert len(examples([mine, other, mine], "butler")) == 2
    assert examples([other], "butler") == []


def test_an_answer_that_only_the_engine_knows_is_shown() -> None:
    asked = call([ASKED], None, span_id="s")
    completion = a_completion(span_id="s", choices=[a_choice(text="From the engine.")])
    shown = example(records([asked], completions=[completion]), "butler")
    assert "answer: From the engine." in shown["Conversation"]


def test_messages_that_are_no_text_are_shown_as_they_were_sent() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    assert "image_url" in example(records([call(image, [ANSWER])]), "butler")["Conversation"]


def test_feedback_has_the_rewards_of_the_whole_and_of_this_role_events_and_the_error() -> None:
    rollout = a_rollout(reward=0.25, error="no key", error_type="AppError")
    rewards = [
        a_reward(value=0.25),
        a_reward(value=0.75, name="style"),
        a_reward(value=0.1, name="manners", target_role="butler"),
        a_reward(value=0.2, name="manners", target_role="cook"),
        a_reward(value=0.3, name="taste", target_span="s"),
    ]
    spans = [
        call([ASKED], [ANSWER], span_id="s"),
        a_span(kind=Kind.EVENT, name="note", role="main", attributes={"text": "too late"}),
        a_span(kind=Kind.EVENT, name="note", role="cook", attributes={"text": "too salty"}),
    ]
    assert example(records(spans, rewards=rewards, rollout=rollout), "butler")["Feedback"].splitlines() == [
        "reward of the whole: 0.25",
        "style: 0.75",
        "manners of this role: 0.1",
        "taste of call 1: 0.3",
        "note: text: too late",
        "note in 'cook': text: too salty",
        "the run failed with AppError: no key",
    ]
    unrewarded = records([call([ASKED], [ANSWER])], rollout=a_rollout())
    assert example(unrewarded, "butler")["Feedback"] == "reward of the whole: none, which counts as 0"


def test_of_many_events_the_last_are_shown() -> None:
    events = [a_span(kind=Kind.EVENT, name=f"e{number}", start_ns=number) for number in range(30)]
    lines = example(records([call([ASKED], [ANSWER]), *events]), "butler")["Feedback"].splitlines()
    assert lines[1:3] == ["[20 earlier events are left out]", "e20: "]


def test_tools_are_shown_where_the_conversation_does_not_show_them() -> None:
    spans = [
        call([ASKED, CALLS, RESULT], [ANSWER]),
        a_span(name="look", role="butler", attributes={"gen_ai.tool.call.result": "wine"}),
        a_span(name="search", role="butler", attributes={"gen_ai.tool.call.result": "a map"}, start_ns=2_000),
        a_span(name="open", role="butler", status=Status.ERROR, error="locked", start_ns=3_000),
        a_span(name="cook", role="cook", attributes={"gen_ai.tool.call.result": "soup"}),
    ]
    assert example(records(spans), "butler")["Tools"].splitlines() == ["search returned: a map", "open failed: locked"]


def test_what_is_too_long_is_cut_in_its_middle_and_that_is_said() -> None:
    assert cut("abcdefgh", 4) == "ab\n[4 characters cut]\ngh"
    assert cut("abcd", 4) == "abcd"
    long = "begin" + "x" * 50_000 + "end"
    spans = [a_call("butler", "s", f"{number} {long}", long, start_ns=number) for number in range(20)]
    rollout = a_rollout(task=long, output=long, error=long, error_type="E")
    shown = example(records(spans, rollout=rollout), "butler")
    assert sum(map(len, shown.values())) < showing.MOST_OF_CONVERSATION + 4 * showing.MOST_CHARACTERS
    assert "characters cut" in shown["Task"]
    few = [a_call("butler", "s", str(number), "a", start_ns=number) for number in range(20)]
    conversation = example(records(few), "butler")["Conversation"]
    assert "[14 calls in the middle are left out]" in conversation
    assert "call 1 of 20" in conversation and "call 20 of 20" in conversation and "call 9 of 20" not in conversation


def test_a_call_that_failed_says_so() -> None:
    broken = call([ASKED], None, status=Status.ERROR, error="HTTP 500")
    assert "the call ended with error: HTTP 500" in example(records([broken]), "butler")["Conversation"]
