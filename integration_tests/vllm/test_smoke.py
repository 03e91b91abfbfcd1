"""The shortest look at a real vLLM server: it starts, calls are captured, and trained weights arrive.

`make test` runs this file alone; `make test-vllm` the whole folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from integration_tests.vllm.gates import Gate, compare, plain
from leyden.interfaces import Loss, Objective, Sample
from leyden.roles import Policy
from leyden_plugins.learners.torch import TorchLearner

MESSAGES = [{"role": "user", "content": "How many users are there?"}]
LEARNING_RATE = 1e-2
"""A step of AdamW that no forward pass could miss."""


def test_calls_are_captured_and_a_trained_version_is_served_exactly(whole: Gate, tmp_path: Path) -> None:
    with whole.agent() as (client, recorded):
        chat = client.chat.completions
        answer = chat.create(model="me", messages=MESSAGES, max_tokens=24, temperature=1.0, logprobs=True)
        chunks = list(chat.create(model="me", messages=MESSAGES, max_tokens=24, temperature=1.0, stream=True))
    before, version = plain(whole.served), whole.version
    assert [one.version for one in recorded] == [version, version]
    assert not any(one.off_distribution for one in recorded)
    said = answer.choices[0]
    assert said.logprobs is not None and said.logprobs.content is not None
    assert [one.logprob for one in said.logprobs.content] == recorded[0].choices[0].logprobs
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == recorded[1].choices[0].text
    compare(whole, "forward pass: JSON and streamed", recorded, {"me": before})

    learner = TorchLearner()
    learner.open([Policy("me")], str(whole.served), seed=0)
    learner.forward_backward("me", [Objective(loss=Loss(name="policy_gradient"), samples=[lesson(recorded[0])])])
    learner.optim_step("me", LEARNING_RATE)
    learner.export("me", tmp_path / "trained")
    whole.push(tmp_path / "trained")
    with whole.agent() as (client, recorded):
        client.chat.completions.create(model="me", messages=MESSAGES, max_tokens=24, temperature=0.7, n=4)
    (completion,) = recorded
    assert completion.version == version + 1
    compare(whole, "forward pass: after a push of trained weights", recorded, {"me": plain(tmp_path / "trained")})
    with pytest.raises(AssertionError, match="forward pass"):  # the step can be seen: the old weights say otherwise
        compare(whole, "forward pass", recorded, {"me": before})
    samples = [sample(completion.prompt_token_ids, choice.token_ids, choice.logprobs) for choice in completion.choices]
    for choice, expected in zip(completion.choices, learner.logprobs("me", samples), strict=True):
        whole.figures.compare("learner: n = 4 at T = 0.7", choice.logprobs, expected)
    learner.close()


def sample(prompt: list[int], answer: list[int], logprobs: list[float], temperature: float = 0.7) -> Sample:
    """Return a call as the learner sees it."""
    ones = [1.0] * len(answer)
    return Sample(
        prompt_token_ids=prompt,
        token_ids=answer,
        weights=ones,
        advantages=ones,
        logprobs=logprobs,
        temperature=temperature,
    )


def lesson(completion: object) -> Sample:
    """Return a recorded call as something to learn from."""
    choice = completion.choices[0]  # type: ignore[attr-defined]
    return sample(completion.prompt_token_ids, choice.token_ids, choice.logprobs, temperature=1.0)  # type: ignore[attr-defined]
