"""Programs that fail: what is recorded, what is trained, what the user is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import leyden
from integration_tests.other_languages.packages import npm_folder
from integration_tests.other_languages.rollouts import run
from leyden.interfaces import GenerationRequest
from leyden.spans import Completion, Kind, Status
from leyden.testing.fakes import END_TOKEN, Answer, FakeEngine
from tests.running.small import CountingLearner, SmallEngine, small_trainer

FIRST, LONG = "the first answer", "a very long second answer, " * 200
PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT_SECONDS = 5.0
DELTA_SECONDS = 0.1


@pytest.fixture(scope="module")
def argv() -> list[str]:
    return ["node", str(npm_folder(PROGRAMS) / "failing.mjs")]


def ending(how: str) -> Callable[[str], object]:
    """Return the task of a program that ends so."""
    return lambda rollout_id: {"how": how, "question": f"[[rollout={rollout_id}]]"}


def says(request: GenerationRequest) -> Answer:
    return Answer(text=FIRST if str(request.messages[-1]["content"]).startswith("first") else LONG)


def is_the_whole_first_answer(one: Completion) -> bool:
    (choice,) = one.choices
    whole = choice.token_ids == [*FIRST.encode(), END_TOKEN]
    return whole and (one.status, one.delivered, one.role) == (Status.OK, True, "main")


def test_a_program_that_exits_with_a_status_keeps_the_calls_it_made(argv: list[str]) -> None:
    ran = run(leyden.Command(argv), FakeEngine(says), task=ending("exit"))
    result = ran.results["r0"]
    assert (result.error_type, result.infrastructure, result.rewards) == ("CommandError", False, None)
    assert "'node' ended with status 3; the end of its error output:\nno such table: user" in str(result.error)
    (first,) = ran.completions("r0")
    assert is_the_whole_first_answer(first)
    (program,) = ran.spans("r0", Kind.AGENT)
    assert (program.status, program.attributes["process.exit.code"]) == (Status.ERROR, 3)


def test_a_program_that_runs_out_of_time_within_a_stream_leaves_an_interrupted_call(argv: list[str]) -> None:
    engine = FakeEngine(says, delta_seconds=DELTA_SECONDS)
    ran = run(leyden.Command(argv), engine, task=ending("hang"), timeout_seconds=TIMEOUT_SECONDS)
    assert ran.results["r0"].timed_out
    first, second = ran.completions("r0")
    assert is_the_whole_first_answer(first)
    assert (second.status, second.delivered) == (Status.INTERRUPTED, False)
    (choice,) = second.choices
    assert choice.finish_reason == "interrupted"
    sampled = engine.log[1]
    assert sampled.aborted and engine.running == 0, "its place in the engine is free"
    assert 0 < len(choice.token_ids) == len(choice.logprobs)
    assert choice.token_ids == sampled.token_ids[0][: len(choice.token_ids)]
    calls = ran.spans("r0", Kind.MODEL_CALL)
    assert [(span.status, span.span_id) for span in calls] == [(one.status, one.span_id) for one in (first, second)]


def test_a_wrong_reward_is_answered_with_what_is_wrong_and_then_missing(argv: list[str]) -> None:
    ran = run(leyden.Command(argv, reward="post"), FakeEngine(says), task=ending("post"))
    result = ran.results["r0"]
    assert (result.error_type, result.rewards) == ("RewardError", None)
    assert "what 'node' sent to LEYDEN_REWARD_URL holds no reward" in str(result.error)
    (program,) = ran.spans("r0", Kind.AGENT)
    assert "400" in str(program.attributes["leyden.stdout"])
    assert "must be a finite number, got 'high'" in str(program.attributes["leyden.stdout"])


def trained(tmp_path: Path, argv: list[str], how: str) -> tuple[CountingLearner, dict[str, object]]:
    """Train one step on a group of two: the first succeeds, the second ends so."""
    learner = CountingLearner()
    engine = SmallEngine(says, delta_seconds=DELTA_SECONDS)
    with small_trainer(
        tmp_path / "run",
        leyden.Command(argv),
        tasks=[{"how": how, "question": "?"}],
        tasks_per_step=1,
        engine=engine,
        learner=learner,
        timeout_seconds=TIMEOUT_SECONDS,
    ) as trainer:
        return learner, trainer.fit(1)


def trained_tokens(learner: CountingLearner) -> list[tuple[list[int], bool]]:
    """Return the tokens that were trained, and whether their advantage is positive, a sample each."""
    found: list[tuple[list[int], bool]] = []
    for _, sample in learner.samples:
        places = [place for place, weight in enumerate(sample.weights) if weight]
        (is_better,) = {sample.advantages[place] > 0 for place in places}
        found.append(([sample.token_ids[place] for place in places], is_better))
    return sorted(found)


@pytest.mark.parametrize(("how", "error_type"), [("exit", "CommandError"), ("hang", "TimeoutError")])
def test_what_a_failed_program_had_finished_is_trained_and_nothing_else(
    tmp_path: Path, argv: list[str], how: str, error_type: str
) -> None:
    learner, summary = trained(tmp_path, argv, how)
    whole = [*FIRST.encode(), END_TOKEN]
    assert trained_tokens(learner) == [(whole, False), (whole, True)], "a failure counts as a failure"
    assert summary["failures"] == {error_type: 1}


def test_a_program_without_a_readable_reward_is_not_trained_at_all(tmp_path: Path, argv: list[str]) -> None:
    learner, summary = trained(tmp_path, argv, "print")
    assert learner.samples == []
    assert summary["failures"] == {"RewardError": 1}
