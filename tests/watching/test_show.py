"""The span tree in the terminal."""

import asyncio
import sys
from pathlib import Path

import pytest

from leyden.interfaces import RolloutRecords
from leyden.show import one_line, printable, program, seconds, span_tree, task_text
from leyden.spans import Completion, Kind, Reward, Rollout, Span
from leyden.spantree import answer_of, nodes, prompt_of
from tests.watching.fake_run import call_records, rollout, rollout_records


def records_of(one: Rollout, everything: list[object]) -> RolloutRecords:
    return RolloutRecords(
        rollout=one,
        spans=[record for record in everything if isinstance(record, Span)],
        completions=[record for record in everything if isinstance(record, Completion)],
        rewards=[record for record in everything if isinstance(record, Reward)],
    )


def example(**changes: object) -> RolloutRecords:
    return records_of(rollout("s1-t0-0", reward=0.0), list(rollout_records("s1-t0-0", reward=0.0, **changes)))


def span(name: str, parent: str | None, start: int = 0, **attributes: object) -> Span:
    return Span(
        span_id=name,
        parent_id=parent,
        rollout_id="r",
        attempt=1,
        kind=Kind.AGENT,
        name=name,
        role="main",
        start_ns=start,
        end_ns=start + 5,
        attributes=attributes,
    )


def test_the_tree_shows_who_spoke_with_tokens_version_prompt_and_answer() -> None:
    lines = span_tree(example()).splitlines()
    assert lines[0] == "s1-t0-0 · train · step 1 · succeeded · reward 0"
    assert "├─ agent writer · writer · 167 ms" in lines
    assert "│  └─ model_call ChatOpenAI · writer · 167 ms · 30 + 24 tokens · sql v3" in lines
    assert "│        > user: Which cities are large? Try 0." in lines
    assert "│        < SELECT name, population FROM city WHERE population > 1000000 ORDER BY population DESC" in lines
    assert "│  └─ model_call ChatOpenAI · checker · 167 ms · 40 + 3 tokens" in lines
    assert "rewards: reward 0, first_query 0" in lines


def test_children_stand_under_their_parents_in_order_of_time() -> None:
    spans = [span("late", "root", 9), span("inner", "early", 3), span("early", "root", 2), span("root", None)]
    found = nodes(records_of(rollout("r"), list(spans)))
    assert [(node.span.name, node.depth) for node in found] == [("root", 0), ("early", 1), ("inner", 2), ("late", 1)]


def test_every_span_appears_once_although_parents_are_missing_or_go_in_a_circle() -> None:
    spans = [span("a", "b", 1), span("b", "a", 2), span("self", "self", 3), span("orphan", "nobody", 4)]
    found = [node.span.name for node in nodes(records_of(rollout("r"), list(spans)))]
    assert sorted(found) == ["a", "b", "orphan", "self"]


def test_a_tree_deeper_than_the_recursion_limit_is_shown() -> None:
    spans = [span(f"s{depth}", f"s{depth - 1}" if depth else None, depth) for depth in range(3000)]
    assert [node.depth for node in nodes(records_of(rollout("r"), list(spans)))] == list(range(3000))


def test_an_error_names_its_type_and_the_span_where_it_happened() -> None:
    shown = span_tree(
        records_of(
            rollout("s1-t0-0", reward=0.0, error="no such column"),
            list(rollout_records("s1-t0-0", reward=0.0, error="no such column")),
        )
    )
    assert "ToolError: no such column" in shown
    assert "tool execute · main · 167 ms · error" in shown
    assert "! no such column" in shown


def test_terminal_escapes_of_an_agent_are_spelled_out() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202ehidden\x9b31m"
    shown = span_tree(example(answer=evil))
    assert not any(character in shown for character in "\x1b\x07\r\u202e\x9b")
    assert r"\x1b]0;owned\x07\x1b[2J" in shown
    assert r"\u202ehidden" in shown


def test_colour_is_only_there_when_asked_for() -> None:
    assert "\x1b[" not in span_tree(example())
    assert "\x1b[1m" in span_tree(example(), color=True)


def test_long_texts_are_cut_unless_all_text_is_asked_for() -> None:
    answer = "\n".join(f"line {number} " + "x" * 300 for number in range(20))
    assert "… 14 more lines" in span_tree(example(answer=answer))
    assert "line 19 " not in span_tree(example(answer=answer))
    assert "line 19 " + "x" * 300 in span_tree(example(answer=answer), all_text=True)


def test_all_text_shows_the_whole_prompt() -> None:
    assert "> system: You are the writer" not in span_tree(example())
    assert "> system: You are the writer" in span_tree(example(), all_text=True)


def test_tokens_are_shown_with_their_log_probabilities() -> None:
    shown = span_tree(example(answer="AB"), tokens=True)
    assert "choice 0, token id (log-probability): 65(-0.250) 66(-0.250)" in shown
    assert "prompt token ids: 0 1 2 3" in shown
    assert "log-probability" not in span_tree(example(answer="AB"))


def test_without_text_no_prompt_is_shown() -> None:
    assert "Which cities are large" not in span_tree(example(), text=False)


def test_a_completion_whose_span_never_came_is_not_hidden() -> None:
    only = [
        record for record in call_records("r", number=0, role="writer", answer="hi") if isinstance(record, Completion)
    ]
    assert "completion without a span: writer · sql v3 · 30 + 2 tokens · ok" in span_tree(
        records_of(rollout("r"), list(only))
    )


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ([{"role": "user", "content": "hi"}], [("user", "hi")]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [("user", "a\nb")],
        ),
        ([{"role": "user", "parts": [{"type": "text", "content": "hi"}]}], [("user", "hi")]),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "run", "arguments": '{"q": 1}'}}]}],
            [("assistant", 'run({"q": 1})')],
        ),
        ("plain prompt", [("user", "plain prompt")]),
        (["odd"], [("", "odd")]),
        (7, []),
        (None, []),
    ],
)
def test_messages_of_many_shapes_become_text(recorded: object, expected: list[tuple[str, str]]) -> None:
    found = prompt_of(span("call", None, **{"gen_ai.input.messages": recorded}))
    assert [(one.role, one.text) for one in found] == expected


def test_an_answer_that_no_adapter_recorded_comes_from_the_completion() -> None:
    _, completion = call_records("r", number=0, role="writer", answer="SELECT 1")
    bare = span("r/call0", None)
    (node,) = nodes(records_of(rollout("r"), [bare, completion]))
    assert [one.text for one in answer_of(node)] == ["SELECT 1"]


def test_a_task_is_shown_by_its_question_or_else_as_json() -> None:
    assert task_text({"id": 3, "question": "How many?"}) == "How many?"
    assert task_text({"id": 3}) == '{"id":3}'
    assert task_text("How many?") == "How many?"


def test_one_line_cuts_and_joins() -> None:
    assert one_line("a\n b\x00", 20) == "a b\\x00"
    assert one_line("abcdef", 4) == "abc…"
    assert printable("\ud800") == "\\ud800"


@pytest.mark.parametrize(
    ("ns", "shown"),
    [(1_500_000, "1.5 ms"), (40_000_000, "40 ms"), (2_340_000_000, "2.34 s"), (61 * 10**9, "1 min 1 s")],
)
def test_durations_are_for_people(ns: int, shown: str) -> None:
    assert seconds(ns) == shown


def test_what_the_tree_says_already_is_not_repeated_as_an_attribute() -> None:
    told = span("writer", None, **{"gen_ai.agent.name": "writer", "leyden.rewards": {"reward": 1.0}, "tries": 2})
    shown = span_tree(RolloutRecords(rollout=rollout("r", reward=1.0), spans=[told], completions=[], rewards=[]))
    assert "tries = 2" in shown
    assert "gen_ai.agent.name" not in shown and "leyden.rewards" not in shown


def test_commands_name_the_environments_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder = tmp_path / "a b" / "bin"
    bin_folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    assert program() == f"'{bin_folder / 'python'}' -m leyden.cli"
    (bin_folder / "leyden").write_text("#!/bin/sh\n")
    (bin_folder / "leyden").chmod(0o755)
    assert program() == "'a b/bin/leyden'"
    monkeypatch.setenv("PWD", "/")
    assert program() == f"'{bin_folder / 'leyden'}'"
    monkeypatch.setenv("PATH", str(bin_folder))
    assert program() == "leyden"


def test_a_stored_rollout_is_shown_like_the_records_it_was_made_of(tmp_path: Path) -> None:
    from leyden.sqlite import SQLiteStore
    from tests.watching.fake_run import add_finished

    async def stored() -> RolloutRecords:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await add_finished(store, [rollout("s1-t0-0", reward=0.0)], [rollout_records("s1-t0-0", reward=0.0)])
            return (await store.records(["s1-t0-0"]))[0]

    assert span_tree(asyncio.run(stored())).splitlines()[1:] == span_tree(example()).splitlines()[1:]
