"""Agents that are not the demo, as users have them."""

import asyncio
import json
import subprocess
import sys

import nbformat
from nbclient import NotebookClient

from examples.text_to_sql import questions
from integration_tests.training.plain_agent import CANARY, MODEL, ROOT
from leyden.training.evaluation import Evaluation
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.engines.transformers import TransformersEngine


def test_a_single_sync_agent_with_temperature_zero_and_no_role_name_learns(app, make_trainer, tmp_path):
    held_out = [question.task for question in questions.load("tuning", count=60)]
    trainer = make_trainer(app.solve, val_tasks=held_out, tasks_per_step=16, algorithm=GRPO(group_size=8))
    summary = trainer.fit(4)
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert after >= before + 0.2, (before, after)
    assert summary["roles"]["main"]["policy"] == "me"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy_after"] == after
    trainer.close()


def test_the_users_key_reaches_no_file_of_the_run(app, make_trainer, tmp_path):
    make_trainer(app.solve, sinks=("jsonl", "report")).fit(1)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (tmp_path / "run" / "report.html") in files
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_fit_works_inside_a_running_loop_and_afit_can_be_awaited(app, make_trainer, tmp_path):
    async def main() -> tuple[dict[str, object], dict[str, object], Evaluation]:
        blocking = make_trainer(app.solve_async, run=tmp_path / "one").fit(1)
        trainer = make_trainer(app.solve_async, run=tmp_path / "two")
        awaited = await trainer.afit(1)
        return blocking, awaited, await trainer.aevaluate([questions.load("tuning", count=1)[0].task])

    blocking, awaited, evaluation = asyncio.run(main())
    assert blocking["steps"] == awaited["steps"] == 1
    assert (evaluation.step, evaluation.estimate().n) == (1, 1)


def test_a_lambda_runs_in_this_process_and_says_so(app, make_trainer, caplog):
    summary = make_trainer(lambda task: app.solve(task)).fit(1)
    assert summary["rollouts"] == 16
    assert "cannot be imported by name" in caplog.text


def test_training_after_training_starts_from_the_base_again(app, make_trainer, tmp_path):
    engine = TransformersEngine(MODEL, seed=0)
    first = make_trainer(app.solve, run=tmp_path / "one", engine=engine)
    first.fit(1)
    trained = engine.sha256("me")
    assert trained != engine.sha256("base")
    second = make_trainer(app.never_varies, run=tmp_path / "two", engine=engine)
    second.fit(1)
    assert engine.sha256("me") == engine.sha256("base")
    assert first.evaluate([question.task for question in questions.load("tuning", count=4)]).step == 1
    assert engine.sha256("me") == trained


def test_a_notebook_trains_a_function_defined_in_a_cell(tmp_path):
    cells = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import leyden, openai
from examples.text_to_sql import questions
from examples.text_to_sql.databases import path, schema
from examples.text_to_sql.reward import reward
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.engines.transformers import TransformersEngine
---
client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="unused")
def solve(task):
    messages = [{{"role": "system", "content": "writer\\n" + schema(str(path(task["database"])))}},
                {{"role": "user", "content": task["question"]}}]
    reply = client.chat.completions.create(model="any", messages=messages, temperature=0, max_tokens=48)
    return reward(task, reply.choices[0].message.content)
---
trainer = leyden.Trainer(solve, tasks=[q.task for q in questions.load("train", count=8)], tasks_per_step=2,
    policies=[leyden.Policy("me")], engine=TransformersEngine({str(MODEL)!r}), algorithm=GRPO(group_size=2),
    run={str(tmp_path / "run")!r}, sinks=())
summary = trainer.fit(1)
print("rollouts", summary["rollouts"], "failures", summary["failures"])
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells.split("---\n")])
    NotebookClient(notebook, timeout=120).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "rollouts 4 failures {}" in printed


def test_leyden_is_light_for_an_agents_process():
    heavy = ("torch", "sqlite3", "transformers")
    code = f"import leyden, sys; leyden.emit_reward; leyden.role; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
