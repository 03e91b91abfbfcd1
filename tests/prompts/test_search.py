"""Searching for prompts: the budget, resumes, failures, and which candidate wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pytest

from examples.prompts import letters, model
from leyden.errors import ConfigurationError, RolloutError
from leyden.interfaces import Group, RolloutRecords
from leyden.testing.records import a_rollout
from leyden_plugins.algorithms.prompt import GEPA, BeamSearch, PromptSearch, ReflectionError, gepa
from leyden_plugins.algorithms.prompt.search import split_tasks
from tests.prompts.desk import SEEDS, Desk, Editor, Killed, run

METHODS: list[Callable[..., PromptSearch]] = [
    GEPA,
    partial(GEPA, proposals=3, module_selector="all", merge=True),
    partial(BeamSearch, beam_width=2, branch_factor=2, rounds=4),
]
methods = pytest.mark.parametrize("method", METHODS, ids=["gepa", "gepa-wide", "beam"])


@methods
def test_a_search_improves_several_roles_and_puts_the_winner_in_force(method: Callable[..., PromptSearch]) -> None:
    desk = Desk()
    candidates = run(method(reflection=Editor(), budget=400), desk)
    best = max(candidates, key=lambda one: one.score)
    assert candidates[0].prompts == SEEDS
    assert best.score >= candidates[0].score + 0.3
    [published] = desk.published
    assert published == {role: text for role, text in best.prompts.items() if text != SEEDS[role]}
    assert len(published) >= 2
    assert desk.finished[0]["prompts/score_after"] == best.score
    assert desk.record.winner == best.number


@methods
@pytest.mark.parametrize("budget", [27, 41, 64, 101])
def test_a_budget_is_never_exceeded_and_the_best_so_far_wins(method: Callable[..., PromptSearch], budget: int) -> None:
    desk = Desk()
    candidates = run(method(reflection=Editor(), budget=budget, minibatch=3), desk)
    assert len(desk.paid) == len(set(desk.paid)) <= budget
    assert desk.record.rollouts == len(desk.paid)
    assert desk.record.winner == max(candidates, key=lambda one: (one.score, -one.number)).number
    assert desk.shown[-1] == ("search", len(desk.paid), budget)


@methods
@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.95])
def test_a_killed_search_is_made_again_and_pays_nothing_twice(
    method: Callable[..., PromptSearch], share: float
) -> None:
    whole, editor = Desk(), Editor()
    run(method(reflection=editor, budget=120), whole)
    at = int(share * len(whole.paid))
    desk, again = Desk(dies_at=at), Editor()
    with pytest.raises(Killed):
        run(method(reflection=again, budget=120), desk)
    assert len(desk.paid) == at
    desk.dies_at = None
    run(method(reflection=again, budget=120), desk)
    assert desk.record == whole.record
    assert desk.published == whole.published
    assert sorted(desk.paid) == sorted(whole.paid)
    assert sorted(again.asked) == sorted(editor.asked)


def test_a_search_that_is_run_again_to_its_end_costs_nothing() -> None:
    desk, editor = Desk(), Editor()
    run(GEPA(reflection=editor, budget=120), desk)
    paid, asked = len(desk.paid), len(editor.asked)
    run(GEPA(reflection=editor, budget=120), desk)
    assert (len(desk.paid), len(editor.asked)) == (paid, asked)


def test_rollouts_in_which_prompts_were_read_count_also_after_a_resume() -> None:
    desk = Desk()
    asyncio.run(desk.try_prompts(SEEDS, [0, 1, 2]))  # type: ignore[arg-type]  # a coroutine
    desk.dies_at = 30
    with pytest.raises(Killed):
        run(GEPA(reflection=Editor(), budget=60), desk)
    desk.dies_at = None
    run(GEPA(reflection=Editor(), budget=60), desk)
    assert len(desk.paid) == desk.record.rollouts <= 60


@methods
def test_a_tie_keeps_what_the_roles_said_before(method: Callable[..., PromptSearch]) -> None:
    desk = Desk(reward=lambda prompts, task, score: 0.5)
    candidates = run(method(reflection=Editor(), budget=100), desk)
    assert {one.score for one in candidates} == {0.5}
    assert (desk.published, desk.record.winner) == ([], 0)
    assert "No candidate was better" in desk.told[-1]


@methods
def test_the_search_ends_when_the_user_asks(method: Callable[..., PromptSearch]) -> None:
    desk = Desk(stop_after=40)
    run(method(reflection=Editor(), budget=400), desk)
    assert desk.record.ended == "you asked to stop"
    assert len(desk.paid) < 100 and len(desk.finished) == 1


@methods
def test_reflection_calls_have_a_limit(method: Callable[..., PromptSearch]) -> None:
    desk, editor = Desk(), Editor()
    run(method(reflection=editor, budget=400, max_reflection_calls=9), desk)
    assert 0 < len(editor.asked) == desk.record.reflection_calls <= 9
    assert desk.record.ended == "its max_reflection_calls=9 are spent"


def test_the_tree_says_where_each_candidate_comes_from_and_what_it_changes() -> None:
    desk = Desk()
    candidates = run(GEPA(reflection=Editor(), budget=300, merge=True), desk)
    assert len(candidates) > 4
    for one in candidates[1:]:
        before = candidates[one.parents[0]]
        assert one.changed == [role for role in SEEDS if one.prompts[role] != before.prompts[role]] != []
        assert one.parents[0] < one.number
    assert [one.rollouts for one in candidates] == sorted(one.rollouts for one in candidates)
    for one in candidates:
        found = asyncio.run(desk.try_prompts(one.prompts, desk.record.selection))  # type: ignore[arg-type]
        assert one.scores == [tried.rollout.reward for tried in found]


def test_a_beam_goes_on_from_its_best_candidates_only() -> None:
    desk = Desk()
    candidates = run(BeamSearch(reflection=Editor(), budget=2_000, beam_width=2, branch_factor=3, rounds=4), desk)
    beam, parents_of_round = [candidates[0]], []
    left = candidates[1:]
    while left:
        children = []
        while left and left[0].parents[0] in {one.number for one in beam}:
            children.append(left.pop(0))
        assert children, "a candidate whose parent was not in the beam"
        parents_of_round.append({one.parents[0] for one in children})
        beam = sorted([*beam, *children], key=lambda one: (-one.score, one.number))[:2]
    assert len(parents_of_round) >= 3
    assert desk.record.winner == beam[0].number


def two_sided(prompts: Mapping[str, str], task: int, score: float) -> float:
    """Reward X in one role on even tasks and Y in another on odd ones; either alone harms the other half."""
    has = (prompts["sorter"].endswith("X"), prompts["writer"].endswith("Y"))
    own, other = has if task % 2 == 0 else has[::-1]
    return 1.0 if own else 0.25 if other else 0.5


def one_sided(messages: Sequence[Mapping[str, str]]) -> str:
    """Improve each of the two roles for its own half of the tasks."""
    question = messages[0]["content"]
    role = next(role for role in SEEDS if f"of the role {role!r}" in question)
    return f"```\n{SEEDS[role]}{ {'sorter': ' X', 'writer': ' Y'}.get(role, '') }\n```"


def test_candidates_that_have_improved_different_roles_are_merged() -> None:
    desk = Desk(reward=two_sided)
    search = GEPA(reflection=one_sided, budget=400, minibatch=1, merge=True, seed=1)
    candidates = run(search, desk)
    [merged] = [one for one in candidates if len(one.parents) > 1]
    assert [candidates[parent].changed for parent in merged.parents] == [["sorter"], ["writer"]]
    assert (merged.prompts["sorter"], merged.prompts["writer"]) == (SEEDS["sorter"] + " X", SEEDS["writer"] + " Y")
    assert merged.score == 1.0
    assert desk.record.winner == merged.number


def test_a_merge_refuses_rewards_below_0() -> None:
    below = Desk(reward=lambda *_: -1.0)
    with pytest.raises(ConfigurationError, match=r"merge=True needs rewards of at least 0, but a rollout has -1\.0"):
        run(GEPA(reflection=Editor(), budget=200, merge=True), below)
    run(GEPA(reflection=Editor(), budget=200), below)
    assert below.record.winner == 0


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@methods
def test_single_failures_of_the_reflection_model_are_told_and_the_search_goes_on(
    method: Callable[..., PromptSearch],
) -> None:
    editor = Editor(fails=lambda number: ConnectionError(f"down at {number}") if number % 3 == 0 else None)
    desk = Desk()
    candidates = run(method(reflection=editor, budget=200), desk)
    assert desk.record.reflection_errors == len(editor.asked) // 3 > 0
    assert "ConnectionError: down at" in str(desk.record.last_error)
    assert any("the reflection model failed: ConnectionError: down at 3" in line for line in desk.told)
    assert len(candidates) > 1


@methods
def test_several_failures_in_a_row_stop_the_search_and_a_resume_asks_again(
    method: Callable[..., PromptSearch],
) -> None:
    down = Editor(fails=lambda number: ConnectionError(f"down at {number}") if number > 4 else None)
    desk, whole = Desk(), Desk()
    with pytest.raises(ReflectionError, match=r"3 times in a row.*ConnectionError: down at \d"):
        run(method(reflection=down, budget=120), desk)
    run(method(reflection=Editor(), budget=120), desk)
    run(method(reflection=Editor(), budget=120), whole)
    assert desk.record == whole.record
    assert sorted(desk.paid) == sorted(whole.paid)


def test_a_reflection_model_that_refuses_stops_the_search_at_once() -> None:
    editor = Editor(fails=lambda number: ConfigurationError("HTTP 401: no such key"))
    with pytest.raises(ConfigurationError, match="HTTP 401"):
        run(GEPA(reflection=editor, budget=120), Desk())
    assert len(editor.asked) == 1


@methods
def test_an_answer_without_a_prompt_is_no_candidate(method: Callable[..., PromptSearch]) -> None:
    desk = Desk()
    candidates = run(method(reflection=lambda messages: "```\n\n```", budget=120, max_reflection_calls=8), desk)
    assert len(candidates) == 1


def test_rollouts_without_a_reward_count_as_0_and_are_told_once() -> None:
    desk = Desk(reward=lambda prompts, task, score: None if task % 2 else score)
    candidates = run(GEPA(reflection=Editor(), budget=120), desk)
    odd = [task % 2 for task in desk.record.selection]
    assert all(score == 0.0 for score, is_odd in zip(candidates[0].scores, odd, strict=True) if is_odd)
    assert desk.record.unrewarded == sum(task % 2 for _, task in desk.paid) > 0
    assert len([line for line in desk.told if "has no reward; it and others like it count as 0" in line]) == 1


def test_a_search_under_which_everything_fails_does_not_begin() -> None:
    desk, editor = Desk(error="no database"), Editor()
    with pytest.raises(RolloutError, match=r"all 8 rollouts under the prompts of now failed.*AppError: no database"):
        run(GEPA(reflection=editor, budget=120), desk)
    assert editor.asked == []


@methods
def test_a_role_that_never_speaks_is_told_and_the_others_are_improved(method: Callable[..., PromptSearch]) -> None:
    desk = Desk(silent=["checker"])
    candidates = run(method(reflection=Editor(), budget=300), desk)
    assert any("roles ['checker'] have spoken in none of 8 rollouts" in line for line in desk.told)
    assert {role for one in candidates for role in one.changed} == {"sorter", "writer"}


@methods
@pytest.mark.parametrize("why", ["perfect", "silent"])
def test_a_search_ends_where_there_is_nothing_to_improve(method: Callable[..., PromptSearch], why: str) -> None:
    desk, editor = Desk(silent=list(SEEDS)) if why == "silent" else Desk(reward=lambda *_: 1.0), Editor()
    run(method(reflection=editor, budget=400), desk)
    assert desk.record.ended == "there was nothing left to try"
    assert editor.asked == [] and len(desk.paid) <= 16


def test_rewards_above_1_are_not_taken_for_perfect_where_there_is_none() -> None:
    desk, editor = Desk(reward=lambda prompts, task, score: 10 * score + 1), Editor()
    candidates = run(GEPA(reflection=editor, budget=300, perfect=None), desk)
    assert max(one.score for one in candidates) > candidates[0].score + 3


def test_a_cancelled_search_ends_its_thread() -> None:
    async def cancel() -> None:
        held = asyncio.Event()

        async def never(messages: object) -> str:
            held.set()
            await asyncio.sleep(60)
            return ""

        task = asyncio.create_task(GEPA(reflection=never, budget=120).run(Desk()))  # type: ignore[arg-type]
        await held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(cancel())  # which waits for threads


# ---- which tasks ---------------------------------------------------------------------------------------------------


def test_tasks_are_split_by_the_seed_and_none_gives_feedback_on_what_it_is_compared_by() -> None:
    split = split_tasks(range(20), selection=0.4, seed=1)
    assert sorted([*split.feedback, *split.selection]) == list(range(20))
    assert len(split.selection) == 8
    assert split == split_tasks(range(20), selection=0.4, seed=1) != split_tasks(range(20), selection=0.4, seed=2)
    assert [len(split_tasks([4, 9], selection=share, seed=0).selection) for share in (0.01, 0.5, 0.99)] == [1, 1, 1]


def sampled(rewards: dict[int, list[float | None]]) -> list[Group]:
    return [
        Group(
            group_id=f"s1-t{task}",
            task=None,
            rollouts=[
                RolloutRecords(
                    rollout=a_rollout(f"s1-t{task}-{number}", task_id=f"t{task}", reward=reward),
                    spans=[],
                    completions=[],
                    rewards=[],
                )
                for number, reward in enumerate(some)
            ],
        )
        for task, some in rewards.items()
    ]


def test_a_search_on_unsolved_tasks_takes_those_where_every_rollout_failed() -> None:
    history = sampled({0: [0.0, 1.0], 3: [0.0, 0.0], 5: [None, 0.0], 7: [0.1, 0.0], 9: [0.0], 11: [0.0]})
    history += sampled({9: [1.0]})
    desk = Desk(history=history)
    run(GEPA(reflection=Editor(), budget=120, tasks_from="unsolved"), desk)
    assert {task for _, task in desk.paid} <= {3, 5, 11}
    assert sorted([*desk.record.feedback, *desk.record.selection]) == [3, 5, 11]
    assert "searching prompts on the 3 unsolved of 6 sampled tasks" in desk.told


def test_with_too_few_unsolved_tasks_there_is_no_search() -> None:
    desk = Desk(history=sampled({0: [0.0, 1.0], 3: [0.0, 0.0]}))
    asyncio.run(GEPA(reflection=Editor(), tasks_from="unsolved").run(desk))  # type: ignore[arg-type]
    assert (desk.paid, desk.finished) == ([], [{}])
    assert desk.told == ["1 of 2 sampled tasks are unsolved: too few to search on"]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"minibatch": 0}, "minibatch=0 must be at least 1"),
        ({"selection": 1.0}, "selection=1.0 must be between 0 and 1"),
        ({"max_reflection_calls": 0}, "max_reflection_calls=0"),
        ({"tasks_from": "hard"}, "tasks_from='hard' must be 'all' or 'unsolved'"),
        ({"reflection": "gpt-5"}, r"reflection='gpt-5' must be Reflection\(model"),
        ({"proposals": 0}, "proposals=0 must be at least 1"),
        ({"module_selector": "some"}, "module_selector='some' must be"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        GEPA(**{"reflection": Editor(), **options})  # type: ignore[arg-type]  # what is refused


def test_a_beam_without_width_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="branch_factor=0 must be at least 1"):
        BeamSearch(reflection=Editor(), branch_factor=0)


def test_a_budget_that_compares_nothing_is_refused_before_it_is_spent() -> None:
    desk = Desk()
    with pytest.raises(ConfigurationError, match=r"budget=20 is too small: .* up to 25 rollouts"):
        run(GEPA(reflection=Editor(), budget=20), desk)
    assert desk.paid == []


def test_a_budget_that_compares_few_candidates_is_told() -> None:
    small, large = Desk(), Desk()
    run(GEPA(reflection=Editor(), budget=50), small)
    run(GEPA(reflection=Editor(), budget=70), large)
    assert "budget=50 compares at most 3 candidates on 8 selection tasks" in small.told[0]
    assert not any("compares at most" in line for line in large.told)


def test_a_single_task_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 2 tasks"):
        run(GEPA(reflection=Editor()), Desk(tasks=letters.draw(1, seed=0)))


def test_the_example_s_model_is_as_good_as_its_prompt() -> None:
    assert model.desk(SEEDS["sorter"], "Letter: my invoice") == "GENERAL"
    assert model.desk(SEEDS["sorter"] + model.queue_rule("invoice"), "Letter: my invoice") == "BILLING"


def test_what_fails_where_gepa_would_go_on_stops_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("no such heading")

    monkeypatch.setattr(gepa, "examples", broken)
    with pytest.raises(KeyError, match="no such heading"):
        run(GEPA(reflection=Editor(), budget=120), Desk())
