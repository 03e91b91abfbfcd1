"""Exact continuation with the real engine: whatever a random model writes, the next prompt begins with it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from leyden.interfaces import ContinuesExactly
from leyden.roles import Policy
from leyden.spans import Completion, Record
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway import HttpGateway
from tests.engines.asking import plain_logprobs, reference
from tests.gateway.builders import access, asynchronous
from tests.gateway.template_engine import REASONING_TEMPLATE
from tests.tiny import tiny_checkpoint


async def talk(model: Path, *, exact: bool, turns: int = 4) -> list[Completion]:
    """Talk with a random model, whose answers are bytes that mostly spell no text; return the records."""
    engine = TransformersEngine(model, seed=3)
    assert isinstance(engine, ContinuesExactly)
    records: list[Record] = []

    async def keep(batch: Any) -> None:
        records.extend(batch)

    await engine.start([Policy("sql")])
    gateway = HttpGateway(exact_continuation=exact)
    await gateway.start(engine, keep)
    try:
        token = gateway.admit(access())
        messages: list[Any] = [{"role": "user", "content": "q"}]
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {token}"}, timeout=30) as client:
            for _ in range(turns):
                body = {"model": "sql", "messages": messages, "max_tokens": 12}
                response = await client.post(f"{gateway.base_url}/chat/completions", json=body)
                assert response.status_code == 200, response.text
                messages += [response.json()["choices"][0]["message"], {"role": "user", "content": "more"}]
        await gateway.revoke("r1")
    finally:
        await gateway.stop()
        await engine.stop()
    return [one for one in records if isinstance(one, Completion)]


@pytest.mark.parametrize("exact", [True, False])
def test_the_next_prompt_begins_with_what_was_sampled_only_with_exact_continuation(tmp_path: Path, exact: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        calls = await talk(tiny_checkpoint(tmp_path, template=REASONING_TEMPLATE), exact=exact)
        assert len(calls) == 4
        model = reference(tmp_path)
        for call in calls:
            wanted = plain_logprobs(model, call.prompt_token_ids, call.choices[0].token_ids)
            torch.testing.assert_close(torch.tensor(call.choices[0].logprobs), wanted, atol=1e-4, rtol=0)
        for before, after in pairwise(calls):
            known = before.prompt_token_ids + before.choices[0].token_ids
            begins = after.prompt_token_ids[: len(known)] == known
            assert begins == (after.fork is None)
            assert (after.spliced == len(known)) == exact
            assert begins or not exact
        assert exact or any(call.fork is not None for call in calls)

    scenario()
