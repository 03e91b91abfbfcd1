"""What a gateway remembers of its answers: for whom, for how long, and at what cost."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from leyden.testing.fakes import Answer, FakeEngine
from leyden_plugins.gateway import serve
from leyden_plugins.gateway.memory import MOST_REMEMBERED, Memory
from tests.gateway.builders import Running, access, asynchronous, events, running

PATH = "/v1/responses"
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


async def say(here: Running, token: str, value: object, **fields: object) -> Any:
    response = await here.post(token, {"model": "sql", "input": value} | fields, path=PATH)
    assert response.status_code == 200, response.text
    return response.json()


@asynchronous
async def test_a_chain_of_answers_is_the_whole_conversation_without_earlier_instructions() -> None:
    async with running(FakeEngine([Answer(tool_calls=[CALL]), "two", "three"])) as here:
        token = here.gateway.admit(access())
        first = await say(here, token, "q", instructions="old rules")
        result = [{"type": "function_call_output", "call_id": "c1", "output": "42"}]
        second = await say(here, token, result, previous_response_id=first["id"])
        await say(here, token, "and?", previous_response_id=second["id"], instructions="new rules")
        assert second["previous_response_id"] == first["id"]
        assert here.engine.log[-1].request.messages == [
            {"role": "system", "content": "new rules"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "and?"},
        ]


@asynchronous
async def test_two_answers_may_go_on_from_the_same_one() -> None:
    async with running(FakeEngine(["one", "left", "right"])) as here:
        token = here.gateway.admit(access())
        first = await say(here, token, "q")
        await say(here, token, "l", previous_response_id=first["id"])
        await say(here, token, "r", previous_response_id=first["id"])
        assert [message["content"] for message in here.engine.log[-1].request.messages] == ["q", "one", "r"]


@asynchronous
async def test_a_streamed_answer_is_remembered_like_a_json_one() -> None:
    async with running(FakeEngine(["one", "two"])) as here:
        token = here.gateway.admit(access())
        response = await here.post(token, {"model": "sql", "input": "q", "stream": True}, path=PATH)
        whole = events(response)[-1]["response"]
        again = await here.client.get(f"{PATH}/{whole['id']}", headers=here.headers(token))
        assert again.json() == whole
        await say(here, token, "and?", previous_response_id=whole["id"])
        assert [message["content"] for message in here.engine.log[-1].request.messages] == ["q", "one", "and?"]


@asynchronous
async def test_items_of_an_answer_may_be_referred_to_by_id() -> None:
    async with running(FakeEngine([Answer(text="I look.", tool_calls=[CALL]), "two"])) as here:
        token = here.gateway.admit(access())
        output = (await say(here, token, "q"))["output"]
        references = [{"type": "item_reference", "id": item["id"]} for item in output]
        await say(here, token, [{"role": "user", "content": "q"}, *references])
        assert here.engine.log[-1].request.messages[1:] == [
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
        ]


@asynchronous
async def test_an_answer_that_was_not_to_be_stored_is_forgotten() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        answer = await say(here, token, "q", store=False)
        body = {"model": "sql", "input": "x", "previous_response_id": answer["id"]}
        refused = await here.post(token, body, path=PATH)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
        got = await here.client.get(f"{PATH}/{answer['id']}", headers=here.headers(token))
        assert (got.status_code, got.json()["error"]["code"]) == (404, "not_found")


@asynchronous
async def test_no_rollout_sees_the_answers_of_another_and_none_outlives_its_own() -> None:
    async with running() as here:
        token, other = here.gateway.admit(access("r1")), here.gateway.admit(access("r2"))
        answer = await say(here, token, "q")
        for key in (other, "wrong"):
            got = await here.client.get(f"{PATH}/{answer['id']}", headers=here.headers(key))
            assert got.status_code == (404 if key == other else 401)
        body = {"model": "sql", "input": "x", "previous_response_id": answer["id"]}
        assert (await here.post(other, body, path=PATH)).status_code == 400
        item = [{"type": "item_reference", "id": answer["output"][0]["id"]}]
        assert (await here.post(other, {"model": "sql", "input": item}, path=PATH)).status_code == 400
        await here.gateway.revoke("r1")
        again = here.gateway.admit(access("r1", attempt=2))
        assert (await here.post(again, body, path=PATH)).status_code == 400


def test_an_open_endpoint_remembers_too() -> None:
    engine = FakeEngine(["one", "two"])
    with serve(engine) as endpoint:
        first = httpx.post(f"{endpoint.base_url}/responses", json={"model": "base", "input": "q"}).json()
        body = {"model": "base", "input": "and?", "previous_response_id": first["id"]}
        assert httpx.post(f"{endpoint.base_url}/responses", json=body).status_code == 200
        assert httpx.get(f"{endpoint.base_url}/responses/{first['id']}").json() == first
    assert [message["content"] for message in engine.log[-1].request.messages] == ["q", "one", "and?"]


def test_a_bounded_memory_forgets_what_was_not_used_for_longest() -> None:
    memory = Memory(2)
    memory.put("a", 1)
    memory.put("b", 2)
    assert memory.get("a") == 1
    memory.put("c", 3)
    assert [memory.get(key) for key in "abc"] == [1, None, 3]
    assert len(memory) == 2
    assert MOST_REMEMBERED > 100


def test_equal_messages_are_kept_once() -> None:
    memory = Memory()
    first = memory.shared({"role": "user", "content": "a long text"})
    assert memory.shared({"role": "user", "content": "a long text"}) is first
    assert memory.shared({"role": "user", "content": "another"}) is not first


@pytest.mark.parametrize("wrong", ["resp_x", "", 3, {}, "c1"])
def test_an_unknown_answer_is_named_when_it_is_referred_to(wrong: object) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(FakeEngine([Answer(tool_calls=[CALL])])) as here:
            token = here.gateway.admit(access())
            await say(here, token, "q")
            body = {"model": "sql", "input": "x", "previous_response_id": wrong}
            error = (await here.post(token, body, path=PATH)).json()["error"]
            assert error["code"] == "previous_response_not_found"
            assert repr(wrong) in error["message"]

    scenario()
