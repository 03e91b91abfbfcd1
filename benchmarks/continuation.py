"""Measure what exact continuation saves: tokens in merged rows over tokens in one row a call, with it and without.

Conversations of a thinking agent under Qwen3's own chat template, which drops the reasoning of earlier turns, and of a
tool-using agent under Qwen2.5's, which writes tool calls anew. No model is run: what counts is which tokens the prompts
begin with. Tokens are bytes and the templates' special tokens; the ratio depends on how long the parts are, which the
options say, not on how they are cut.

    python -m benchmarks.continuation --turns 6
"""

from __future__ import annotations

import argparse
import json
import random
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from leyden.interfaces import GenerationRequest, Sample
from leyden.layouts import merged
from leyden_plugins.chat.templates import Chat
from leyden_plugins.chat.text import Codec
from leyden_plugins.gateway.continuity import Continuity
from leyden_plugins.gateway.conversations import Conversations
from leyden_plugins.gateway.dialects import Answer, ChoiceSoFar

TOOL = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
}
WORDS = ("the", "city", "of", "rome", "has", "more", "people", "than", "any", "other", "in", "a", "list", "by", "area")
END = "<|im_end|>"

Messages = list[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Characters of the parts of a conversation, and its number of calls."""

    turns: int
    question: int
    reasoning: int
    answer: int
    observation: int


class Templates:
    """Renders with a published chat template; no model behind it."""

    def __init__(self, name: str) -> None:
        template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
        special = sorted({*re.findall(r"<\|[a-z_]+\|>", template), END})
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bare = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bare.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END, extra_special_tokens=special)
        tokenizer.chat_template = template
        self.chat = Chat(Codec(tokenizer))
        (self.end,) = self.chat.codec.encode(END)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Spell tokens."""
        return self.chat.codec.decode(token_ids, self.chat.codec.special)

    def continuation(
        self, request: GenerationRequest, answered: int, answer_ids: Sequence[int]
    ) -> Sequence[int] | None:
        """Return what follows a recorded answer."""
        ends = frozenset({self.end})
        return self.chat.continuation(request.messages, answered, answer_ids, tools=request.tools, ends=ends)


def text(length: int, rng: random.Random) -> str:
    """Return about so many characters of words."""
    return " ".join(rng.choice(WORDS) for _ in range(max(1, length // 5)))[: max(1, length)]


def thinking(lengths: Lengths, rng: random.Random) -> tuple[str, Messages]:
    """Return an answer with reasoning, and what the user says next."""
    said = f"<think>\n{text(lengths.reasoning, rng)}\n</think>\n\n{text(lengths.answer, rng)}"
    return said, [{"role": "user", "content": text(lengths.observation, rng)}]


def searching(lengths: Lengths, rng: random.Random) -> tuple[str, Messages]:
    """Return a tool call spelled as the template spells it, and the tool's result."""
    call = {"name": "search", "arguments": {"query": text(lengths.answer, rng)}}
    said = f"{text(lengths.reasoning, rng).strip()}\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return said, [{"role": "tool", "content": text(lengths.observation, rng)}]


def searching_tersely(lengths: Lengths, rng: random.Random) -> tuple[str, Messages]:
    """Do the same without the spaces that the template writes."""
    said, following = searching(lengths, rng)
    return said.replace('": ', '":').replace(', "', ',"'), following


Turn = Callable[[Lengths, random.Random], tuple[str, Messages]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One conversation's figures."""

    by_call: int
    in_rows: int
    forks: Mapping[str, int]


def converse(templates: Templates, turn: Turn, lengths: Lengths, *, exact: bool, seed: int) -> Measured:
    """Hold one conversation as the gateway would, and lay its calls out in merged rows."""
    rng = random.Random(seed)
    continuity = Continuity(templates.decode, templates if exact else None)
    conversations = Conversations()
    tools = () if turn is thinking else (TOOL,)
    messages: Messages = [{"role": "user", "content": text(lengths.question, rng)}]
    samples: list[Sample] = []
    forks: dict[str, int] = {}
    for number in range(lengths.turns):
        said, following = turn(lengths, rng)
        request = GenerationRequest(model="policy", messages=messages, tools=tools)
        place = continuity.place(request, conversations, "main")
        assert place is not None
        prompt = place.request.prompt_token_ids or templates.chat.prompt(messages, tools)
        fork = continuity.fork(place, prompt)
        if fork is not None:
            forks[fork.cause.value] = forks.get(fork.cause.value, 0) + 1
        answer_ids = [*templates.chat.codec.encode(said), templates.end]
        parsed = templates.chat.parse(said)
        choice = ChoiceSoFar(text=[parsed.text], token_ids=answer_ids, tool_calls=list(parsed.calls))
        answer = Answer(answer_id="", created_seconds=0, prompt_token_ids=prompt, choices=[choice])
        continuity.remember(place, f"call-{number}", answer)
        ones = array("d", [1.0]) * len(answer_ids)
        samples.append(
            Sample(prompt_token_ids=prompt, token_ids=answer_ids, weights=ones, advantages=ones, logprobs=ones)
        )
        messages = [*messages, choice.spoken, *following]
    by_call = sum(len(one.prompt_token_ids) + len(one.token_ids) for one in samples)
    return Measured(by_call=by_call, in_rows=sum(len(row.token_ids) for row in merged(samples)), forks=forks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="calls a conversation (default 6)")
    parser.add_argument("--question", type=int, default=400, help="characters of the first question (default 400)")
    parser.add_argument("--reasoning", type=int, default=300, help="of the reasoning before an answer (default 300)")
    parser.add_argument("--answer", type=int, default=150, help="of an answer or a tool's arguments (default 150)")
    parser.add_argument("--observation", type=int, default=200, help="of what comes back (default 200)")
    parser.add_argument("--conversations", type=int, default=20)
    options = vars(parser.parse_args())
    count = options.pop("conversations")
    lengths = Lengths(**options)
    print(f"{count} conversations of {lengths}\n")
    print(
        f"{'template':10}{'answers':20}{'continuation':14}{'tokens by call':>15}{'in merged rows':>15}"
        f"{'merge ratio':>13}  forks"
    )
    for name, turn in (("qwen3", thinking), ("qwen2_5", searching_tersely), ("qwen2_5", searching)):
        templates = Templates(name)
        for exact in (False, True):
            found = [converse(templates, turn, lengths, exact=exact, seed=seed) for seed in range(count)]
            by_call, in_rows = sum(one.by_call for one in found), sum(one.in_rows for one in found)
            causes = sorted({cause for one in found for cause in one.forks})
            forks = ", ".join(f"{cause} {sum(one.forks.get(cause, 0) for one in found)}" for cause in causes)
            print(
                f"{name:10}{turn.__name__:20}{'exact' if exact else 'rendered':14}{by_call:15,}{in_rows:15,}"
                f"{in_rows / by_call:13.3f}  {forks or 'none'}"
            )


if __name__ == "__main__":
    main()
