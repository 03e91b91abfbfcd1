"""Remember a rollout's answered calls, so that a later request is known to go on from one of them.

One idea: a conversation is a chain of digests, one a message, so that the longest earlier call which a request extends
is found by looking up its prefixes, and an answered call costs its tokens and 16 bytes a message.
One trap: messages come back in another dress (no content for an empty one, arguments parsed and spelled again,
reasoning in a field of its own), so what is digested is what a message means.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

MOST_TOKENS = 2**20
"""Of all remembered calls of an admission together; beyond it the oldest are forgotten, and no longer compared with."""

DIGEST_BYTES = 16
CALL_COST = 256
"""What a call takes beside its tokens, in tokens of 4 bytes."""

THOUGHT = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A request's messages, digested."""

    keys: Sequence[bytes]
    """One a message: what it means."""
    chain: Sequence[bytes]
    """One a message: of all messages up to it, and of who speaks."""
    is_answer: Sequence[bool]
    """One a message: it is the assistant's."""
    system: int
    """How many system messages it begins with."""
    tools: bytes
    """Of the tools that the prompt shows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answered:
    """A call that was answered."""

    span_id: str
    speaker: bytes
    chain: bytes
    """The digests of its conversation, joined."""
    last: bytes
    """The key of the message that it answers."""
    tools: bytes
    prompt_token_ids: array[int]
    answers: Sequence[tuple[bytes, array[int]]]
    """One a choice: the key of the message that the client got, and its tokens."""

    def tokens(self, choice: int) -> array[int]:
        """Return the prompt and one answer to it."""
        return self.prompt_token_ids + self.answers[choice][1]

    @property
    def cost(self) -> int:
        """Roughly its memory, in tokens."""
        answers = sum(len(tokens) for _, tokens in self.answers)
        return len(self.prompt_token_ids) + answers + len(self.chain) // 4 + CALL_COST


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """An earlier call that a request goes on from, or repeats with changes."""

    call: Answered
    choice: int
    at: int
    """Which message of the request is its answer, or stands in its place."""


class Conversations:
    """The answered calls of one admission."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most = most_tokens
        self._tokens = 0
        self._calls: deque[Answered] = deque()
        self._after: dict[bytes, tuple[Answered, int]] = {}
        """Digest of a conversation with its answer -> the call and the choice."""

    def __len__(self) -> int:
        return len(self._calls)

    def extended(self, conversation: Conversation) -> Earlier | None:
        """Return the longest earlier call that the messages extend, with the choice that they repeat."""
        for at in range(len(conversation.chain) - 1, -1, -1):
            found = self._after.get(conversation.chain[at])
            if found is not None:
                return Earlier(call=found[0], choice=found[1], at=at)
        return None

    def changed(self, conversation: Conversation, speaker: bytes, after: int) -> Iterator[Earlier]:
        """Yield the calls whose conversation the messages repeat with changes, newest first.

        That is so where an answer stands beyond message `after`, behind other messages than it was given to (but not
        in a conversation that shares no more than a system prompt, unless the message it answers is there too), or
        where another answer stands in its place.
        """
        is_answer, chain = conversation.is_answer, b"".join(conversation.chain)
        places = [at for at in range(after + 1, len(is_answer) - 1) if is_answer[at]]
        for call in reversed(self._calls) if places else ():
            if call.speaker != speaker:
                continue
            shared = shared_messages(call.chain, chain)
            for at in reversed(places):
                choice = next((i for i, (key, _) in enumerate(call.answers) if key == conversation.keys[at]), None)
                is_same_place = at > 0 and conversation.keys[at - 1] == call.last
                if choice is not None and at >= shared and (shared > conversation.system or is_same_place):
                    yield Earlier(call=call, choice=choice, at=at)
                    break
                if at == shared == len(call.chain) // DIGEST_BYTES:
                    yield Earlier(call=call, choice=0, at=at)
                    break

    def remember(self, call: Answered) -> None:
        """Keep a call, and forget the oldest when there is too much."""
        self._calls.append(call)
        self._tokens += call.cost
        for choice in reversed(range(len(call.answers))):
            self._after[self._key(call, choice)] = call, choice
        while self._tokens > self._most and self._calls:
            oldest = self._calls.popleft()
            self._tokens -= oldest.cost
            for choice in range(len(oldest.answers)):
                key = self._key(oldest, choice)
                if key in self._after and self._after[key][0] is oldest:
                    del self._after[key]

    @staticmethod
    def _key(call: Answered, choice: int) -> bytes:
        return link(call.chain[-DIGEST_BYTES:], call.answers[choice][0])


def digested(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]], speaker: bytes
) -> Conversation:
    """Return the digests of a request's messages and tools."""
    keys = [message_key(message) for message in messages]
    chain: list[bytes] = []
    for key in keys:
        chain.append(link(chain[-1] if chain else speaker, key))
    return Conversation(
        keys=keys,
        chain=chain,
        is_answer=[message.get("role") == "assistant" for message in messages],
        system=next((at for at, message in enumerate(messages) if message.get("role") != "system"), len(messages)),
        tools=digest(list(tools)),
    )


def speaker_of(role: str, policy: str) -> bytes:
    """Return the digest of who speaks, with which every chain begins."""
    return digest([role, policy])


def digest(value: object) -> bytes:
    """Return the digest of a JSON value, whatever the order of its keys."""
    return blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=DIGEST_BYTES).digest()


def link(before: bytes, key: bytes) -> bytes:
    """Return the digest of a conversation that is one message longer."""
    return blake2b(before + key, digest_size=DIGEST_BYTES).digest()


def message_key(message: Mapping[str, object]) -> bytes:
    """Return the digest of what a chat message means, whatever the form in which it came."""
    calls = message.get("tool_calls")
    content = message.get("content") or ""
    thought: object = message.get("reasoning_content") or ""
    if message.get("role") == "assistant" and isinstance(content, str) and THOUGHT[1] in content and not thought:
        # The tag that opens a thought may stand in the prompt.
        opened, _, content = content.partition(THOUGHT[1])
        thought = opened.strip().removeprefix(THOUGHT[0])
    if thought:
        # Whoever takes a thought out of an answer also takes the blank lines around it.
        thought, content = str(thought).strip(), str(content).strip()
    said = [message_call(call) for call in calls] if isinstance(calls, Sequence) else []
    if message.get("role") == "assistant":
        return digest(["assistant", content, thought, said])  # a name that a framework gave it is not the model's
    return digest([message.get("role"), content, thought, said, message.get("name"), message.get("tool_call_id")])


def message_call(call: object) -> object:
    """Return a tool call's name and arguments; its id is not the model's."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        # As text, because a model may write numbers that have no place in 64 bits.
        arguments = json.dumps(parsed, sort_keys=True)
    except (ValueError, TypeError, RecursionError):
        pass  # no JSON: compared as it was written
    return [function.get("name"), arguments]


def shared_messages(first: bytes, second: bytes) -> int:
    """Return how many leading messages two joined chains share."""
    shared, differ = 0, min(len(first), len(second)) // DIGEST_BYTES + 1
    while differ - shared > 1:
        # A link digests everything before it, so one equal link says that all before are equal.
        middle = (shared + differ) // 2
        start, end = (middle - 1) * DIGEST_BYTES, middle * DIGEST_BYTES
        if first[start:end] == second[start:end]:
            shared = middle
        else:
            differ = middle
    return shared
