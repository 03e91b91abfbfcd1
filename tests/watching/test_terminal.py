"""What the terminal shows while a run goes on and when it has ended."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from leyden_plugins.observers import terminal
from leyden_plugins.observers.terminal import TerminalSink, differing, interval, labelled
from tests.watching.fake_run import summary

INFO = {
    "run_folder": "runs/sql",
    "total_steps": 3,
    "tasks": 100,
    "val_tasks": 20,
    "tasks_per_step": 16,
    "group_size": 8,
    "policies": {"sql": ["writer", "rewriter"]},
}
METRICS = {"reward/mean": 0.5, "evaluation/reward": 0.625, "throughput/tokens_per_second": 1234.5}


def plain() -> tuple[TerminalSink, io.StringIO]:
    out = io.StringIO()
    return TerminalSink(Console(file=out, width=120, highlight=False)), out


def live() -> tuple[TerminalSink, io.StringIO]:
    out = io.StringIO()
    return TerminalSink(Console(file=out, width=120, highlight=False, force_terminal=True)), out


def go_through(sink: TerminalSink) -> None:
    sink.run_started(INFO)
    sink.notice("roles seen (model calls): writer 8")
    for step in (1, 2, 3):
        for done in (1, 64, 128):
            sink.progress(
                {
                    "phase": "rollouts",
                    "step": step,
                    "total_steps": 3,
                    "done": done,
                    "of": 128,
                    "tokens_per_second": 900.0,
                }
            )
        sink.step_finished(step, METRICS)


def test_a_step_says_what_its_reward_must_be_read_with_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    sink, out = plain()
    sink.run_started(INFO)
    bad = {
        "rollouts/failed_share": 0.125,
        "rollouts/unrewarded_share": 0.25,
        "sql/lengths/overlong_share": 0.5,
        "lengths/overlong_share": 0.25,
    }
    groups = {"groups/total": 16.0, "groups/without_signal": 5.0}
    sink.step_finished(1, {"reward/mean": 0.5, **groups, **bad})
    sink.step_finished(2, {"reward/mean": 0.5, **groups, **dict.fromkeys(bad, 0.0)})
    assert out.getvalue().splitlines()[1:] == [
        "step 1/3  reward 0.500  11/16 groups differ  12% failed  25% without reward  50% cut off",
        "step 2/3  reward 0.500  11/16 groups differ",
    ]


def test_without_a_terminal_steps_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    sink, out = plain()
    go_through(sink)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert lines[0] == (
        "run runs/sql: 3 steps of 16 tasks x 8; 100 tasks, 20 held out; policies sql (writer, rewriter)"
    )
    assert lines[1] == "roles seen (model calls): writer 8"
    assert lines[2].startswith("step 1/3  reward 0.500  held-out 0.625  1,234 tokens/s  0:0")
    assert lines[2].endswith("left")
    assert lines[4] == "step 3/3  reward 0.500  held-out 0.625  1,234 tokens/s"


def test_plain_lines_come_at_most_every_few_seconds_but_the_last_step_always() -> None:
    sink, out = plain()
    go_through(sink)
    assert [line for line in out.getvalue().splitlines() if line.startswith("step")] == [
        line for line in out.getvalue().splitlines() if line.startswith(("step 1/3", "step 3/3"))
    ]


def test_an_evaluation_is_announced_once() -> None:
    sink, out = plain()
    sink.run_started(INFO)
    for done in range(1, 21):
        sink.progress({"phase": "evaluation", "step": 0, "total_steps": 3, "done": done, "of": 20})
    assert out.getvalue().count("held-out evaluation after step 0: 20 tasks") == 1


def test_a_terminal_shows_one_live_bar_with_the_figures_and_gets_its_cursor_back() -> None:
    sink, out = live()
    go_through(sink)
    sink.run_finished(summary(Path("runs/sql"), 3))
    shown = out.getvalue()
    assert "step 3/3" in shown
    assert "reward 0.500 · held-out 0.625 · 1,234 tokens/s" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_at_the_end_stand_intervals_roles_examples_failures_and_what_to_try_next() -> None:
    sink, out = plain()
    sink.run_finished(summary(Path("runs/sql"), 3))
    shown = " ".join(out.getvalue().split())
    assert "reward 0.520 [0.440, 0.590] 0.910 [0.830, 0.980] +0.390 [+0.310, +0.460] 60" in shown
    assert "first_query 0.410 [0.330, 0.480] 0.860 [0.780, 0.930]" in shown
    assert "writer sql 60 1.00 0.910" in shown
    assert "checker none: its own endpoint 71 1.18 0.900" in shown
    assert "Which cities have more than a million people?" in shown
    assert "before reward 0 SELECT name, population FROM city WHERE after reward 1 SELECT name" in shown
    assert "failures: TimeoutError 1, ToolError 4; 1 attempts" in shown
    assert "5,120 rollouts, 12,345 model calls, 480,000 tokens sampled" in shown
    for command in (
        "leyden rollouts runs/sql",
        "leyden show runs/sql e3-t1",
        "leyden serve runs/sql/checkpoints/step-000003",
        "leyden export runs/sql exported",
        "runs/sql/report.html",
    ):
        assert command in shown


def test_a_run_that_runs_no_agent_speaks_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    sink, out = plain()
    sink.run_started(INFO | {"tasks": 0, "group_size": 1})
    sink.step_finished(1, {"loss/loss": 0.25, "throughput/tokens_per_second": 0.0})
    sink.run_finished(summary(Path("runs/sql"), 3) | {"rollouts": 0})
    shown = out.getvalue()
    assert "run runs/sql: 3 steps; policies sql (writer, rewriter)" in shown
    assert "step 1/3  loss 0.250\n" in shown
    assert "leyden rollouts" not in shown and "leyden export" in shown


def test_a_search_for_prompts_alone_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, out = plain()
    sink.run_started(INFO | {"total_steps": 1, "policies": {}})
    assert "run runs/sql: 1 step; 100 tasks, 20 held out\n" in out.getvalue()


def test_a_run_that_was_stopped_says_how_to_go_on_and_one_that_was_resumed_says_what_it_counts() -> None:
    whole = summary(Path("runs/sql"), 3)
    sink, out = plain()
    sink.run_finished({**whole, "total_steps": 3})
    assert "leyden resume" not in out.getvalue()
    sink.run_finished({**whole, "total_steps": 20, "resumed_after": 2})
    shown = " ".join(out.getvalue().split())
    assert "leyden resume runs/sql # go on after step 3" in shown
    assert "5,120 rollouts in all, 12,345 model calls since the resume after step 2, 480,000 tokens" in shown


def test_text_of_an_agent_is_neither_markup_nor_control() -> None:
    sink, out = live()
    evil = "[bold red]x[/] [link=http://evil]y[/link] \x1b[2Jz :smiley:"
    sink.run_finished(
        {
            "run_folder": "runs/sql",
            "evaluations": {"after": {evil: {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}}},
            "roles": {evil: {"policy": "[red]p", "calls": 1}},
            "examples": [
                {"task": evil, "before": {"output": evil, "reward": 0}, "after": {"output": "[/]", "reward": 1}}
            ],
            "failures": {evil: 2},
        }
    )
    shown = out.getvalue()
    assert "\x1b[2J" not in shown and r"\x1b[2Jz" in shown
    assert shown.count("[bold red]x[/] [link=http://evil]y[/link]") >= 4
    assert "\x1b]8;" not in shown, "no link was made"
    assert ":smiley:" in shown


def test_an_empty_summary_of_a_stopped_run_is_no_error() -> None:
    sink, out = plain()
    sink.run_finished({})
    assert "failures: none" in out.getvalue()


def test_outputs_are_compared_where_they_differ() -> None:
    assert differing({"sql": "a", "rows": 1}, {"sql": "b", "rows": 1}) == ("a", "b")
    assert differing({"a": 1, "b": 2}, {"a": 3, "b": 4}) == ({"a": 1, "b": 2}, {"a": 3, "b": 4})
    assert differing("x", {"a": 1}) == ("x", {"a": 1})
    assert differing({"sql": "a"}, {"sql": "a"}) == ("a", "a")
    assert differing(None, None) == ("", "")


def test_fields_of_an_output_that_say_the_same_share_a_line() -> None:
    assert labelled({"first": "SELECT 1", "last": "SELECT 1"}) == [("first, last: ", "SELECT 1")]
    assert labelled({"first": "SELECT 1", "rows": [1]}) == [("first: ", "SELECT 1"), ("rows: ", "[1]")]
    assert labelled("a\nb") == [("", "a b")]
    assert labelled({}) == [("", "{}")]
    assert labelled(None) == [("", "")]


def test_on_a_narrow_screen_an_interval_stays_whole_below_its_mean() -> None:
    out = io.StringIO()
    TerminalSink(Console(file=out, width=80, highlight=False)).run_finished(summary(Path("runs/sql"), 3))
    assert max(len(line) for line in out.getvalue().splitlines() if "[0." in line) <= 80
    assert "[+0.310, +0.460]" in out.getvalue() and "[0.830, 0.980]" in out.getvalue()


def test_the_total_stands_before_the_other_rewards() -> None:
    sink, out = plain()
    one = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    sink.run_finished({"evaluations": {"after": {"first_query": one, "reward": one}}})
    assert out.getvalue().index("\n  reward  ") < out.getvalue().index("\n  first_query")


def test_an_interval_without_a_mean_is_a_dash() -> None:
    assert interval({}) == "-"
    assert interval({"mean": None}) == "-"
    assert interval({"mean": 0.5}) == "0.500"


def test_a_notice_is_neither_markup_nor_control() -> None:
    sink, out = live()
    sink.notice("failures so far: [bold]Odd[/]Error \x1b[2J")
    assert out.getvalue() == "failures so far: [bold]Odd[/]Error \\x1b[2J\n"
