"""The same team against the real gateway and engine: exact tokens, under the right role."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from transformers import AutoTokenizer

from integration_tests.langchain.apps import team
from integration_tests.langchain.conftest import Run
from leyden.interfaces import Access
from leyden.roles import Policy, Sampling
from leyden.spans import Completion, Record
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway.gateway import HttpGateway
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

MODEL = Path(__file__).parents[2] / "examples" / "text_to_sql" / "model"
TRAINED = ("planner", "critic")
EPISODES = 10


@pytest.mark.usefixtures("instrumented")
@pytest.mark.parametrize("streaming", [False, True])
def test_every_trained_call_has_its_exact_tokens_and_no_other_has_any(
    run: Run, user_server: FakeOpenAI, streaming: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    completions: list[Completion] = []

    async def keep(records: Sequence[Record]) -> None:
        completions.extend(record for record in records if isinstance(record, Completion))

    async def all_episodes() -> list[Recorded]:
        engine, gateway = TransformersEngine(MODEL, seed=1), HttpGateway()
        await engine.start([Policy("sql")])
        await gateway.start(engine, keep)
        app = team(user_server.base_url, max_tokens=8, **({"streaming": True} if streaming else {}))

        async def one(number: int) -> Recorded:
            access = Access(rollout_id=f"r{number}", attempt=1, models={"sql": Sampling(max_tokens=8)})
            routing = routing_to(gateway.base_url, *TRAINED)
            token = gateway.admit(access)
            routing = type(routing)(base_url=routing.base_url, token=token, routes=routing.routes)
            with rollout(routing, f"r{number}") as recorded:
                await app.ainvoke({"task": f"rollout=r{number}", "log": []})
            await gateway.revoke(f"r{number}")
            return recorded

        try:
            return await asyncio.gather(*map(one, range(EPISODES)))
        finally:
            await gateway.stop()
            await engine.stop()

    episodes = run(all_episodes())
    spans = {span.span_id: span for each in episodes for span in each.calls}
    trained = {span_id for span_id, span in spans.items() if span.role in TRAINED}
    assert {completion.span_id for completion in completions} == trained
    assert len(completions) == len(trained) == 2 * EPISODES
    for completion in completions:
        span = spans[completion.span_id]
        prompt = tokenizer.decode(completion.prompt_token_ids)
        assert (completion.role, completion.rollout_id) == (span.role, span.rollout_id)
        assert f"role={span.role}" in prompt and f"rollout={span.rollout_id}" in prompt
        (answer,) = cast("list[dict[str, str]]", span.attributes["gen_ai.output.messages"])
        sampled = tokenizer.decode(completion.choices[0].token_ids, skip_special_tokens=True)
        assert answer["content"].strip() == str(sampled).strip()
        assert completion.delivered
    assert {seen.true_role for seen in user_server.seen} == {"worker"}
