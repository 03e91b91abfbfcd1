"""What a reflection model is shown of rollouts: a role's calls, its tools, and what came of it all.

One idea: a role is shown its own conversation as it grew, each message once, with the rollout's outcome as feedback.
The system message is left out, for that is the text to be improved and stands above.
One trap: rollouts can be of any length; everything is bounded, and what is cut is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from leyden.conversations import chat_messages
from leyden.errors import DatasetError
from leyden.interfaces import RolloutRecords
from leyden.roles import MAIN_ROLE
from leyden.spans import Kind, Reward, Span, Status

MOST_CHARACTERS = 3_000
"""Of one message, task, result or error."""
MOST_CALLS = 6
"""Of one role in one rollout; those in the middle are left out."""
MOST_OF_CONVERSATION = 12_000
"""Characters of one role's calls in one rollout."""
INSTRUCTIONS = "system: [the instructions above]"
MOST_EVENTS = 10
"""Of one rollout, the last ones: an app tells at its end what was wrong."""

Example = dict[str, str]
"""Heading -> text."""


def examples(records: Sequence[RolloutRecords], role: str) -> list[Example]:
    """Return one example for each of these rollouts in which the role spoke."""
    return [example(one, role) for one in records if calls_of(one, role)]


def example(records: RolloutRecords, role: str) -> Example:
    """Return what happened to a role in a rollout."""
    conversation = conversation_of(records, role)
    found = {
        "Task": cut(as_text(records.rollout.task)),
        "Conversation": conversation,
        "Tools": "\n".join(tool_lines(records, role, shown=conversation)),
        "Output of the whole": "" if records.rollout.output is None else cut(as_text(records.rollout.output)),
        "Feedback": "\n".join(feedback_lines(records, role)),
    }
    return {heading: text for heading, text in found.items() if text}


def calls_of(records: RolloutRecords, role: str) -> list[Span]:
    """Return a role's model calls by start."""
    found = [one for one in records.spans if one.kind is Kind.MODEL_CALL and one.role == role]
    return sorted(found, key=lambda one: one.start_ns)


def conversation_of(records: RolloutRecords, role: str) -> str:
    """Return a role's calls: what is new in each, and its answer."""
    calls = calls_of(records, role)
    blocks: list[str] = []
    before: list[Mapping[str, object]] = []
    for number, call in enumerate(calls, 1):
        asked = messages_in(call.attributes.get("gen_ai.input.messages"))
        goes_on = bool(before) and asked[: len(before)] == before
        new = asked[len(before) :] if goes_on else asked
        lines = [f"--- call {number} of {len(calls)}{', going on from the one before' if goes_on else ''} ---"]
        if goes_on and new and new[0].get("role") == "assistant":
            new = new[1:]  # the answer before, shown there
        lines += [INSTRUCTIONS if one.get("role") == "system" else message_line(one) for one in new]
        lines += [f"answer: {message_text(one)}" for one in answer_of(records, call)]
        if call.status is not Status.OK:
            lines.append(f"the call ended with {call.status}: {cut(call.error or 'no reason given')}")
        blocks.append("\n".join(lines))
        before = asked
    if len(blocks) > MOST_CALLS:
        half = MOST_CALLS // 2
        blocks[half:-half] = [f"[{len(blocks) - 2 * half} calls in the middle are left out]"]
    return cut("\n".join(blocks), MOST_OF_CONVERSATION)


def answer_of(records: RolloutRecords, call: Span) -> list[Mapping[str, object]]:
    """Return what a call answered: as the agent's process saw it, or else as the engine sampled it."""
    if call.attributes.get("gen_ai.output.messages"):
        return messages_in(call.attributes["gen_ai.output.messages"])
    own = [one for one in records.completions if one.span_id == call.span_id]
    return [{"content": choice.text} for choice in own[-1].choices] if own else []


def messages_in(value: object) -> list[Mapping[str, object]]:
    """Return recorded messages in one form; those that hold what is no text, as they are."""
    if not value:
        return []
    try:
        return list(chat_messages(value))
    except DatasetError:
        return [{"role": "messages", "content": as_text(value)}]


def message_line(message: Mapping[str, object]) -> str:
    """Return who speaks, and what."""
    return f"{message.get('role', 'message')}: {message_text(message)}"


def message_text(message: Mapping[str, object]) -> str:
    """Return a message's text and tool calls."""
    text = cut(as_text(message.get("content") or ""))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") or {}
        text += f"\n[calls {function.get('name')} with {cut(as_text(function.get('arguments')))}]"
    return text.strip()


def tool_lines(records: RolloutRecords, role: str, *, shown: str) -> list[str]:
    """Return what came of a role's tools, as far as its conversation does not show it."""
    lines = []
    for span in sorted(records.spans, key=lambda one: one.start_ns):
        if span.kind is not Kind.TOOL or span.role != role:
            continue
        result = cut(as_text(span.attributes.get("gen_ai.tool.call.result", "")))
        if span.status is not Status.OK:
            lines.append(f"{span.name} failed: {cut(span.error or span.status)}")
        elif result and result not in shown:
            lines.append(f"{span.name} returned: {result}")
    return lines


def feedback_lines(records: RolloutRecords, role: str) -> list[str]:
    """Return a rollout's outcome: its reward, the named ones, those of this role, events and errors."""
    rollout = records.rollout
    total = "none, which counts as 0" if rollout.reward is None else f"{rollout.reward:g}"
    lines = [f"reward of the whole: {total}"]
    numbers = {call.span_id: number for number, call in enumerate(calls_of(records, role), 1)}
    others = [one for one in records.rewards if not (is_of_whole(one) and one.value == rollout.reward)]
    for reward in others:
        if is_of_whole(reward):
            lines.append(f"{reward.name}: {reward.value:g}")
        elif reward.target_span in numbers:
            lines.append(f"{reward.name} of call {numbers[reward.target_span]}: {reward.value:g}")
        elif reward.target_role == role:
            lines.append(f"{reward.name} of this role: {reward.value:g}")
    events = sorted((one for one in records.spans if one.kind is Kind.EVENT), key=lambda one: one.start_ns)
    if len(events) > MOST_EVENTS:
        lines.append(f"[{len(events) - MOST_EVENTS} earlier events are left out]")
    for span in events[-MOST_EVENTS:]:
        where = "" if span.role in (role, MAIN_ROLE) else f" in {span.role!r}"
        told = ", ".join(f"{name}: {as_text(value)}" for name, value in span.attributes.items())
        lines.append(f"{span.name}{where}: {cut(told)}")
    if rollout.error is not None:
        lines.append(f"the run failed with {rollout.error_type}: {cut(rollout.error)}")
    return lines


def is_of_whole(reward: Reward) -> bool:
    """Say whether a reward is no single role's or call's."""
    return reward.target_role is None and reward.target_span is None


def as_text(value: object) -> str:
    """Return a text as it is, any other JSON value as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=repr).decode()


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text without its middle where it is too long, which is said."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n[{len(text) - 2 * half} characters cut]\n{text[-half:]}"
