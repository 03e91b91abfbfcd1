"""The tokens of an answer that somebody else gave: as this model would have had to say it.

One idea: the chat template writes the answer, and what it wrote is read back as an engine reads a sampled answer. Only
when the same message comes out are these tokens an answer to imitate.
One trap: some templates write an empty thought in front of an answer that came without one. An app would see it in the
text, so words that the template adds by itself are left out; special tokens in their place are the model's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from leyden.conversations import same_calls
from leyden_plugins.chat.templates import PROBE_ANSWER, Chat, absent

Messages = Sequence[Mapping[str, object]]


def answer_tokens(
    chat: Chat,
    prompt: Sequence[int],
    messages: Messages,
    answer: Mapping[str, object],
    *,
    tools: Messages,
    ends: frozenset[int],
) -> tuple[int, ...] | None:
    """Return the tokens that follow `prompt` when `answer` is given, up to and including the first of `ends`.

    `None`: the whole conversation does not begin with the prompt's tokens, the answer has no end, or it would be read
    as another message. A thought (`reasoning_content`) that the template does not write is left out.

    Raises:
        ConfigurationError: the template refuses these messages.
    """
    turn = chat.turn(messages, answer, tools=tools)
    if turn is None:
        return None
    before, written = turn
    if not answer.get("reasoning_content"):
        written = written.removeprefix(added_words(chat, messages, tools))
    whole = chat.codec.encode(before + written)
    rest = whole[len(prompt) :]
    end = next((place for place, token in enumerate(rest) if token in ends), None)
    if list(whole[: len(prompt)]) != list(prompt) or end is None:
        return None
    found = tuple(rest[: end + 1])
    return found if says(chat, found[:-1], answer, reads_calls=bool(tools or answer.get("tool_calls"))) else None


def added_words(chat: Chat, messages: Messages, tools: Messages) -> str:
    """Return the words that the template writes in front of any answer; none where special tokens are among them."""
    probe = absent(PROBE_ANSWER, msgspec.json.encode((messages, tools)).decode())
    turn = chat.turn(messages, {"role": "assistant", "content": probe}, tools=tools)
    added, found, _ = (turn[1] if turn else "").partition(probe)
    return added if found and not chat.codec.special.intersection(chat.codec.encode(added)) else ""


def says(chat: Chat, token_ids: Sequence[int], answer: Mapping[str, object], *, reads_calls: bool) -> bool:
    """Say whether an engine would read these tokens as `answer`, but for white space around its text."""
    text = chat.codec.decode(token_ids, chat.shown if reads_calls else frozenset())
    calls: Messages = ()
    if reads_calls:
        parsed = chat.parse(text)
        text, calls = parsed.text, parsed.calls
    wanted = answer.get("tool_calls")
    if not same_calls(calls, wanted if isinstance(wanted, list | tuple) else ()):
        return False
    said, thought = (str(answer.get(key) or "").strip() for key in ("content", "reasoning_content"))
    if thought and thought in text:
        return text.partition(thought)[2].strip().endswith(said)
    return text.strip() == said
