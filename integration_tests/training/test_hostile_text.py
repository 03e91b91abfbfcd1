"""A whole training run whose agent says what would run in a page, steer a terminal, or give a key away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.training.plain_agent import MODEL, ROOT
from tests.watching.test_report import Page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> [red]markup[/red] \x1b]0;owned\x07\x1b[2J"
IN_TEXT = "sk-canary-in-text-5f0e7a19c3"
IN_HEADER = "sk-canary-in-header-5f0e7a19c3"
IN_VARIABLE = "canary of the environment 5f0e7a19c3"
CANARIES = (IN_TEXT, IN_HEADER, IN_VARIABLE)

APP = f"""
import functools
import os
import openai

from examples.text_to_sql.databases import path, schema
from examples.text_to_sql.reward import reward

HOSTILE = {HOSTILE!r}

@functools.cache
def client():
    headers = {{"x-api-key": "{IN_HEADER}", "x-own": os.environ["ACME_API_KEY"]}}
    return openai.OpenAI(
        base_url="http://127.0.0.1:9/v1", api_key="{IN_HEADER}", default_headers=headers, max_retries=0
    )

def solve(task):
    system = "writer\\n" + schema(str(path(task["database"])))
    key = " {IN_TEXT} " + os.environ["ACME_API_KEY"]
    messages = [
        {{"role": "system", "content": system}},
        {{"role": "user", "content": task["question"] + HOSTILE + key}},
    ]
    reply = client().chat.completions.create(model="theirs", messages=messages, max_tokens=8)
    text = reply.choices[0].message.content
    print("working on", task["question"])
    if len(text) % 5 == 0:
        raise LookupError(f"{{HOSTILE}} with {{key}}")
    return {{"sql": text + HOSTILE, HOSTILE: key}}

def score(task, output, rollout):
    return len(output["sql"]) % 7 / 7
"""


SCRIPT = f"""
import logging
import leyden
from examples.text_to_sql import questions
from hostile_app import HOSTILE, score, solve
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.engines.transformers import TransformersEngine

if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    tasks = [{{**one.task, "note": HOSTILE + " {IN_TEXT}"}} for one in questions.load("train", count=8)]
    trainer = leyden.Trainer(solve, reward=score, tasks=tasks, val_tasks=tasks, tasks_per_step=8,
        policies=[leyden.Policy("me", learning_rate=1e-3)], engine=TransformersEngine({str(MODEL)!r}, seed=0),
        algorithm=GRPO(group_size=4), run="run")
    assert trainer.fit(1)["failures"], "some rollouts fail, with hostile words in their error"
"""


def in_folder(folder: Path, *command: str) -> str:
    """Run a Python command as a user would; return all it printed and logged."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACME_API_KEY": IN_VARIABLE}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_app.py").write_text(APP)
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """Train for a step with every sink and a log of everything; return what stood in the terminal."""
    return in_folder(folder, "script.py")


@pytest.fixture(scope="module")
def shown(folder: Path, printed: str) -> str:
    """Return what `leyden` shows of the run: its table, a rollout that failed, one that did not."""
    shown = in_folder(folder, "-m", "leyden.cli", "rollouts", "run", "--limit", "1000")
    for state in ("failed", "succeeded"):
        row = next(line for line in shown.splitlines() if f" {state} " in line)
        shown += in_folder(folder, "-m", "leyden.cli", "show", "run", row.split()[0], "--text", "--tokens")
    return shown


def test_the_words_are_text_in_the_report(folder: Path, printed: str) -> None:
    text = (folder / "run" / "report.html").read_text()
    page = Page(text)
    assert (len(page.scripts), page.tags.count("img")) == (2, 0)
    said = [each for each in page.data["texts"] if "alert(1)" in str(each)]  # type: ignore[attr-defined]
    assert len(said) > 8, "the questions, the answers and the errors are there"


def test_the_words_steer_no_terminal(printed: str, shown: str) -> None:
    assert "alert(1)" in printed and "alert(1)" in shown, "the words are shown"
    assert [each for each in ("\x1b]0;owned", "\x07", "\x1b[2J") if each in printed + shown] == []


def test_no_key_reaches_a_file_the_log_or_the_terminal(folder: Path, printed: str, shown: str) -> None:
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert {"store.db", "report.html", "summary.json", "metrics.jsonl"} <= {path.name for path in files}
    told = {path.name: path.read_bytes() for path in files}
    told |= {"terminal and log": printed.encode(), "leyden show": shown.encode()}
    assert [(name, key) for name, text in told.items() for key in CANARIES if key.encode() in text] == []
    assert "[redacted]" in shown
