"""Compare each prompt with what its rollout has said before, and on wish go on from it exactly.

One idea: the prompt of a request that extends an answered call should begin with exactly that call's tokens. Where a
template rewrites history it does not, and the fork is recorded with its cause; with exact continuation the recorded
tokens are taken as they are, and only what was added is rendered.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from leyden.interfaces import ContinuesExactly, GenerationRequest
from leyden.spans import Fork, ForkCause
from leyden.tokentree import common_prefix
from leyden_plugins.gateway.conversations import (
    Answered,
    Conversation,
    Conversations,
    Earlier,
    digested,
    message_key,
    speaker_of,
)
from leyden_plugins.gateway.dialects import Answer, Decode

SHOWN_BEFORE, SHOWN_AFTER = 40, 60
"""Characters of text around a break."""
SHOWN_TOKENS = 8
MARGIN = 16
"""Tokens that are spelled from before a break, so that no character is cut in two."""
MOST_CHANGED = 4
"""How many earlier calls are compared with a request that changes its history."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one request stands in its rollout."""

    conversations: Conversations
    conversation: Conversation
    speaker: bytes
    extended: Earlier | None
    """The longest earlier call that it extends, whatever its tools."""
    request: GenerationRequest
    """What the engine is asked: with the exact prompt where it goes on exactly."""
    spliced: int = 0
    """How many tokens of that prompt were recorded earlier."""


class Continuity:
    """Places requests in their rollouts."""

    def __init__(self, decode: Decode | None, exactly: ContinuesExactly | None = None) -> None:
        """Without `decode` nothing is compared; with `exactly`, an engine, requests go on exactly."""
        self._decode = decode
        self._exactly = exactly

    def place(self, request: GenerationRequest, conversations: Conversations, role: str) -> Place | None:
        """Return where a request stands; `None` for one that brings no messages."""
        if not request.messages or request.prompt_token_ids is not None:
            return None
        speaker = speaker_of(role, request.model)
        tools = () if request.tool_choice == "none" else request.tools
        conversation = digested(request.messages, tools, speaker)
        earlier = conversations.extended(conversation)
        place = Place(
            conversations=conversations,
            conversation=conversation,
            speaker=speaker,
            extended=earlier,
            request=request,
        )
        if self._exactly is None or earlier is None or earlier.call.tools != conversation.tools:
            return place
        known = earlier.call.tokens(earlier.choice)
        added = self._exactly.continuation(request, earlier.at, earlier.call.answers[earlier.choice][1])
        if added is None:
            return place
        return replace(place, request=replace(request, prompt_token_ids=[*known, *added]), spliced=len(known))

    def fork(self, place: Place, prompt: Sequence[int]) -> Fork | None:
        """Return where a prompt leaves an earlier call that it should begin with; `None`: it begins with it."""
        if self._decode is None:
            return None
        earlier = place.extended
        after = -1 if earlier is None else earlier.at
        changed = place.conversations.changed(place.conversation, place.speaker, after)
        tokens = array("i", prompt)
        for other in islice(changed, MOST_CHANGED):
            found = broken(other, tokens, self._decode, is_edited=True)
            if found is not None:
                return found
        if earlier is None:
            return None
        return broken(earlier, tokens, self._decode, is_edited=earlier.call.tools != place.conversation.tools)

    def remember(self, place: Place, span_id: str, answer: Answer) -> None:
        """Keep an answered call for those that go on from it."""
        place.conversations.remember(
            Answered(
                span_id=span_id,
                speaker=place.speaker,
                chain=b"".join(place.conversation.chain),
                last=place.conversation.keys[-1],
                tools=place.conversation.tools,
                prompt_token_ids=array("i", answer.prompt_token_ids),
                answers=[(message_key(choice.spoken), array("i", choice.token_ids)) for choice in answer.choices],
            )
        )


def broken(earlier: Earlier, prompt: array[int], decode: Decode, *, is_edited: bool) -> Fork | None:
    """Return the fork of a prompt from an earlier call; `None` when it begins with all of that call's tokens."""
    known = earlier.call.tokens(earlier.choice)
    position = common_prefix(known, prompt)
    if position == len(known):
        return None
    start = max(0, position - MARGIN)
    expected, found = decode(known[start:]), decode(prompt[start:])
    cause = ForkCause.EDIT if is_edited else ForkCause.TEMPLATE
    if not is_edited and found.startswith(expected):
        cause = ForkCause.TOKENISATION
        before = decode(known[start:position])
        expected, found = (
            "|".join(decode([token]) for token in tokens[position : position + SHOWN_TOKENS])
            for tokens in (known, prompt)
        )
    else:
        before = expected[: common_prefix(expected, found)]
        expected, found = expected[len(before) :], found[len(before) :]
    return Fork(
        span_id=earlier.call.span_id,
        position=position,
        cause=cause,
        before=before[-SHOWN_BEFORE:],
        expected=expected[:SHOWN_AFTER],
        found=found[:SHOWN_AFTER],
    )
