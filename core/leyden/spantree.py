"""A rollout's records as a tree: spans in order of time, with the completions and rewards that belong to each.

One idea: the terminal and the report walk the same list of `Node`. One trap: records come from whatever the agent
did, so a parent may be missing or point in a circle; every span appears exactly once all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from leyden.interfaces import RolloutRecords
from leyden.spans import Completion, Kind, Reward, Span

SHOWN_ELSEWHERE = frozenset({"leyden.rewards"})
"""Attributes that stand in the tree in another form."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One span in its place."""

    span: Span
    depth: int
    """0 for a span without a known parent."""
    last_S: tuple[bool, ...]
    """Whether this span, and each of those above it, is the last child of its parent; outermost first."""
    completions: Sequence[Completion]
    """Its HTTP attempts, in order."""
    rewards: Sequence[Reward]
    """Those that target this span."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a prompt or an answer, as text."""

    role: str
    text: str


def nodes(records: RolloutRecords) -> list[Node]:
    """Return the spans depth first, children by start time."""
    completions: dict[str, list[Completion]] = defaultdict(list)
    for completion in sorted(records.completions, key=lambda one: one.http_attempt):
        completions[completion.span_id].append(completion)
    rewards: dict[str, list[Reward]] = defaultdict(list)
    for reward in records.rewards:
        if reward.target_span is not None:
            rewards[reward.target_span].append(reward)
    return [
        Node(
            span=span,
            depth=len(last) - 1,
            last_S=last,
            completions=completions[span.span_id],
            rewards=rewards[span.span_id],
        )
        for span, last in _in_order(records.spans)
    ]


def _in_order(spans: Sequence[Span]) -> list[tuple[Span, tuple[bool, ...]]]:
    known = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda one: (one.start_ns, one.sequence)):
        children[span.parent_id if span.parent_id in known else None].append(span)
    seen: set[str] = set()
    order: list[tuple[Span, tuple[bool, ...]]] = []
    # The spans themselves stand behind the roots: what lies in a circle of parents is reached no other way.
    for roots in (children[None], sorted(spans, key=lambda one: one.start_ns)):
        stack: list[tuple[Span, tuple[bool, ...]]] = []
        stack += [(span, (index == 0,)) for index, span in enumerate(reversed(roots))]
        while stack:
            span, last = stack.pop()
            if span.span_id in seen:
                continue
            seen.add(span.span_id)
            order.append((span, last))
            below = children[span.span_id]
            stack += [(child, (*last, index == 0)) for index, child in enumerate(reversed(below))]
    return order


def attributes_of(span: Span) -> list[tuple[str, object]]:
    """Return the attributes worth reading, by name: none that are empty or repeat who speaks or its rewards."""
    told = ("", span.name, span.role)
    return [
        (name, value)
        for name, value in sorted(span.attributes.items())
        if value is not None and value not in ([], {}, *told) and name not in SHOWN_ELSEWHERE
    ]


def prompt_of(span: Span) -> list[Message]:
    """Return what a model call was asked; empty where nobody recorded it."""
    return _messages(span.attributes.get("gen_ai.input.messages"))


def answer_of(node: Node) -> list[Message]:
    """Return what a model call answered: the messages recorded on the span, else the completions' own text."""
    spoken = _messages(node.span.attributes.get("gen_ai.output.messages"))
    if spoken or not node.completions:
        return spoken
    return [Message(role="assistant", text=choice.text) for choice in node.completions[-1].choices]


def _messages(value: object) -> list[Message]:
    if isinstance(value, str):
        return [Message(role="user", text=value)] if value else []
    if not isinstance(value, list):
        return []
    return [
        Message(role=str(one.get("role", "")), text=_message_text(one))
        if isinstance(one, Mapping)
        else Message(role="", text=as_text(one))
        for one in value
    ]


def _message_text(message: Mapping[str, object]) -> str:
    """Return a chat message's text, its parts joined, with its tool calls."""
    content = message.get("content") or message.get("parts") or ""
    pieces = content if isinstance(content, list) else [content]
    found = [
        as_text(piece.get("text") or piece.get("content") or piece) if isinstance(piece, Mapping) else as_text(piece)
        for piece in pieces
    ]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if isinstance(function, Mapping):
            found.append(f"{function.get('name')}({as_text(function.get('arguments', function.get('args', '')))})")
    return "\n".join(piece for piece in found if piece)


def as_text(value: object) -> str:
    """Return a JSON value as text: strings as they are, the rest as JSON."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return repr(value)


def token_counts(node: Node) -> tuple[int, int] | None:
    """Return a model call's prompt and answer tokens, from its last completion or else what the endpoint said."""
    if node.completions:
        last = node.completions[-1]
        return len(last.prompt_token_ids), sum(len(choice.token_ids) for choice in last.choices)
    counts = [node.span.attributes.get(f"gen_ai.usage.{side}_tokens") for side in ("input", "output")]
    prompt, answer = (count if isinstance(count, int) else None for count in counts)
    return None if prompt is None or answer is None else (prompt, answer)


def model_calls(records: RolloutRecords) -> int:
    """Count a rollout's model calls."""
    return sum(span.kind is Kind.MODEL_CALL for span in records.spans)
