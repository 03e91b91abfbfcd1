"""metrics.jsonl, and what the metrics mean."""

import json
import re
from pathlib import Path

import pytest

from leyden_plugins.learners.torch.losses import Statistics
from leyden_plugins.observers.jsonl import JsonlSink, read_metrics
from leyden_plugins.observers.metrics import CHARTS, METRICS, THEMES, base_name, matches, unit_of

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def write(folder: Path, *lines: tuple[int, dict[str, float]]) -> None:
    sink = JsonlSink()
    sink.run_started({"run_folder": str(folder)})
    for step, metrics in lines:
        sink.step_finished(step, metrics)
    sink.run_finished({})


def test_every_step_is_one_line_that_any_tool_can_read(tmp_path: Path) -> None:
    write(tmp_path, (1, {"reward/mean": 0.5}), (2, {"reward/mean": 0.75}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reward/mean"]) for line in lines] == [(1, 0.5), (2, 0.75)]
    assert all(line["time"] > 1e9 for line in lines)


def test_a_line_is_there_as_soon_as_its_step_is_finished(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.run_started({"run_folder": str(tmp_path)})
    sink.step_finished(1, {"reward/mean": 0.5})
    assert read_metrics(tmp_path) == {1: {"reward/mean": 0.5}}
    sink.run_finished({})


def test_a_step_made_again_after_a_resume_counts_once_by_its_last_line(tmp_path: Path) -> None:
    write(tmp_path, (1, {"reward/mean": 0.1}), (2, {"reward/mean": 0.2}), (3, {"reward/mean": 0.3}))
    write(tmp_path, (2, {"reward/mean": 0.9}), (3, {"reward/mean": 1.0}))
    found = read_metrics(tmp_path)
    assert list(found) == [1, 2, 3]
    assert [values["reward/mean"] for values in found.values()] == [0.1, 0.9, 1.0]


def test_half_a_line_left_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    write(tmp_path, (1, {"reward/mean": 0.1}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward/me')
    write(tmp_path, (2, {"reward/mean": 0.2}))
    assert read_metrics(tmp_path) == {1: {"reward/mean": 0.1}, 2: {"reward/mean": 0.2}}


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path, (1, {"loss/kl": float("nan"), "loss/loss": 1.0}))
    assert '"loss/kl":null' in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path) == {1: {"loss/loss": 1.0}}


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {}


def test_the_docs_list_exactly_the_declared_metrics_by_theme() -> None:
    _, *parts = re.split(r"^### (.+)$", DOCS.read_text().partition("\n## What to look at")[0], flags=re.MULTILINE)
    row = re.compile(r"^\| `([^`]+)` \| (.+?) \| (.+) \|$", flags=re.MULTILINE)
    listed = {theme: row.findall(text) for theme, text in zip(parts[::2], parts[1::2], strict=True)}
    assert listed == {
        theme: [(name, metric.unit, metric.meaning) for name, metric in metrics.items()]
        for theme, metrics in THEMES.items()
    }


def test_what_the_learner_measures_is_declared() -> None:
    names = Statistics().metrics()
    assert [name for name in names if base_name(name) is None] == []


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("loss/entropy", "nats a token"),
        ("sql/loss/entropy", "nats a token"),
        ("evaluation/first_query", "reward"),
        ("reward/role/writer/style", "reward"),
        ("rollouts/failed", "rollouts"),
        ("rollouts/failed/ToolError", "rollouts"),
        ("acme/own", ""),
    ],
)
def test_a_metric_has_its_unit_with_and_without_a_policys_name(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_every_chart_names_metrics_that_exist_and_share_a_unit() -> None:
    for chart in CHARTS:
        found = [name for pattern in chart.metrics for name in METRICS if matches(pattern, name) or name == pattern]
        assert found, chart
        assert len({METRICS[name].unit for name in found}) == 1 or chart.title == "Reward", chart
