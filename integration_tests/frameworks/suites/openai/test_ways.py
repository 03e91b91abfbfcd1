"""Every way in which the official client calls a model goes through the wire, once, under the right role."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pydantic
import pytest

import leyden
from leyden.spans import Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

pytestmark = pytest.mark.usefixtures("installed")

USER = "http://user.invalid/v1"
ASK: list[Any] = [{"role": "system", "content": "role=writer"}, {"role": "user", "content": "go"}]
ANSWER = "answer to rollout=None role=writer"
CHAT: dict[str, Any] = {"model": "gpt", "messages": ASK}


class Anything(pydantic.BaseModel):
    """A structured output that every JSON object fits."""


def client(base_url: str = USER, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="user-key", max_retries=0, **options)


def async_client(base_url: str = USER, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, api_key="user-key", max_retries=0, **options)


def create(made: openai.OpenAI) -> object:
    return made.chat.completions.create(**CHAT).choices[0].message.content


def stream(made: openai.OpenAI) -> object:
    chunks: Any = made.chat.completions.create(**CHAT, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def stream_helper(made: openai.OpenAI) -> object:
    with made.chat.completions.stream(**CHAT) as events:
        return events.get_final_completion().choices[0].message.content


def raw_response(made: openai.OpenAI) -> object:
    return made.chat.completions.with_raw_response.create(**CHAT).parse().choices[0].message.content


def streaming_response(made: openai.OpenAI) -> object:
    with made.chat.completions.with_streaming_response.create(**CHAT) as response:
        return response.parse().choices[0].message.content


def post(made: openai.OpenAI) -> object:
    answer: Any = made.post("/chat/completions", body=CHAT, cast_to=object)
    return answer["choices"][0]["message"]["content"]


def responses(made: openai.OpenAI) -> object:
    return made.responses.create(model="gpt", instructions="role=writer", input="go").output_text


def response_stream(made: openai.OpenAI) -> object:
    with made.responses.stream(model="gpt", instructions="role=writer", input="go") as events:
        return events.get_final_response().output_text


def completion(made: openai.OpenAI) -> object:
    return made.completions.create(model="gpt", prompt="role=writer").choices[0].text


WAYS = [create, stream, stream_helper, raw_response, streaming_response, post, responses, response_stream, completion]


def check(recorded: Recorded, *roles: str) -> None:
    assert [(call.role, call.status) for call in recorded.calls] == [(role, Status.OK) for role in roles]
    for call in recorded.calls:
        assert str(call.attributes["gen_ai.output.messages"][0]["content"]).strip() == ANSWER  # type: ignore[index]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_seen_once_and_answers_as_before(
    way: Callable[[openai.OpenAI], object], user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        for role, base_url in (("writer", USER), ("critic", user_server.base_url)):
            with leyden.role(role):
                assert str(way(client(base_url))).strip() == ANSWER
    check(recorded, "writer", "critic")
    assert len(gateway.seen) == len(user_server.seen) == 1
    assert gateway.seen[0].headers["authorization"] == "Bearer gateway-token"


async def acreate(made: openai.AsyncOpenAI) -> object:
    return (await made.chat.completions.create(**CHAT)).choices[0].message.content


async def astream(made: openai.AsyncOpenAI) -> object:
    chunks: Any = await made.chat.completions.create(**CHAT, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


async def aresponse_stream(made: openai.AsyncOpenAI) -> object:
    async with made.responses.stream(model="gpt", instructions="role=writer", input="go") as events:
        return (await events.get_final_response()).output_text


ASYNC_WAYS = [acreate, astream, aresponse_stream]


@pytest.mark.parametrize("way", ASYNC_WAYS)
def test_every_async_way_is_seen_once_also_in_parallel(way: Any, user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    async def call(made: openai.AsyncOpenAI, role: str) -> None:
        with leyden.role(role):
            assert str(await way(made)).strip() == ANSWER

    async def main() -> None:
        async with async_client() as routed, async_client(user_server.base_url) as own:
            await asyncio.gather(*(call(routed, "writer") for _ in range(5)), *(call(own, "critic") for _ in range(5)))

    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        asyncio.run(main())
    assert sorted(call.role for call in recorded.calls) == ["critic"] * 5 + ["writer"] * 5
    assert {call.status for call in recorded.calls} == {Status.OK}
    assert len(gateway.seen) == len(user_server.seen) == 5


def http_clients() -> list[Any]:
    """Return the async HTTP clients that this version of the SDK takes, besides its own."""
    library = importlib.import_module("openai._base_client")
    found = [pytest.param(lambda: httpx.AsyncClient(), id="httpx")] if accepts_httpx() else []
    has_aiohttp = importlib.util.find_spec("httpx_aiohttp") or not hasattr(library, "httpx")
    if has_aiohttp and importlib.util.find_spec("aiohttp") and hasattr(openai, "DefaultAioHttpClient"):
        found.append(pytest.param(lambda: openai.DefaultAioHttpClient(), id="aiohttp"))
    return found


def accepts_httpx() -> bool:
    try:
        openai.AsyncOpenAI(api_key="x", http_client=httpx.AsyncClient())
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("make", http_clients())
@pytest.mark.parametrize("way", ASYNC_WAYS)
def test_a_call_carried_by_two_libraries_is_one_call(
    way: Any, make: Any, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    async def main() -> None:
        async with async_client(user_server.base_url, http_client=make()) as made:
            for role in ("writer", "critic"):
                with leyden.role(role):
                    assert str(await way(made)).strip() == ANSWER

    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        asyncio.run(main())
    check(recorded, "writer", "critic")
    assert len(gateway.seen) == len(user_server.seen) == 1


def test_a_header_of_a_shared_client_names_the_role(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    shared = client(user_server.base_url)
    writer = shared.with_options(default_headers={"x-leyden-role": "writer"})
    with rollout(routing_to(gateway.base_url, "writer", "editor")) as recorded:
        create(writer)
        create(shared)
        shared.chat.completions.create(**CHAT, extra_headers={"x-leyden-role": "editor"})
        writer.chat.completions.create(**CHAT, extra_headers=leyden.headers("critic"))
    check(recorded, "writer", "main", "editor", "critic")
    assert [seen.headers["x-leyden-role"] for seen in gateway.seen] == ["writer", "editor"]
    for seen in user_server.seen:
        assert seen.headers["authorization"] == "Bearer user-key"
        assert not [name for name in seen.headers if name.startswith("x-leyden")]


def test_azure_goes_the_same_way(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    root = user_server.base_url.removesuffix("/v1")
    azure = openai.AzureOpenAI(azure_endpoint=root, api_key="azure-key", api_version="2024-10-21", max_retries=0)
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        for role in ("writer", "critic"):
            with leyden.role(role):
                assert str(azure.chat.completions.create(**CHAT).choices[0].message.content).strip() == ANSWER
    check(recorded, "writer", "critic")
    assert "azure-key" not in str(gateway.seen[0].headers)
    assert user_server.seen[0].headers["api-key"] == "azure-key"


def test_an_endpoint_serves_clients_made_for_one_rollout(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        place = leyden.endpoint("writer")
        create(openai.OpenAI(base_url=place.base_url, api_key=place.api_key))
    check(recorded, "writer")


def test_what_the_users_own_client_watches_it_still_sees(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    seen: list[str] = []
    library: Any = importlib.import_module("openai._base_client")
    http = getattr(library, "httpx2", None) or library.httpx
    hooked = http.Client(event_hooks={"request": [lambda request: seen.append(request.url.path)]})
    with rollout(routing_to(gateway.base_url, "writer")), leyden.role("critic"):
        create(client(user_server.base_url, http_client=hooked))
    assert seen == ["/v1/chat/completions"]


def test_counting_tokens_for_a_trained_role_stays_here(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded, leyden.role("writer"):
        answer: Any = client(user_server.base_url).post(
            "/responses/input_tokens", body={"model": "gpt", "input": "go"}, cast_to=object
        )
    assert answer["input_tokens"] == 7
    assert user_server.seen == [] and recorded.calls == []
