"""The official Anthropic client through the wire: messages, streams and token counts of a trained role."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

import leyden
from leyden.spans import Status
from tests.capture.rollouts import rollout, routing_to
from tests.capture.servers import FakeOpenAI

pytestmark = pytest.mark.usefixtures("installed")

ANSWER = "answer to rollout=None role=writer"
ASK: dict[str, Any] = {"model": "claude", "system": "role=writer", "messages": [{"role": "user", "content": "go"}]}


def test_messages_streams_and_counts_go_to_the_gateway_for_trained_roles_only(
    user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    root = user_server.base_url.removesuffix("/v1")
    client = anthropic.Anthropic(base_url=root, api_key="user-key", max_retries=0)
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        for role in ("writer", "critic"):
            with leyden.role(role):
                made: Any = client.messages.create(max_tokens=9, **ASK)
                assert made.content[0].text == ANSWER
                with client.messages.stream(max_tokens=9, **ASK) as stream:
                    assert "".join(stream.text_stream).strip() == ANSWER
                assert client.messages.count_tokens(**ASK).input_tokens == 7
    assert [(call.role, call.status) for call in recorded.calls] == [
        (role, Status.OK) for role in ("writer", "writer", "critic", "critic")
    ]
    paths = ["/v1/messages", "/v1/messages", "/v1/messages/count_tokens"]
    assert [seen.path for seen in gateway.seen] == [seen.path for seen in user_server.seen] == paths
    assert "user-key" not in str([seen.headers for seen in gateway.seen])


def test_an_endpoint_serves_a_client_made_for_one_rollout(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        place = leyden.endpoint("writer")
        client = anthropic.Anthropic(base_url=place.anthropic_base_url, api_key=place.api_key)
        client.messages.create(max_tokens=9, **ASK)
    assert [call.role for call in recorded.calls] == ["writer"]
    assert gateway.seen[0].path == "/v1/messages"
