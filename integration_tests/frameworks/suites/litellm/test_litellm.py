"""litellm needs no adapter: its calls pass the wire, whichever provider and HTTP library it uses for them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch the newest one

import litellm

import leyden
from leyden.spans import Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

pytestmark = pytest.mark.usefixtures("installed")

litellm.suppress_debug_info = True

ASK: list[Any] = [{"role": "system", "content": "role=writer"}, {"role": "user", "content": "go"}]
ANSWER = "answer to rollout=None role=writer"
ROLES = ("writer", "critic")


def options(provider: str, server: FakeOpenAI) -> dict[str, Any]:
    base_url = server.base_url.removesuffix("/v1") if provider == "anthropic" else server.base_url
    return {"model": f"{provider}/gpt", "messages": ASK, "api_base": base_url, "api_key": "user-key", "num_retries": 0}


def check(recorded: Recorded, user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    assert sorted((call.role, call.status) for call in recorded.calls) == [
        (role, Status.OK) for role in sorted(ROLES) for _ in range(2)
    ]
    for call in recorded.calls:
        assert str(call.attributes["gen_ai.output.messages"][0]["content"]).strip() == ANSWER  # type: ignore[index]
    assert [seen.headers["x-leyden-role"] for seen in gateway.seen] == ["writer", "writer"]
    assert len(user_server.seen) == 2
    assert "user-key" not in str([seen.headers for seen in gateway.seen])


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_blocking_calls_are_seen_once_under_their_role(
    provider: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        for role in ROLES:
            with leyden.role(role):
                answer: Any = litellm.completion(**options(provider, user_server))
                assert answer.choices[0].message.content == ANSWER
                chunks: Any = litellm.completion(**options(provider, user_server), stream=True)
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == ANSWER
    check(recorded, user_server, gateway)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_async_calls_are_seen_once_although_aiohttp_carries_them_below_httpx(
    provider: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    async def call(role: str) -> None:
        with leyden.role(role):
            answer: Any = await litellm.acompletion(**options(provider, user_server))
            assert answer.choices[0].message.content == ANSWER
            chunks: Any = await litellm.acompletion(**options(provider, user_server), stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]).strip() == ANSWER

    async def main() -> None:
        await asyncio.gather(*map(call, ROLES))

    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        asyncio.run(main())
    check(recorded, user_server, gateway)
