"""The contract suite's judge: silent about a good run, and loud about each thing that can be wrong with one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from integration_tests.frameworks.contract import COLUMNS, judge
from integration_tests.frameworks.story import ask_of

Run = dict[str, Any]


def span(span_id: str, parent: str | None, kind: str, role: str, **attributes: object) -> dict[str, Any]:
    return {
        "span_id": span_id,
        "parent_id": parent,
        "rollout_id": "r0",
        "kind": kind,
        "name": kind,
        "role": role,
        "status": "ok",
        "error": None,
        "attributes": {key.replace("__", "."): value for key, value in attributes.items()},
    }


def arrived(role: str, key: str, **headers: str) -> dict[str, Any]:
    return {"path": "/v1/chat/completions", "key": key, "role": role, "rollout": "r0", "headers": headers}


def a_run() -> Run:
    """One episode: the planner at the user's endpoint, then the worker, who uses a tool, at the gateway."""
    tokens = {"prompt_token_ids": [1, 2], "token_ids": [[3, 4]], "logprobs": [[-0.5, -1.5]]}
    choice = {"token_ids": [3, 4], "logprobs": [-0.5, -1.5]}
    completion = {
        "span_id": "w1",
        "rollout_id": "r0",
        "role": "worker",
        "status": "ok",
        "delivered": True,
        "error": None,
        "prompt_token_ids": [1, 2],
        "choices": [choice],
    }
    spans = [
        span("root", None, "rollout", "main"),
        span("p", "root", "agent", "planner"),
        span("p1", "p", "model_call", "planner", gen_ai__input__messages="[[role=planner]] [[rollout=r0]]"),
        span("h", "p", "handoff", "planner", leyden__handoff__to="worker"),
        span("w", "root", "agent", "worker"),
        span("w1", "w", "model_call", "worker", gen_ai__output__messages=[{"content": "eight rooms"}]),
        span("t", "w", "tool", "worker", gen_ai__tool__name="search"),
    ]
    return {
        "framework": "made-up",
        "version": "1.0",
        "mode": "async",
        "expected": {
            "calls": {"planner": 1, "worker": 1},
            "tools": {"search": 1},
            "handoffs": {"planner->worker": 1},
        },
        "trained": ["worker"],
        "episodes": [
            {
                "rollout": "r0",
                "answer": "eight rooms",
                "error": None,
                "unheard": None,
                "declared": ["planner", "worker"],
                "spans": spans,
            }
        ],
        "server": {
            "gateway": [arrived("worker", "token-0")],
            "user": [arrived("planner", "user-key")],
            "tokens": {"r0": "token-0", "r1": "token-1"},
            "said": [
                {"role": "planner", "rollout": "r0", "text": "a plan"},
                {"role": "worker", "rollout": "r0", "text": "eight rooms"},
            ],
            "failures": [],
            "completions": [completion],
            "made": [{"role": "worker", "rollout": "r0", "text": "eight rooms<|im_end|>", "aborted": False, **tokens}],
        },
    }


def spans_of(run: Run) -> dict[str, dict[str, Any]]:
    return {each["span_id"]: each for each in run["episodes"][0]["spans"]}


def test_a_good_run_has_no_fault() -> None:
    verdict = judge(a_run())
    assert verdict.faults == []
    assert verdict.row() == {
        "framework": "made-up",
        "version": "1.0",
        "mode": "async",
        "calls": 2,
        **dict.fromkeys(COLUMNS, 0),
    }


FAULTS: dict[str, tuple[str, Callable[[Run], object]]] = {
    "completion of another role": ("wrong_role", lambda run: run["server"]["completions"][0].update(role="critic")),
    "span of another role": ("wrong_role", lambda run: spans_of(run)["w1"].update(role="main")),
    "untrained span of another role": ("wrong_role", lambda run: spans_of(run)["p1"].update(role="worker")),
    "untrained call without a span": ("wrong_role", lambda run: run["episodes"][0]["spans"].pop(2)),
    "completion of another rollout": (
        "wrong_rollout",
        lambda run: run["server"]["completions"][0].update(rollout_id="r1"),
    ),
    "key of another rollout": ("wrong_rollout", lambda run: run["server"]["gateway"][0].update(key="token-1")),
    "untrained span with another's prompt": (
        "wrong_rollout",
        lambda run: spans_of(run)["p1"]["attributes"].update({"gen_ai.input.messages": "[[rollout=r1]]"}),
    ),
    "completion without its span": ("wrong_parent", lambda run: run["server"]["completions"][0].update(span_id="x")),
    "completion of an agent's span": ("wrong_parent", lambda run: run["server"]["completions"][0].update(span_id="w")),
    "call below another agent": ("wrong_parent", lambda run: spans_of(run)["w1"].update(parent_id="p")),
    "call below no agent": ("wrong_parent", lambda run: spans_of(run)["w1"].update(parent_id="root")),
    "tool below another agent": ("wrong_parent", lambda run: spans_of(run)["t"].update(parent_id="p", role="planner")),
    "span below nothing": ("wrong_parent", lambda run: spans_of(run)["w"].update(parent_id="gone")),
    "span below itself": ("wrong_parent", lambda run: spans_of(run)["w"].update(parent_id="w")),
    "trained role at the user's": ("misrouted", lambda run: run["server"]["user"][0].update(role="worker")),
    "untrained role at the gateway": ("misrouted", lambda run: run["server"]["gateway"][0].update(role="planner")),
    "user's key at the gateway": ("misrouted", lambda run: run["server"]["gateway"][0].update(key="user-key")),
    "gateway's key at the user's": ("misrouted", lambda run: run["server"]["user"][0].update(key="token-0")),
    "headers at the user's": (
        "misrouted",
        lambda run: run["server"]["user"][0].update(headers={"x-leyden-role": "planner"}),
    ),
    "span left open": ("open_spans", lambda run: spans_of(run)["t"].update(status="abandoned")),
    "one id": (
        "token_mismatches",
        lambda run: run["server"]["completions"][0]["choices"][0].update(token_ids=[3, 5]),
    ),
    "one log-probability": (
        "token_mismatches",
        lambda run: run["server"]["completions"][0]["choices"][0].update(logprobs=[-0.5, -1.0]),
    ),
    "prompt": ("token_mismatches", lambda run: run["server"]["completions"][0].update(prompt_token_ids=[1])),
    "no completion": ("token_mismatches", lambda run: run["server"]["completions"].clear()),
    "not delivered": ("token_mismatches", lambda run: run["server"]["completions"][0].update(delivered=False)),
    "completion twice": (
        "token_mismatches",
        lambda run: run["server"]["completions"].append(copy.deepcopy(run["server"]["completions"][0])),
    ),
    "other text heard": (
        "token_mismatches",
        lambda run: spans_of(run)["w1"]["attributes"].update({"gen_ai.output.messages": [{"content": "nine"}]}),
    ),
    "other text returned": ("token_mismatches", lambda run: run["episodes"][0].update(answer="eight")),
    "answer cut": ("token_mismatches", lambda run: run["episodes"][0].update(unheard="EngineError('cut')")),
    "app failed": ("episode", lambda run: run["episodes"][0].update(error="ValueError: x")),
    "script failed": ("episode", lambda run: run["server"]["failures"].append("no role")),
    "span with an error": ("episode", lambda run: spans_of(run)["t"].update(status="error", error="x")),
    "role not declared": ("episode", lambda run: run["episodes"][0].update(declared=["worker"])),
    "tool missing": ("episode", lambda run: run["episodes"][0]["spans"].pop()),
    "handoff elsewhere": (
        "episode",
        lambda run: spans_of(run)["h"]["attributes"].update({"leyden.handoff.to": "critic"}),
    ),
    "nothing ran": ("episode", lambda run: run.update(episodes=[])),
}


@pytest.mark.parametrize(("column", "damage"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_counted_in_its_column(column: str, damage: Callable[[Run], object]) -> None:
    run = a_run()
    damage(run)
    verdict = judge(run)
    assert any(fault.startswith(f"{column}: ") for fault in verdict.faults), verdict.faults
    assert column == "episode" or verdict.row()[column] != 0


def test_who_asks_is_read_from_the_prompt() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "[[role=worker]] work"}]},
        {"role": "user", "content": "[[rollout=r1]] [[role=planner]]"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "[[rollout=r2]]"},
    ]
    tools = [{"type": "function", "function": {"name": "search"}}, {"type": "function", "name": "find"}]
    ask = ask_of(messages, tools, {"type": "json_object"})
    assert (ask.role, ask.rollout, ask.tools) == ("worker", "r2", ("search", "find"))
    assert ask.format == {"type": "json_object"}


@pytest.mark.parametrize("instructions", ["no tag", "[[role=worker]] [[role=critic]]"])
def test_a_prompt_that_does_not_say_who_asks_is_refused(instructions: str) -> None:
    messages = [{"role": "system", "content": instructions}, {"role": "user", "content": "[[rollout=r1]]"}]
    with pytest.raises(ValueError, match="must name one role"):
        ask_of(messages)
