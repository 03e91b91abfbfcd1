"""Who may call what."""

from __future__ import annotations

import pytest

from leyden.interfaces import SamplingParameters
from leyden.roles import AGENTS_OWN, MAIN_ROLE, Route, Sampling
from leyden.spans import Kind, Status
from leyden_plugins.gateway.access import sampling_for
from tests.gateway.builders import CHAT, access, ask, asynchronous, named, own_sampling, running


def test_a_policys_sampling_replaces_the_agents_and_drops_its_seed() -> None:
    asked = SamplingParameters(temperature=0.0, top_p=0.5, top_k=3, seed=1, max_tokens=9, stop=("x",), n=2)
    assert sampling_for(Sampling(), asked) == SamplingParameters(max_tokens=9, stop=("x",), n=2)
    assert sampling_for(Sampling(max_tokens=4), asked).max_tokens == 4
    assert sampling_for(Sampling(keep_seed=True), asked).seed == 1
    assert sampling_for(AGENTS_OWN, asked) == asked


@asynchronous
async def test_a_missing_or_wrong_token_is_refused_as_openai_does() -> None:
    async with running() as here:
        here.gateway.admit(access())
        for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Basic abc"}):
            response = await here.client.post(CHAT, json=ask(), headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "nonsense" not in response.text
        assert (await here.client.get("/v1/models")).status_code == 401
        assert here.engine.log == []


@asynchronous
async def test_a_token_is_good_for_its_own_rollout_and_attempt_only() -> None:
    async with running() as here:
        token = here.gateway.admit(access("r1"))
        here.gateway.admit(access("r2"))
        other = await here.post(token, ask(), named(rollout="r2"))
        in_path = await here.post(token, ask(), path="/rollout/r2/role/writer/v1/chat/completions")
        old = await here.post(token, ask(), named(attempt="2"))
        assert [response.status_code for response in (other, in_path, old)] == [401, 401, 401]
        assert here.engine.log == []
        assert await here.completions("r2") == []


@asynchronous
async def test_tokens_differ_and_end_with_their_rollout() -> None:
    async with running() as here:
        first, second = here.gateway.admit(access("r1")), here.gateway.admit(access("r2"))
        assert first != second
        await here.gateway.revoke("r1")
        assert (await here.post(first, ask())).status_code == 401
        assert (await here.post(second, ask())).status_code == 200


@asynchronous
async def test_the_engine_is_told_which_calls_belong_together() -> None:
    async with running() as here:
        for rollout in ("r1", "r2"):
            token = here.gateway.admit(access(rollout))
            for _ in range(2):
                await here.post(token, ask(), named(rollout=rollout))
        assert [sampled.request.affinity for sampled in here.engine.log] == ["r1", "r1", "r2", "r2"]


@asynchronous
async def test_the_wires_headers_stand_on_the_completion_and_no_span_is_written() -> None:
    async with running() as here:
        token = here.gateway.admit(access(routes=()))
        response = await here.post(token, ask(), named(role="%C3%BCber%2Fx%20y", **{"http-attempt": "3"}))
        assert response.status_code == 200
        (completion,) = await here.completions()
        assert (completion.span_id, completion.http_attempt) == ("s1", 3)
        assert (completion.rollout_id, completion.attempt) == ("r1", 1)
        assert (completion.role, completion.policy) == ("über/x y", "sql")
        assert here.spans() == []


@asynchronous
async def test_a_caller_without_an_adapter_gets_a_span_from_the_gateway() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        path = "/rollout/r1/role/%C3%BCber%2Fx/v1/chat/completions"
        response = await here.post(token, ask("q", model="gpt-9"), path=path)
        assert response.status_code == 200
        (completion,) = await here.completions()
        (span,) = here.spans()
        assert span.span_id == completion.span_id
        assert (span.kind, span.role, span.status, span.parent_id) == (Kind.MODEL_CALL, "über/x", Status.OK, None)
        assert span.attributes["gen_ai.input.messages"] == [{"role": "user", "content": "q"}]
        assert span.attributes["gen_ai.output.messages"] == [{"role": "assistant", "content": "ok"}]
        assert span.attributes["gen_ai.usage.output_tokens"] == 3
        assert completion.policy == "sql"
        assert response.json()["model"] == "gpt-9"


@asynchronous
async def test_an_api_key_alone_stands_for_the_rollout_and_the_main_role() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        assert (await here.post(token, ask(model="gpt-9"))).status_code == 200
        (completion,) = await here.completions()
        assert (completion.role, completion.policy, completion.http_attempt) == (MAIN_ROLE, "sql", 0)


@asynchronous
async def test_the_role_in_the_path_chooses_the_policy_whatever_the_model_says() -> None:
    async with running(policies=("sql", "judge")) as here:
        routes = (Route(model="judge", roles=("checker",)), Route(model="sql"))
        token = here.gateway.admit(access(models=own_sampling(["sql", "judge"]), routes=routes))
        await here.post(token, ask(), path="/rollout/r1/role/checker/v1/chat/completions")
        await here.post(token, ask(model="judge"), path="/rollout/r1/role/writer/v1/chat/completions")
        assert [one.request.model for one in here.engine.log] == ["judge", "sql"]


@asynchronous
async def test_a_role_or_model_without_a_policy_is_not_found() -> None:
    async with running() as here:
        token = here.gateway.admit(access(routes=(Route(model="sql", roles=("writer",)),)))
        role = await here.post(token, ask(), path="/rollout/r1/role/checker/v1/chat/completions")
        model = await here.post(token, ask(model="base"))
        for response, name in ((role, "checker"), (model, "base")):
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"
            assert name in response.json()["error"]["message"]
        assert here.engine.log == []


@asynchronous
async def test_the_models_of_a_token_are_listed() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        headers = here.headers(token)
        for path in ("/v1/models", "/rollout/r1/role/writer/v1/models"):
            response = await here.client.get(path, headers=headers)
            assert [model["id"] for model in response.json()["data"]] == ["sql"]


@asynchronous
async def test_health_needs_no_token_and_other_paths_and_methods_are_json_errors() -> None:
    async with running() as here:
        assert (await here.client.get("/health")).json() == {"status": "ok"}
        for path in ("/", "/v1", "/v1/embeddings", "/rollout/r1/role//v1/models", "/rollout/r1/v1/models", "/%00"):
            response = await here.client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        for method, path in (("GET", CHAT), ("POST", "/v1/models"), ("DELETE", "/health")):
            response = await here.client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


@asynchronous
async def test_two_requests_that_claim_one_http_attempt_get_different_numbers() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        for _ in range(3):
            await here.post(token, ask(), named())
        assert [one.http_attempt for one in await here.completions()] == [0, 1, 2]


@pytest.mark.parametrize("value", ["-1", "x", "1" * 50, "1.5", "²"])
def test_an_http_attempt_that_is_no_number_is_refused(value: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            headers = named() | {"x-leyden-http-attempt": value.encode()}
            response = await here.post(token, ask(), headers)  # type: ignore[arg-type]
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "x-leyden-http-attempt"

    scenario()


@asynchronous
async def test_a_key_may_name_the_role_as_the_path_does() -> None:
    async with running(policies=("sql", "judge")) as here:
        routes = (Route(model="judge", roles=("über/*",)), Route(model="sql", roles=("writer",)))
        token = here.gateway.admit(access(models=own_sampling(["sql", "judge"]), routes=routes))
        key = f"{token}:%C3%BCber%2Fx:0123456789abcdef"
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            response = await here.client.post(CHAT, json=ask(), headers=headers)
            assert response.status_code == 200
        # The path is closer to the call than the key that a whole process shares.
        await here.client.post("/rollout/r1/role/writer/v1/chat/completions", json=ask(), headers={"x-api-key": key})
        found = await here.completions()
        assert [(one.role, one.policy) for one in found] == [("über/x", "judge")] * 2 + [("writer", "sql")]
        assert {span.parent_id for span in here.spans()} == {"0123456789abcdef"}, (
            "the key says below which span they belong"
        )


@asynchronous
async def test_a_key_may_come_in_either_header_and_a_wrong_one_beside_it_does_no_harm() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        for headers in (
            {"x-api-key": token},
            {"x-api-key": token, "authorization": "Bearer placeholder"},
            {"x-api-key": "placeholder", "authorization": f"Bearer {token}"},
        ):
            assert (await here.client.post(CHAT, json=ask(), headers=headers)).status_code == 200
        assert {one.role for one in await here.completions()} == {MAIN_ROLE}


@pytest.mark.parametrize("suffix", [":", "::writer", "x", ":wr:iter", ":writer:0123"])
def test_a_key_with_something_else_at_its_end_is_no_key_with_a_role(suffix: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            response = await here.client.post(CHAT, json=ask(), headers={"x-api-key": token + suffix})
            assert response.status_code == (200 if suffix == ":" else 401)
            assert token not in response.text

    scenario()


CONTENT: dict[str, dict[str, object]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "completions": {"prompt": "x"},
    "responses": {"input": "x"},
    "messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9},
}


@pytest.mark.parametrize("dialect", ["chat/completions", "completions", "responses", "messages"])
def test_an_unknown_role_is_told_which_roles_there_are(dialect: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            body = {"model": "x", **CONTENT[dialect]}
            for path, key in ((f"/rollout/r1/role/nobody/v1/{dialect}", token), (f"/v1/{dialect}", f"{token}:nobody")):
                response = await here.post(key, body, path=path)
                assert response.status_code == 404
                message = response.json()["error"]["message"]
                assert all(repr(role) in message for role in ("nobody", "writer", "rewriter", "main", "über/*"))
            assert (await here.post(token, body, path=f"/rollout/r1/role/writer/v1/{dialect}")).status_code == 200

    scenario()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_an_answer_names_the_model_that_the_agent_asked_for_before_it_was_rerouted(stream: bool) -> None:
    @asynchronous
    async def check() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            reply = await here.post(token, ask(stream=stream), {"x-leyden-model": "gpt-4.1%2Dmini"})
            assert '"model":"gpt-4.1-mini"' in reply.text and '"model":"sql"' not in reply.text
            (completion,) = await here.completions()
            assert completion.policy == "sql"

    check()
