"""The tasks of the prompt benchmark: prompts decide the score, and everything is decided by hashes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import httpx
import pytest

from benchmarks import prompts as benchmark
from benchmarks.prompt_tasks.problem import Problem, record
from benchmarks.prompt_tasks.problems import PROBLEMS
from benchmarks.prompt_tasks.reflecting import answer, lost, prompt_in
from benchmarks.prompt_tasks.server import ModelServer

DESK = PROBLEMS["desk"]
OPENING = DESK.openings["clerk"]
REFUND = "When the topic is refund, answer with the queue BILLING."
WRONG = record("ticket", "t1", topic="refund", mood="sad") + " -> " + record("answer", "t1", queue="unsure")


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_first_prompts_score_low_and_full_ones_high(problem: Problem) -> None:
    assert benchmark.held_out(problem, problem.openings, 1) < 0.35
    assert benchmark.held_out(problem, problem.full, 1) > 0.9


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_rule_counts(problem: Problem) -> None:
    full = benchmark.held_out(problem, problem.full, 1)
    for role, rules in problem.rules.items():
        for rule in rules:
            without = {**problem.full, role: problem.full[role].replace(f"\n{rule}", "")}
            assert benchmark.held_out(problem, without, 1) < full - 0.03, rule


def test_one_of_three_roles_alone_cannot_win() -> None:
    problem = PROBLEMS["three_roles"]
    found = {
        role: benchmark.held_out(problem, {**problem.openings, role: problem.full[role]}, 1)
        for role in problem.openings
    }
    assert max(found.values()) < 0.6
    assert found["reader"] > max(found["writer"], found["router"]), "the one that a method for one role is given"


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_held_out_tasks_are_others_than_those_of_the_search(problem: Problem) -> None:
    assert problem.tasks(1, "search", 20) == problem.tasks(1, "search", 40)[:20]
    assert not {one["id"] for one in problem.tasks(1, "search", 40)} & {
        one["id"] for seed in (1, 2) for one in problem.tasks(seed, "heldout", 40)
    }


# ---- the model that rewrites prompts --------------------------------------------------------------------------------


def reflected(request: str) -> list[str]:
    return [answer(DESK, request, seed) for seed in range(400)]


def rules_in(text: str) -> list[str]:
    prompt = prompt_in(DESK, text)
    assert prompt is not None
    return prompt.rules


def test_a_proposal_adds_the_missing_rule_and_three_in_ten_are_damaged() -> None:
    found = reflected(f"```\n{OPENING}\n```\nWhat happened:\n{WRONG}")
    good = sum(rules_in(text) == [REFUND] for text in found)
    poets = sum(lost("clerk") in text for text in found)
    assert 0.65 < good / len(found) < 0.75
    assert 0.06 < poets / len(found) < 0.14


def test_a_critique_names_the_rule_and_its_edit_adds_it() -> None:
    traces = json.dumps({"gen_ai.prompt.1.content": WRONG})  # as spans are written into a request
    [critique] = set(reflected(f"# Current Prompt Template\n\n{OPENING}\n\n{traces}\n\nWrite a Critique:"))
    assert critique == f"- Missing rule: {REFUND}"
    found = reflected(f"Revise by the critique.\n\n# PROMPT\n\n{OPENING}\n\n# CRITIQUE\n\n{critique}")
    assert 0.65 < sum(text == f"{OPENING}\n{REFUND}" for text in found) / len(found) < 0.75


def test_what_noise_made_wrong_leads_to_no_rule() -> None:
    [critique] = set(reflected(f"{OPENING}\n{REFUND}\n\n{WRONG}\nWrite a critique."))
    assert REFUND not in critique


def test_a_lost_prompt_comes_back_as_its_own_role_s() -> None:
    problem = PROBLEMS["three_roles"]
    found = [answer(problem, f"```\n{lost('writer')}\n```", seed) for seed in range(20)]
    assert any(problem.openings["writer"] in text for text in found)
    assert all(problem.openings["reader"] not in text for text in found)


# ---- the server -----------------------------------------------------------------------------------------------------


async def asked(server: ModelServer, body: Mapping[str, object], count: int) -> list[str]:
    transport = httpx.ASGITransport(app=server.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://models") as client:
        replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(count)))
    return [reply.json()["choices"][0]["message"]["content"] for reply in replies]


def test_two_servers_of_one_seed_answer_alike_and_count_what_they_answer() -> None:
    question = {"role": "user", "content": f"```\n{OPENING}\n```\n{WRONG}"}
    reflection = {"model": "desk/reflection", "messages": [question]}
    ticket = {"role": "user", "content": record("ticket", "t1", topic="refund", mood="calm")}
    clerk = {"model": "desk/clerk", "messages": [{"role": "system", "content": f"{OPENING}\n{REFUND}"}, ticket]}
    first, second, other = ModelServer(1), ModelServer(1), ModelServer(2)
    proposals = asyncio.run(asked(first, reflection, 12))
    assert len(set(proposals)) > 1, "equal questions get one answer after the other"
    assert asyncio.run(asked(second, reflection, 12)) == proposals
    assert asyncio.run(asked(other, reflection, 12)) != proposals
    [reply] = asyncio.run(asked(first, clerk, 1))
    assert reply == "(answer t1: queue=BILLING tone=unsure)"
    assert [one.model for one in first.log] == ["desk/reflection"] * 12 + ["desk/clerk"]


@pytest.mark.parametrize(("name", "spent"), [("desk", 298), ("rooms", 334), ("three_roles", 298)])
def test_the_budget_is_what_agent_lightning_was_seen_to_spend(name: str, spent: int) -> None:
    assert benchmark.budget(PROBLEMS[name]) == spent
