"""A form that the answer must have, in every protocol's words: passed on, refused by name, recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leyden.interfaces import GenerationRequest
from leyden.roles import Sampling
from leyden.testing.fakes import FakeEngine
from leyden_plugins.gateway.access import request_for
from leyden_plugins.gateway.serve import Served, ServedModels
from tests.gateway.builders import access, asynchronous, own_sampling, running

SCHEMA = {"type": "object", "properties": {"sql": {"type": "string"}}}
ASKED = {"type": "json_schema", "name": "query", "schema": SCHEMA}
UNNAMED = ASKED | {"name": "answer"}
CHAT_TOOL = {"type": "function", "function": {"name": "look"}}
USER = [{"role": "user", "content": "q"}]

BODIES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "chat": (
        "chat/completions",
        {
            "messages": USER,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "query", "schema": SCHEMA, "strict": True},
            },
        },
        ASKED,
    ),
    "chat object": (
        "chat/completions",
        {"messages": USER, "response_format": {"type": "json_object"}},
        {"type": "json_object"},
    ),
    "responses": ("responses", {"input": "q", "text": {"format": ASKED | {"strict": True}}}, ASKED),
    "responses object": (
        "responses",
        {"input": "q", "text": {"format": {"type": "json_object"}}},
        {"type": "json_object"},
    ),
    "messages": (
        "messages",
        {"messages": USER, "max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        UNNAMED,
    ),
}
FIELDS = {"chat/completions": "response_format", "responses": "text.format", "messages": "output_config.format"}


class Constraining(FakeEngine):
    """Says that it can do everything."""

    constrains_format = True
    forces_tools = True


@pytest.mark.parametrize("case", BODIES)
def test_the_form_reaches_an_engine_that_can_honour_it_and_marks_the_record(case: str) -> None:
    path, body, expected = BODIES[case]

    @asynchronous
    async def scenario() -> None:
        async with running(Constraining("{}")) as here:
            token = here.gateway.admit(access(models=own_sampling()))
            assert (await here.post(token, {"model": "sql"} | body, path=f"/v1/{path}")).status_code == 200
            assert here.engine.log[0].request.response_format == expected
            (completion,) = await here.completions()
            assert completion.off_distribution
            assert completion.sampling["response_format"] == expected["type"]

    scenario()


@pytest.mark.parametrize("case", BODIES)
def test_an_engine_that_cannot_force_a_form_refuses_it_by_the_protocols_own_name(case: str) -> None:
    path, body, _ = BODIES[case]

    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access(models=own_sampling()))
            response = await here.post(token, {"model": "sql"} | body, path=f"/v1/{path}")
            assert response.status_code == 400
            assert repr(FIELDS[path]) in response.json()["error"]["message"]
            assert here.engine.log == []

    scenario()


TEXT: dict[str, dict[str, object]] = {
    "chat/completions": {"messages": USER, "response_format": {"type": "text"}},
    "responses": {"input": "q", "text": {"format": {"type": "text"}}},
    "messages": {"messages": USER, "max_tokens": 9, "output_config": {"format": None}},
}


@pytest.mark.parametrize("path", TEXT)
def test_free_text_is_no_form(path: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            assert (await here.post(token, {"model": "sql"} | TEXT[path], path=f"/v1/{path}")).status_code == 200
            (completion,) = await here.completions()
            assert (completion.off_distribution, "response_format" in completion.sampling) == (False, False)

    scenario()


FORCED: dict[str, dict[str, object]] = {
    "chat/completions": {"messages": USER, "tools": [CHAT_TOOL], "tool_choice": "required"},
    "responses": {"input": "q", "tools": [{"type": "function", "name": "look"}], "tool_choice": "required"},
    "messages": {
        "messages": USER,
        "max_tokens": 9,
        "tools": [{"name": "look", "input_schema": {}}],
        "tool_choice": {"type": "tool", "name": "look"},
    },
}


@pytest.mark.parametrize("path", FORCED)
def test_a_forced_tool_call_is_refused_or_marks_the_record(path: str) -> None:
    @asynchronous
    async def scenario() -> None:
        body = {"model": "sql"} | FORCED[path]
        async with running() as here:
            token = here.gateway.admit(access(models=own_sampling()))
            refused = await here.post(token, body, path=f"/v1/{path}")
            assert refused.status_code == 400
            assert "tool_choice" in refused.json()["error"]["message"]
        async with running(Constraining()) as here:
            token = here.gateway.admit(access(models=own_sampling()))
            assert (await here.post(token, body, path=f"/v1/{path}")).status_code == 200
            (completion,) = await here.completions()
            assert completion.off_distribution
            assert completion.sampling["tool_choice"] == here.engine.log[0].request.tool_choice

    scenario()


@pytest.mark.parametrize("path", FORCED)
def test_a_policy_in_training_writes_freely_so_that_its_tokens_are_its_own(path: str) -> None:
    @asynchronous
    async def scenario() -> None:
        for engine in (Constraining("{}"), FakeEngine("{}")):
            async with running(engine) as here:
                token = here.gateway.admit(access(models={"sql": Sampling()}))
                formats = [body for kind, body, _ in BODIES.values() if kind == path]
                for body in (FORCED[path], *formats):
                    assert (await here.post(token, {"model": "sql"} | body, path=f"/v1/{path}")).status_code == 200
                for one in engine.log:
                    assert (one.request.response_format, one.request.tool_choice) == (None, "auto")
                assert not any(one.off_distribution for one in await here.completions())

    scenario()


def test_a_policy_that_keeps_formats_is_masked_in_training_too() -> None:
    form = {"type": "json_object"}
    asked = GenerationRequest(model="sql", messages=USER, tool_choice="required", response_format=form)
    kept, freed = request_for(Sampling(keep_format=True), asked), request_for(Sampling(), asked)
    assert (kept.tool_choice, kept.response_format) == ("required", form)
    assert (freed.tool_choice, freed.response_format) == ("auto", None)
    none = request_for(Sampling(), replace(asked, tool_choice="none"))
    assert none.tool_choice == "none"


def test_served_models_can_do_what_all_their_engines_can() -> None:
    both: Any = ServedModels({"a": Served(Constraining(), "base"), "b": Served(Constraining(), "base")})
    one: Any = ServedModels({"a": Served(Constraining(), "base"), "b": Served(FakeEngine(), "base")})
    assert (both.forces_tools, both.constrains_format) == (True, True)
    assert (one.forces_tools, one.constrains_format) == (False, False)
