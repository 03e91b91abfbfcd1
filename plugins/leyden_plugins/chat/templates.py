"""Render chats through the model's own template, and read tool calls back out of answers.

One idea: how a template writes a tool call is learnt by rendering one with known names, so that the calls which
a model was trained on are recognised without a table of models. The hermes form (`<tool_call>{json}</tool_call>`,
NousResearch's Hermes function calling) is always recognised too.
One trap: a call's arguments reach the template as the string the model sampled where the template takes strings,
otherwise as an object, which the template may format differently.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden_plugins.chat.text import Codec

with extra("train"):
    from jinja2 import TemplateError

REMEMBERED_PROMPTS = 1024
PROBE_NAME, PROBE_KEY, PROBE_VALUE = "leyden_probe_name", "leyden_probe_key", "leyden_probe_value"
PROBE_ANSWER = "leyden_probe_answer"
PROBE_ARGUMENTS = json.dumps({PROBE_KEY: PROBE_VALUE})

ToolCall = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a model writes a tool call: `opening {json}`, or `opening name between {arguments}`."""

    opening: str
    """Empty: the whole answer is the call."""
    between: str | None = None
    """Stands between the name and its arguments; `None`: both are inside one JSON object."""
    name_key: str = "name"
    arguments_key: str = "arguments"


HERMES = CallForm(opening="<tool_call>")


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """An answer taken apart."""

    text: str
    """What stands before the first call."""
    calls: Sequence[ToolCall]


class Chat:
    """One tokenizer's template: messages to tokens, answers to text and calls."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.takes_strings = False
        self.forms: tuple[CallForm, ...] = (HERMES,)
        self._prompts: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._prompts_lock = threading.Lock()
        if getattr(codec.tokenizer, "chat_template", None):
            self._learn_form()
        openings = "".join(form.opening for form in self.forms)
        self.shown = frozenset(
            token for token in codec.special if str(codec.tokenizer.convert_ids_to_tokens(token)) in openings
        )
        """Special tokens that are part of a call, so that text with tools shows them."""

    def prompt(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
    ) -> tuple[int, ...]:
        """Return the tokens that ask for the next message. The samples of a group render once.

        Raises:
            ConfigurationError: the template refuses these messages, or they hold more than text.
        """
        key = msgspec.json.encode((messages, tools))
        with self._prompts_lock:  # an engine that is served twice renders on two loops
            known = self._prompts.get(key)
            if known is not None:
                self._prompts.move_to_end(key)
                return known
        text = self._render([self._message(message) for message in messages], tools, ask=True)
        tokens = tuple(self.codec.encode(text))
        with self._prompts_lock:
            self._prompts[key] = tokens
            if len(self._prompts) > REMEMBERED_PROMPTS:
                self._prompts.popitem(last=False)
        return tokens

    def continuation(
        self,
        messages: Sequence[Mapping[str, object]],
        answered: int,
        answer_ids: Sequence[int],
        *,
        tools: Sequence[Mapping[str, object]],
        ends: frozenset[int],
    ) -> tuple[int, ...] | None:
        """Return the tokens that follow a sampled answer, which is `messages[answered]`.

        The conversation is rendered with known words in the place of the answer, and what stands behind them is
        taken: the end of the turn, the later messages, and what asks for the next one. An end that was sampled (one
        of `ends`) is not repeated. `None`: the template refuses such a conversation, or does not show the words exactly
        once, so that where the answer ends is unknown.
        """
        turns = [self._message(message) for message in messages]
        turns[answered] = {"role": "assistant", "content": ""}
        probe = absent(PROBE_ANSWER, msgspec.json.encode((turns, tools)).decode())
        turns[answered]["content"] = probe
        try:
            text = self._render(turns, tools, ask=True)
        except ConfigurationError:
            return None
        _, words, after = text.partition(probe)
        if not words or probe in after:
            return None
        tokens = self.codec.encode(after)
        if tokens and answer_ids:
            is_ended = tokens[0] == answer_ids[-1] or (tokens[0] in ends and answer_ids[-1] in ends)
            tokens = tokens[1:] if is_ended else tokens
        return tuple(tokens)

    def turn(
        self,
        messages: Sequence[Mapping[str, object]],
        answer: Mapping[str, object],
        *,
        tools: Sequence[Mapping[str, object]],
    ) -> tuple[str, str] | None:
        """Return the prompt's text and what the template writes behind it for `answer`, up to the end of all.

        `None`: the template asks for an answer with words that it leaves out once the answer is there.

        Raises:
            ConfigurationError: the template refuses these messages.
        """
        asked = [self._message(message) for message in messages]
        before = self._render(asked, tools, ask=True)
        whole = self._render([*asked, self._message(answer)], tools, ask=False)
        return (before, whole[len(before) :]) if whole.startswith(before) else None

    def parse(self, text: str) -> Parsed:
        """Split an answer at its first tool call; an answer without a well-formed one is all text."""
        for form in self.forms:
            calls, start = read_calls(text, form)
            if calls:
                return Parsed(text=text[:start].rstrip(), calls=calls)
        return Parsed(text=text, calls=())

    def _render(self, messages: list[dict[str, object]], tools: Sequence[Mapping[str, object]], *, ask: bool) -> str:
        try:
            return str(
                self.codec.tokenizer.apply_chat_template(
                    messages,  # type: ignore[arg-type]  # declared as text only; tool calls are lists
                    tools=[dict(tool) for tool in tools] or None,
                    add_generation_prompt=ask,
                    tokenize=False,
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"the model's chat template refuses these messages: {error}. Roles in order: "
                f"{[message.get('role') for message in messages]!r}"
            ) from error

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        changed = dict(message)
        content = changed.get("content")
        if isinstance(content, list | tuple):
            changed["content"] = "".join(text_of(part) for part in content)
        calls = changed.get("tool_calls")
        if isinstance(calls, list | tuple):
            changed["tool_calls"] = [self._call(call) for call in calls]
        return changed

    def _call(self, call: object) -> object:
        if self.takes_strings or not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
            return call
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments or "{}")
            except json.JSONDecodeError:
                # A model may have written what is no JSON; the template then shows what it wrote.
                return call
        return {**call, "function": function}

    def _learn_form(self) -> None:
        """Render one call with known names and see what the template makes of it."""
        ask: list[dict[str, object]] = [{"role": "user", "content": "x"}]
        for as_string in (True, False):
            arguments = PROBE_ARGUMENTS if as_string else json.loads(PROBE_ARGUMENTS)
            function = {"name": PROBE_NAME, "arguments": arguments}
            call = {"id": "call_0", "type": "function", "function": function}
            answer: dict[str, object] = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                before = self._render(ask, (), ask=True)
                whole = self._render([*ask, answer], (), ask=False)
            except ConfigurationError:
                continue  # a template without tools, or one that wants objects
            form = infer_form(whole[len(before) :]) if whole.startswith(before) else None
            if form is not None:
                self.takes_strings = as_string
                self.forms = (form,) if form == HERMES else (form, HERMES)
                return


def absent(word: str, text: str) -> str:
    """Return `word`, with a number behind it where `text` holds it already: the first that is not there."""
    numbered = (f"{word}_{number}" for number in itertools.count())
    return next(found for found in itertools.chain([word], numbered) if found not in text)


def text_of(part: object) -> str:
    """Return the text of one content part.

    Raises:
        ConfigurationError: it is not text.
    """
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ConfigurationError(f"a message holds a part of type {kind!r}; this engine reads text only")


def infer_form(turn: str) -> CallForm | None:
    """Read off a rendered turn how the template wrote `PROBE_NAME` and its arguments."""
    name_at = turn.find(PROBE_NAME)
    for brace in re.finditer(r"\{", turn):
        try:
            value, _ = json.JSONDecoder().raw_decode(turn, brace.start())
        except json.JSONDecodeError:
            continue
        if value == json.loads(PROBE_ARGUMENTS) and 0 <= name_at < brace.start():
            between = turn[name_at + len(PROBE_NAME) : brace.start()]
            return CallForm(opening=last_line(turn[:name_at]), between=between)
        names = [key for key, inner in value.items() if inner == PROBE_NAME]
        arguments = [key for key, inner in value.items() if inner == json.loads(PROBE_ARGUMENTS)]
        if names and arguments:
            opening = last_line(turn[: brace.start()])
            return CallForm(opening=opening, name_key=names[0], arguments_key=arguments[0])
    return None


def last_line(text: str) -> str:
    """Return the last line that is not blank: what stands before it, such as an empty thought, is no marker."""
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")


def read_calls(text: str, form: CallForm) -> tuple[list[ToolCall], int]:
    """Return the calls in `text` and where the first begins."""
    calls: list[ToolCall] = []
    first = len(text)
    at = text.find(form.opening) if form.opening else 0
    while at >= 0:
        found = read_call(text, at + len(form.opening), form)
        if found is not None:
            first = min(first, at)
            calls.append(found)
        at = text.find(form.opening, at + len(form.opening)) if form.opening else -1
    return calls, first


def read_call(text: str, start: int, form: CallForm) -> ToolCall | None:
    """Read one call whose opening ends at `start`; `None` when it is not well-formed."""
    name: object
    if form.between is None:
        value = read_json(text, start)
        if value is None or not isinstance(value.get(form.name_key), str):
            return None
        name, arguments = value[form.name_key], value.get(form.arguments_key, {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    else:
        named = re.compile(r"\s*([\w.-]+)\s*" + re.escape(form.between.strip())).match(text, start)
        if named is None or read_json(text, named.end()) is None:
            return None
        name = named.group(1)
        begin = text.index("{", named.end())
        written = text[begin : json.JSONDecoder().raw_decode(text, begin)[1]]
    identity = f"call_{os.urandom(12).hex()}"
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": written}}


def read_json(text: str, start: int) -> dict[str, object] | None:
    """Read the JSON object at `start`, after white space."""
    begin = re.compile(r"\s*").match(text, start)
    try:
        value, _ = json.JSONDecoder().raw_decode(text, begin.end() if begin else start)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
