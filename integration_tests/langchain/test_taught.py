"""What the app's own model answers to a LangChain agent with tools is imitated with the tools in the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

import leyden
from leyden.testing.fakes import END_TOKEN
from leyden_plugins.algorithms.sft import Distillation
from tests.capture.servers import FakeOpenAI, serving
from tests.running.small import CountingLearner, Notes, small_trainer


@tool
def look(at: str) -> str:
    """Look at it."""
    return at


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with serving() as found:
        yield found
    leyden.uninstrument()


@pytest.mark.parametrize("uses_responses", [False, True])
def test_the_tools_of_calls_that_are_not_rerouted_are_recorded(
    tmp_path: Path, server: FakeOpenAI, uses_responses: bool
) -> None:
    model = ChatOpenAI(model="theirs", base_url=server.base_url, api_key="key", use_responses_api=uses_responses)  # type: ignore[arg-type]

    async def agent(task: object) -> float:
        await model.bind_tools([look]).ainvoke(f"call=look*1 {task}")
        return 1.0

    learner, notes = CountingLearner(), Notes()
    algorithm = Distillation()
    with small_trainer(tmp_path / "run", agent, algorithm=algorithm, learner=learner, sinks=[notes]) as trainer:
        trainer.fit(1)
    assert not [line for line in notes.lines if "cannot be imitated" in line]
    assert len(learner.samples) == 2
    for _, sample in learner.samples:
        prompt, answer = (
            bytes(token for token in tokens if token < END_TOKEN).decode()
            for tokens in (sample.prompt_token_ids, sample.token_ids)
        )
        assert '"description": "Look at it."' in prompt
        assert '"name": "look"' in answer
