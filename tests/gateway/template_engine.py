"""An engine without a model that renders chats through real templates, with answers that a test spells."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from leyden.interfaces import Delta, Generation, GenerationRequest
from leyden.testing.fakes import FakeEngine, Sampled
from leyden_plugins.chat.templates import Chat
from leyden_plugins.chat.text import Codec
from tests.tiny import END, SPECIALS

REASONING_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% set ns = namespace(last=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.last %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Drops the reasoning of assistant turns before the last user turn, as Qwen3's template does."""

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{% if message.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes tool calls anew from their parsed arguments, as Qwen's and Hermes' templates do."""

CHATML_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Changes nothing."""

STRICT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | trim }}{% if message.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Insists on turns that alternate, and ends only the assistant's."""

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

Script = Callable[[GenerationRequest], "str | Spelled | list[Spelled]"]


@dataclass(frozen=True)
class Spelled:
    """One choice: its text, and its tokens where they are not the tokenizer's own."""

    text: str
    pieces: Sequence[str] = ()
    """The text cut into what each token spells."""
    is_cut: bool = False
    """Ended by its length: no end token."""


class TemplateEngine(FakeEngine):
    """Renders through a template and reads tool calls back, like a real engine; the words come from a script."""

    forces_tools = True

    def __init__(self, template: str, script: Script | Sequence[str | Spelled | list[Spelled]]) -> None:
        super().__init__()
        self.chat = Chat(Codec(merging_tokenizer(template)))
        self._answers = script

    def encode(self, text: str) -> list[int]:
        return self.chat.codec.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.chat.codec.decode(token_ids, self.chat.codec.special)

    def prompt(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.prompt_text is not None:
            return self.encode(request.prompt_text)
        tools = () if request.tool_choice == "none" else request.tools
        return list(self.chat.prompt(request.messages, tools))

    def continuation(
        self, request: GenerationRequest, answered: int, answer_ids: Sequence[int]
    ) -> tuple[int, ...] | None:
        tools = () if request.tool_choice == "none" else request.tools
        return self.chat.continuation(request.messages, answered, answer_ids, tools=tools, ends=frozenset({END}))

    async def generate(self, request: GenerationRequest) -> Generation:
        prompt = self.prompt(request)
        sampled = Sampled(request=request, version=0, prompt_token_ids=prompt)
        self.log.append(sampled)
        script = self._answers
        said = script(request) if callable(script) else script[(len(self.log) - 1) % len(script)]
        choices = said if isinstance(said, list) else [said] * request.sampling.n
        spelled = [Spelled(one) if isinstance(one, str) else one for one in choices]
        return Generation(prompt_token_ids=prompt, version=0, deltas=self.answers(request, spelled, sampled))

    async def answers(
        self, request: GenerationRequest, choices: Sequence[Spelled], sampled: Sampled
    ) -> AsyncIterator[Delta]:
        for index, choice in enumerate(choices):
            pieces = choice.pieces or [choice.text]
            ids = [token for piece in pieces for token in self.encode(piece)] + ([] if choice.is_cut else [END])
            sampled.token_ids.append(ids)
            text, calls = choice.text, ()
            if request.tools and request.tool_choice != "none" and not choice.is_cut:
                parsed = self.chat.parse(text)
                text, calls = parsed.text, parsed.calls  # type: ignore[assignment]
            reason = "length" if choice.is_cut else "tool_calls" if calls else "stop"
            half = len(ids) // 2
            yield Delta(index=index, text=text[:half], token_ids=ids[:half], logprobs=[-1.0] * half)
            yield Delta(
                index=index,
                text=text[half:],
                token_ids=ids[half:],
                logprobs=[-1.0] * (len(ids) - half),
                tool_calls=calls,
                finish_reason=reason,  # type: ignore[arg-type]
            )


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one merge, `a` and `b` to `ab`, so that a text can have two spellings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[END],
        extra_special_tokens=[*SPECIALS[1:END], *SPECIALS[END + 1 :]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
