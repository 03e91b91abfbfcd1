"""Legacy completions: prompts as text and as exact tokens, and how their answers are spelled."""

from __future__ import annotations

import pytest

from leyden.spans import Completion, Status
from leyden.testing.fakes import END_TOKEN, FakeEngine
from leyden_plugins.gateway.dialects.completions import DEFAULT_MAX_TOKENS, CompletionsDialect
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal
from tests.gateway.builders import access, asynchronous, events, named, running

PATH = "/v1/completions"


def ask(prompt: object = "once", **fields: object) -> dict[str, object]:
    return {"model": "sql", "prompt": prompt} | fields


def refused(body: dict[str, object]) -> Refusal:
    with pytest.raises(Refusal, match=r"\w") as caught:
        CompletionsDialect().read(body, decode=None, memory=Memory())
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("prompt", ["once", ["once"]])
def test_text_reaches_the_engine_as_text(prompt: object) -> None:
    request = CompletionsDialect().read(ask(prompt), decode=None, memory=Memory()).request
    assert (request.prompt_text, request.prompt_token_ids, list(request.messages)) == ("once", None, [])


@pytest.mark.parametrize("prompt", [[3, 1, 4], [[3, 1, 4]]])
def test_token_ids_reach_the_engine_as_they_are(prompt: object) -> None:
    request = CompletionsDialect().read(ask(prompt), decode=None, memory=Memory()).request
    assert (request.prompt_text, request.prompt_token_ids) == (None, [3, 1, 4])


def test_a_request_without_a_limit_gets_openais_sixteen_tokens() -> None:
    request = CompletionsDialect().read(ask(), decode=None, memory=Memory()).request
    assert request.sampling.max_tokens == DEFAULT_MAX_TOKENS == 16


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], ["a", "b"], [[1], [2]], [True], [1, "a"], [1.5], {}, 3, [[]], [["a"]]]
)
def test_anything_but_one_prompt_is_refused(prompt: object) -> None:
    assert refused(ask(prompt)).param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [("echo", True), ("suffix", "end"), ("best_of", 2), ("logit_bias", {"1": 1}), ("messages", []), ("tools", [])],
)
def test_an_unsupported_field_is_refused_by_name(field: str, value: object) -> None:
    found = refused(ask() | {field: value})
    assert (found.param, repr(field) in found.message) == (field, True)


@pytest.mark.parametrize("value", [2, -1, True, "1"])
def test_log_probabilities_of_other_than_sampled_tokens_are_refused(value: object) -> None:
    assert refused(ask(logprobs=value)).param == "logprobs"


def test_values_that_mean_nothing_are_accepted() -> None:
    body = ask(echo=False, suffix=None, best_of=1, logit_bias={}, user="u")
    asked = CompletionsDialect().read(body, decode=None, memory=Memory())
    assert asked.request == CompletionsDialect().read(ask(), decode=None, memory=Memory()).request


@asynchronous
async def test_both_kinds_of_prompt_are_recorded_with_the_exact_ids_and_a_readable_span() -> None:
    async with running(FakeEngine("upon a time")) as here:
        token = here.gateway.admit(access())
        for prompt in ("once", list(b"once")):
            answer = (await here.post(token, ask(prompt), path=PATH)).json()
            assert answer["object"] == "text_completion"
            assert answer["id"].startswith("cmpl-")
            choice = {"index": 0, "text": "upon a time", "logprobs": None, "finish_reason": "stop"}
            assert answer["choices"] == [choice]
            assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
        for completion in await here.completions():
            assert completion.prompt_token_ids == list(b"once")
            assert completion.choices[0].token_ids == [*b"upon a time", END_TOKEN]
            assert (completion.status, completion.delivered) == (Status.OK, True)
        for span in here.spans():
            assert span.name == "text_completion sql"
            assert span.attributes["gen_ai.input.messages"] == [{"role": "user", "content": "once"}]
            said = [{"role": "assistant", "content": "upon a time"}]
            assert span.attributes["gen_ai.output.messages"] == said


@asynchronous
async def test_token_ids_and_log_probabilities_are_given_when_asked_for() -> None:
    async with running(FakeEngine("hi")) as here:
        token = here.gateway.admit(access())
        answer = (await here.post(token, ask("a", logprobs=0, return_token_ids=True), path=PATH)).json()
        (choice,) = answer["choices"]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97], [*b"hi", END_TOKEN])
        assert choice["logprobs"]["tokens"] == ["h", "i", ""]
        assert choice["logprobs"]["token_logprobs"] == [FakeEngine.logprob(one) for one in [*b"hi", END_TOKEN]]
        assert choice["logprobs"]["top_logprobs"] is None


@asynchronous
async def test_several_choices_stand_in_their_order() -> None:
    async with running(FakeEngine(["one", "two"])) as here:
        token = here.gateway.admit(access())
        choices = (await here.post(token, ask(n=2), path=PATH)).json()["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "one"), (1, "two")]


@asynchronous
async def test_a_stream_of_several_choices_joins_to_what_was_sampled() -> None:
    async with running(FakeEngine(["one", "two"], tokens_per_delta=1)) as here:
        token = here.gateway.admit(access())
        body = ask(n=2, stream=True, return_token_ids=True, logprobs=0, stream_options={"include_usage": True})
        found = events(await here.post(token, body, named(), path=PATH))
        assert found[-1] == "[DONE]"
        assert found[-2]["usage"]["completion_tokens"] == 8
        assert found[0]["choices"][0]["prompt_token_ids"] == list(b"once")
        pieces = [chunk["choices"][0] for chunk in found[:-2]]
        for index, text in enumerate(["one", "two"]):
            own = [piece for piece in pieces if piece["index"] == index]
            assert "".join(piece["text"] for piece in own) == text
            assert [one for piece in own for one in piece["token_ids"]] == [*text.encode(), END_TOKEN]
            assert own[-1]["finish_reason"] == "stop"
        (completion,) = [one for one in await here.completions() if isinstance(one, Completion)]
        assert [choice.text for choice in completion.choices] == ["one", "two"]


@asynchronous
async def test_a_plain_stream_holds_nothing_that_was_not_asked_for() -> None:
    async with running(FakeEngine("hello", tokens_per_delta=2)) as here:
        token = here.gateway.admit(access())
        found = events(await here.post(token, ask(stream=True), path=PATH))
        assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == "hello"
        for chunk in found[:-1]:
            assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
            assert "usage" not in chunk


@asynchronous
async def test_a_prompt_over_the_context_length_names_the_prompt() -> None:
    async with running(FakeEngine(context_length=4)) as here:
        token = here.gateway.admit(access())
        response = await here.post(token, ask("too long"), path=PATH)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
