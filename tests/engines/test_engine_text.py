"""Text out of tokens: characters over several tokens, stop strings, tool calls, templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyden.errors import ConfigurationError
from leyden.interfaces import GenerationRequest, SamplingParameters
from leyden_plugins.chat.templates import HERMES, CallForm, Chat
from leyden_plugins.chat.text import Codec, TextStream
from tests.engines.asking import ask, request, running
from tests.tiny import END, HERMES_TEMPLATE, PLAIN_TEMPLATE, VOCABULARY, tiny_tokenizer

CODEC = Codec(tiny_tokenizer())
CALL = {"name": "search", "arguments": {"query": "Zürich", "n": 2}}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def pieces(text: TextStream, token_ids: list[int]) -> list[str]:
    given = []
    for token in token_ids:
        given.append(text.push((token,)))
        if text.is_stopped:
            break
    return [*given, text.finish()]


@given(st.text(max_size=30))
def test_pieces_join_to_the_text_and_never_hold_half_a_character(text: str) -> None:
    token_ids = CODEC.encode(text)
    given_out = pieces(TextStream(CODEC), token_ids)
    assert "".join(given_out) == CODEC.decode(token_ids) == text


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=40))
def test_any_tokens_stream_to_their_decoded_text(token_ids: list[int]) -> None:
    assert "".join(pieces(TextStream(CODEC), token_ids)) == CODEC.decode(token_ids)


def test_a_character_is_given_out_with_its_last_token() -> None:
    token_ids = CODEC.encode("aü🙂b")
    assert pieces(TextStream(CODEC), token_ids) == ["a", "", "ü", "", "", "", "🙂", "b", ""]


def test_special_tokens_are_not_text() -> None:
    assert CODEC.decode([*CODEC.encode("yes"), END]) == "yes"
    assert CODEC.decode([END, *CODEC.encode("yes")], frozenset({END})) == "<|end|>yes"


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(CODEC, stop=stop)
    given_out = "".join(pieces(stream, CODEC.encode(text)))
    # A stop string counts once it is complete; of those complete at one token, the one that begins first.
    ends = [text.find(one) + len(one) for one in stop if one in text]
    seen = text[: min(ends, default=0)]
    first = min((seen.find(one) for one in stop if one in seen), default=None)
    assert given_out == stream.text == text[:first]
    assert stream.is_stopped == bool(ends)


def test_what_may_become_a_stop_string_waits() -> None:
    assert pieces(TextStream(CODEC, stop=["<end>"]), CODEC.encode("a<enx")) == ["a", "", "", "", "<enx", ""]


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_answer_and_keeps_all_tokens(qwen: Path, stream: bool) -> None:
    prompt = CODEC.encode("hello")
    async with running(qwen) as engine:
        free = await ask(engine, request(prompt, temperature=0.0, max_tokens=40))
        stop = next(free.text[at : at + 2] for at in range(3, 30) if free.text[at : at + 2].isascii())
        stopped = await ask(engine, request(prompt, temperature=0.0, max_tokens=40, stop=(stop,), stream=stream))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert CODEC.decode(stopped.token_ids).startswith(stopped.text + stop[0])


@pytest.mark.anyio
async def test_streaming_gives_the_same_answer_in_pieces(qwen: Path) -> None:
    prompt = CODEC.encode("hello")
    async with running(qwen) as engine:
        whole = await ask(engine, request(prompt, seed=1, max_tokens=60))
        streamed = await ask(engine, request(prompt, seed=1, max_tokens=60, stream=True))
    assert len(whole.deltas) == 1
    assert len(streamed.deltas) == 60
    assert streamed.token_ids == whole.token_ids
    assert streamed.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
    assert streamed.text == whole.text == CODEC.decode(whole.token_ids)


@pytest.mark.parametrize(
    ("template", "form", "takes_strings"),
    [
        (PLAIN_TEMPLATE, CallForm(opening="<|call|>", between=" "), True),
        (HERMES_TEMPLATE, HERMES, False),
        (HERMES_TEMPLATE.replace("\n<tool_call>", "<think>\n\n</think>\n\n<tool_call>"), HERMES, False),
        (
            HERMES_TEMPLATE.replace("\n<tool_call>\n", "")
            .replace("\n</tool_call>", "")
            .replace('"arguments"', '"parameters"'),
            CallForm(opening="", arguments_key="parameters"),
            False,
        ),
    ],
    ids=["name-then-arguments", "hermes", "hermes-after-thought", "bare-json"],
)
def test_the_form_of_calls_is_learnt_from_the_template_and_read_back(
    template: str, form: CallForm, takes_strings: bool
) -> None:
    chat = Chat(Codec(tiny_tokenizer(template)))
    assert (chat.forms[0], chat.takes_strings) == (form, takes_strings)
    messages = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "" if form.opening == "" else "Let me see.",
            "tool_calls": [
                {"id": "1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}
            ],
        },
    ]
    rendered = chat.codec.decode(chat.prompt(messages, ()), chat.codec.special)
    answer = rendered.split("<|assistant|>")[1].removesuffix("<|end|>")
    parsed = chat.parse(answer)
    assert parsed.text.split("<think>")[0] == messages[1]["content"]
    (call,) = parsed.calls
    function = call["function"]
    assert isinstance(function, dict)
    assert {"name": function["name"], "arguments": json.loads(function["arguments"])} == CALL
    assert call["type"] == "function"
    assert str(call["id"]).startswith("call_")


def test_hermes_calls_are_read_whatever_the_template_and_several_at_once() -> None:
    written = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    parsed = Chat(CODEC).parse(f"I look.\n{written}\n{written}")
    assert parsed.text == "I look."
    assert [call["function"]["name"] for call in parsed.calls] == ["search", "search"]  # type: ignore[index]
    assert len({str(call["id"]) for call in parsed.calls}) == 2


@pytest.mark.parametrize("broken", ["<tool_call>{", "<tool_call>[1]", "<|call|>search", '<tool_call>{"name": 3}'])
def test_a_malformed_call_is_text(broken: str) -> None:
    assert Chat(CODEC).parse(broken) == Chat(CODEC).parse("x").__class__(text=broken, calls=())


def test_prompts_are_rendered_once_and_told_apart_by_everything() -> None:
    chat = Chat(CODEC)
    ask_x = [{"role": "user", "content": "x"}]
    assert chat.prompt(ask_x, ()) is chat.prompt([dict(ask_x[0])], ())
    assert chat.prompt(ask_x, (TOOL,)) != chat.prompt(ask_x, ())
    assert chat.codec.decode(chat.prompt(ask_x, ()), chat.codec.special) == "<|user|>x<|end|><|assistant|>"


def test_content_parts_are_joined_and_pictures_refused() -> None:
    chat = Chat(CODEC)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat.prompt([{"role": "user", "content": parts}], ()) == chat.prompt([{"role": "user", "content": "ab"}], ())
    with pytest.raises(ConfigurationError, match="type 'image_url'; this engine reads text only"):
        chat.prompt([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], ())


def test_a_template_that_refuses_says_which_roles_it_got() -> None:
    chat = Chat(Codec(tiny_tokenizer("{{ raise_exception('no') if messages[0].role == 'tool' }}")))
    with pytest.raises(ConfigurationError, match=r"refuses these messages: no. Roles in order: \['tool'\]"):
        chat.prompt([{"role": "tool", "content": "x"}], ())


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, HERMES_TEMPLATE], ids=["own", "hermes"])
async def test_a_sampled_call_is_given_once_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, template: str
) -> None:
    from leyden_plugins.engines.transformers import sampling
    from tests.tiny import tiny_checkpoint

    form = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    if template is PLAIN_TEMPLATE:
        form = f"<|call|>search {json.dumps(CALL['arguments'])}"
    script = [*CODEC.encode(f"I look. {form}"), END]

    def scripted(self: sampling.Sampler, logits):  # type: ignore[no-untyped-def]
        tokens = [script[len(row.token_ids)] for row in self.rows]
        chosen = logits.new_tensor(tokens).long()
        return sampling.Chosen(tokens_B=chosen, logprobs_B=chosen * 0.0)

    monkeypatch.setattr(sampling.Sampler, "choose", scripted)
    wanted = GenerationRequest(
        model="base",
        messages=[{"role": "user", "content": "x"}],
        tools=[TOOL],
        stream=stream,
        sampling=SamplingParameters(),
    )
    async with running(tiny_checkpoint(tmp_path, template=template), eos=None) as engine:
        answer = await ask(engine, wanted)
    assert answer.finish_reason == "tool_calls"
    assert answer.token_ids == script
    assert answer.text.rstrip() == "I look."
    (call,) = answer.tool_calls
    assert call["function"]["name"] == "search"
    assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
    assert [bool(delta.tool_calls) for delta in answer.deltas][-1]
