"""The report: one file, everything in it, nothing that runs."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from leyden.errors import ConfigurationError
from leyden.spans import Mode, RolloutState
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import STORE
from leyden_plugins.observers import report_data
from leyden_plugins.observers.report import ReportSink, embedded, page, report_command, write_report
from leyden_plugins.observers.report_data import LONGEST_TEXT, Texts, charts, choose
from tests.watching.fake_run import add_finished, call_records, make_run, rollout, rollout_records, summary

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script> &lt; \u2028 %%DATA%%"


class Page(HTMLParser):
    """Reads a page as a browser does: script elements end at the first `</script`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.policy = ""
        self.is_in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [str(found[name]) for name in ("src", "href") if name in found]
        if tag == "script":
            self.is_in_script = True
            self.scripts.append((found, ""))
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(found["content"])

    def handle_data(self, data: str) -> None:
        if self.is_in_script:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self.is_in_script = self.is_in_script and tag != "script"

    @property
    def data(self) -> dict[str, object]:
        return json.loads(self.scripts[0][1])


def write_hostile(folder: Path, secret: str = "") -> Path:
    folder.mkdir()
    words = HOSTILE + secret

    async def write() -> None:
        async with await SQLiteStore.open(folder / STORE) as store:
            one = rollout("r" + HOSTILE, question=words, error=words, reward=0.0, output={words: words})
            await add_finished(store, [one], [rollout_records(one.rollout_id, answer=words, reward=0.0, error=words)])

    asyncio.run(write())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "sql"
    return asyncio.run(make_run(folder))


def test_the_report_is_one_file_that_loads_nothing(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    found = Page(path.read_text())
    assert found.addresses == ["data:,"]
    assert not set(found.tags) & {"img", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in path.read_text() and "url(" not in path.read_text()
    assert not list(run.glob("*.partial"))


def test_only_our_script_may_run(run: Path) -> None:
    found = Page(write_report(run).read_text())
    (data, _), (_, ours) = found.scripts
    assert data["type"] == "application/json"
    digest = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in found.policy
    assert found.policy.startswith("default-src 'none'")
    assert "innerHTML" not in ours and "insertAdjacent" not in ours and "document.write" not in ours


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    text = write_report(write_hostile(tmp_path / "run")).read_text()
    found = Page(text)
    assert len(found.scripts) == 2
    assert found.tags.count("img") == 0
    assert text.count("alert(1)") > 1
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert inside is not None
    assert not set("<>&\u2028") & set(inside[1])
    texts = found.data["texts"]
    assert isinstance(texts, list)
    assert HOSTILE in texts, "the words are all there"


def test_a_hostile_title_is_escaped() -> None:
    assert "<title>&lt;/title&gt;&lt;script&gt; · Leyden</title>" in page({"title": "</title><script>"})


def test_a_key_never_reaches_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-" + "k" * 24
    pattern = "sk-" + "q" * 40
    folder = write_hostile(tmp_path / "run", secret=f" {pattern}")
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    told = {"failures": {f"Error with {canary}": 1}, "examples": [{"task": {"api_key": "hunter2hunter2"}}]}
    text = write_report(folder, summary=told).read_text()
    assert canary not in text and pattern not in text and "hunter2hunter2" not in text
    assert "[redacted]" in text
    assert Page(text).data["summary"] != {}


SHARES = "No signal, distinct answers, failed, cut off"


def test_the_page_holds_figures_curves_tables_and_rollouts(run: Path) -> None:
    data = Page(write_report(run).read_text()).data
    assert data["summary"] == json.loads(json.dumps(summary(run, 4)))
    assert data["run"]["seed"] == 7
    titles = [one["title"] for one in data["charts"]]
    assert titles[:4] == ["Reward", "Held-out, by reward name", "Reward, by role", SHARES]
    assert {"Gradient norm", "Entropy", "Throughput", "Loss"} <= set(titles)
    assert "Reward, by name" not in titles, "one name shows what the reward does"
    assert titles[-1] == "acme/own", "a metric of nobody's knowledge is drawn too"
    rollouts = data["rollouts"]
    assert isinstance(rollouts, list)
    assert (data["rollouts_in_all"], len(rollouts)) == (4 * 8 + 2 * 5, 4 * 4 + 2 * 5)
    texts = data["texts"]
    failed = next(one for one in rollouts if one["state"] == "failed")
    assert texts[failed["error"]] == "ToolError: no such column: populaton"
    spans = [(span["depth"], span["kind"], texts[span["role"]]) for span in failed["spans"]]
    assert spans[:3] == [(0, "rollout", "main"), (1, "agent", "writer"), (2, "model_call", "writer")]
    call = failed["spans"][2]
    assert call["tokens"] == [30, 24]
    assert texts[call["policy"]] == "sql" and call["version"] == 3


def test_a_chart_stands_back_where_nothing_but_zeros_is_good_news() -> None:
    steps = {step: {"reward/mean": 0.0, "policy/staleness_max": 0.0, "rollouts/retried": step - 1.0} for step in (1, 2)}
    found = {one["title"]: one["is_extra"] for one in charts(steps, {})}
    assert found == {"Reward": False, "Failures so far": False, "Staleness": True}


def test_held_out_points_carry_their_intervals(run: Path) -> None:
    (reward, *_) = charts({2: {"reward/mean": 0.5}}, summary(run, 4))
    by_name = {one["name"]: one["points"] for one in reward["series"]}
    assert by_name["reward/mean"] == [[2, 0.5]]
    assert by_name["evaluation/reward"] == [
        [0, 0.52, pytest.approx(0.44), pytest.approx(0.59)],
        [4, 0.91, pytest.approx(0.83), pytest.approx(0.98)],
    ]
    assert reward["unit"] == "reward"


def test_the_size_is_bounded_and_the_last_evaluation_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_data, "ROLLOUT_BYTES", 40_000)
    folder = asyncio.run(make_run(tmp_path / "run", steps=6, groups=4, held_out=8))
    path = write_report(folder)
    data = Page(path.read_text()).data
    found = [(one["mode"], one["step"]) for one in data["rollouts"]]
    assert found.count(("evaluate", 6)) == 8
    assert 8 < len(found) < data["rollouts_in_all"]
    assert len(json.dumps([data["rollouts"], data["texts"]])) < 60_000


def test_one_huge_rollout_does_not_keep_out_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "ROLLOUT_BYTES", 40_000)
    folder = tmp_path / "run"
    folder.mkdir()

    huge = [
        record
        for number in range(40)
        for record in call_records("s1-t0-0", number=number, role="writer", answer=f"{number} " * 1300)
    ]

    async def write() -> None:
        async with await SQLiteStore.open(folder / STORE) as store:
            both = [rollout("s1-t0-0", reward=1.0), rollout("s1-t0-1", reward=0.0)]
            await add_finished(store, both, [huge, rollout_records("s1-t0-1")])

    asyncio.run(write())
    data = Page(write_report(folder).read_text()).data
    assert [one["id"] for one in data["rollouts"]] == ["s1-t0-1"]
    assert not any(text.startswith("0 0 0 ") for text in data["texts"])


def test_of_each_step_the_best_and_the_worst_are_chosen_first() -> None:
    every = [
        rollout(f"s{step}-{number}", step=step, reward=reward)
        for step in (1, 2)
        for number, reward in enumerate([0.5, 1.0, None, 0.2, 0.4, 0.3])
    ]
    every += [rollout(f"e{step}", mode=Mode.EVALUATE, step=step) for step in (0, 1, 2)]
    every += [rollout("running", state=RolloutState.RUNNING)]
    chosen = choose(every)
    assert chosen[:5] == ["e2", "s1-1", "s2-1", "s1-2", "s2-2"]
    assert chosen[-1] == "e0"
    assert "running" not in chosen and "e1" not in chosen
    assert len(chosen) == len(set(chosen)) == 1 + 2 * 4 + 1


def test_a_text_stands_once_and_is_cut_when_long() -> None:
    texts = Texts()
    assert texts.number("a") == texts.number("a") == 0
    texts.number("x" * (LONGEST_TEXT + 7))
    assert texts.texts[1].endswith("x… (7 more characters)")
    before = texts.bytes
    texts.number("<" * 10)
    texts.cut(2)
    assert texts.bytes == before
    assert texts.number("new") == 2


def test_a_run_that_goes_on_can_be_reported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    async def report_beside_the_writer() -> dict[str, object]:
        async with await SQLiteStore.open(folder / STORE) as store:
            await add_finished(store, [rollout("s1-t0-0")], [rollout_records("s1-t0-0")])
            return Page(write_report(folder).read_text()).data

    data = asyncio.run(report_beside_the_writer())
    assert data["rollouts_in_all"] == 1
    assert data["summary"] == data["run"] == {}


def test_the_sink_writes_the_page_at_the_end(run: Path) -> None:
    (run / "report.html").unlink(missing_ok=True)
    sink = ReportSink()
    sink.run_started({"run_folder": str(run)})
    sink.step_finished(1, {})
    assert not (run / "report.html").exists()
    sink.run_finished({"run_folder": str(run), "rollouts": 77})
    assert Page((run / "report.html").read_text()).data["summary"] == {"run_folder": str(run), "rollouts": 77}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a run folder: it holds no store\.db"):
        write_report(tmp_path)


def test_the_command_says_what_it_wrote(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Sequence[str] = [str(run)]
    assert report_command(arguments) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"


def test_embedded_json_reads_back_as_it_was() -> None:
    value = {"words": HOSTILE, "numbers": [1, 0.5, None]}
    assert json.loads(embedded(value)) == value
