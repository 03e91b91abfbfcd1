"""The span tree in the terminal."""

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from leyden.interfaces import RolloutRecords
from leyden.show import one_line, printable, program, seconds, span_tree, task_text, token_trees
from leyden.spans import Choice, Completion, Fork, ForkCause, Kind, Reward, Rollout, Span
from leyden.spantree import answer_of, nodes, prompt_of
from leyden.testing.records import a_completion
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


def forked_example() -> RolloutRecords:
    records = example()
    first, second = records.completions[0], records.completions[-1]
    fork = Fork(
        span_id=first.span_id,
        position=2,
        cause=ForkCause.TEMPLATE,
        before="<|assistant|>\n",
        expected="<think>\nfour\x1b[2J",
        found="There are 4",
    )
    changed = msgspec.structs.replace(second, fork=fork, policy=first.policy)
    return RolloutRecords(
        rollout=records.rollout, spans=records.spans, completions=[first, changed], rewards=records.rewards
    )


LINE = (
    r'fork (template) from call {} after 2 tokens: behind "<|assistant|>\n" it had "<think>\nfour\x1b[2J", '
    'this prompt has "There are 4"'
)


def test_a_call_says_in_one_line_where_and_why_its_prompt_forked() -> None:
    records = forked_example()
    shown = span_tree(records, text=False)
    assert LINE.format(records.completions[0].span_id) in shown
    assert "fork" not in span_tree(example())


def test_a_call_that_went_on_exactly_says_from_how_many_tokens() -> None:
    records = example()
    spliced = [msgspec.structs.replace(one, spliced=17) for one in records.completions]
    shown = span_tree(RolloutRecords(rollout=records.rollout, spans=records.spans, completions=spliced, rewards=[]))
    assert "goes on exactly from 17 tokens" in shown


def test_the_token_tree_shows_what_was_sampled_by_whom_and_where_prompts_fork() -> None:
    root, fork = (
        call_of("s0", [1, 2], [3, 4]),
        Fork(span_id="s0", position=2, cause=ForkCause.EDIT, before="b", expected="e", found="f"),
    )
    drawn = token_trees(
        RolloutRecords(
            rollout=msgspec.structs.replace(rollout("r"), attempt=1),
            spans=[],
            completions=[
                root,
                call_of("s1", [1, 2, 3, 4, 5], [6], start=1),
                call_of("s2", [1, 2, 9], [7], start=2, fork=fork),
            ],
            rewards=[],
        )
    )
    assert drawn.splitlines() == [
        "policy sql: 3 calls, 8 tokens in the tree, 14 in one row a call, forks: 1 edit",
        "2 tokens",
        "├─ 2 tokens sampled by writer 0 (call s0) 'said s0'",
        "│  1 token",
        "│  1 token sampled by writer 1 (call s1) 'said s1'",
        "└─ 1 token",
        '     writer 2: fork (edit) from call s0 after 2 tokens: behind "b" it had "e", this prompt has "f"',
        "   1 token sampled by writer 2 (call s2) 'said s2'",
    ]
    assert token_trees(records_of(rollout("r"), [])) == "no call of this rollout has tokens"


def call_of(span_id: str, prompt: list[int], answer: list[int], start: int = 0, **changes: object) -> Completion:
    choice = Choice(
        index=0, token_ids=answer, logprobs=[-1.0] * len(answer), finish_reason="stop", text=f"said {span_id}"
    )
    return a_completion(
        prompt=prompt, choices=[choice], span_id=span_id, role="writer", policy="sql", start_ns=start, **changes
    )
