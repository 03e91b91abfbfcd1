"""Agent Lightning's APO on a task of the benchmark; runs under the interpreter of its own environment.

    python -m benchmarks.prompt_tasks.agent_lightning_arm '{"problem": "desk", "role": "clerk", ...}'

Its settings are those of its room-selector example but for the rounds, and its own defaults elsewhere. It optimises one
prompt template ("Optimizing multiple prompt templates is not supported yet", docs/algorithm-zoo/apo.md), so the other
roles keep the prompts that they begin with.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentlightning import Trainer, setup_logging
from agentlightning.adapter import TraceToMessages
from agentlightning.algorithm.apo import APO
from agentlightning.litagent import rollout
from agentlightning.types import PromptTemplate
from openai import AsyncOpenAI

from benchmarks.prompt_tasks import apps
from benchmarks.prompt_tasks.problems import PROBLEMS

OPTIONS: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
"""problem, role, server, seed, concurrency, search (APO's own options), report (a file)."""
# At import: its runners are processes, and each one imports this module or is forked from it.


class Watched(APO[Any]):  # type: ignore[misc]  # nothing is known of its types where types are checked
    """APO that writes down its best prompt after every round, with the rollouts that were spent by then."""

    rollouts = 0

    async def evaluate_prompt_on_batch(
        self, prompt: Any, resource_name: str, dataset: Any, mode: Any, **rest: Any
    ) -> Any:
        """Count its rollouts."""
        found = await super().evaluate_prompt_on_batch(prompt, resource_name, dataset, mode, **rest)
        self.rollouts += len(dataset)
        if self.history is None:
            self.note()
        return found

    history: list[dict[str, object]] | None = None

    async def _update_best_prompt(self, *arguments: Any) -> None:
        await super()._update_best_prompt(*arguments)
        self.note()

    def note(self) -> None:
        """Write down what is best."""
        self.history = self.history or []
        prompts = {OPTIONS["role"]: self.get_best_prompt().template}
        self.history.append({"rollouts": self.rollouts, "at": time.time(), "prompts": prompts})


@rollout
async def app(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
    """Run the app with the template as its role's prompt."""
    problem = PROBLEMS[OPTIONS["problem"]]
    async with AsyncOpenAI(base_url=f"{OPTIONS['server']}/v1", api_key="none") as client:
        prompts = {**problem.openings, OPTIONS["role"]: prompt_template.template}
        return await apps.run(problem, task, prompts, client)


def halves(tasks: Sequence[dict[str, Any]]) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]:
    """Split as its example does."""
    return tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]


def main() -> None:
    """Search, and write the report."""
    setup_logging()
    logging.getLogger("agentlightning").setLevel(logging.WARNING)
    random.seed(OPTIONS["seed"])  # it draws its templates and samples from the global generator
    problem = PROBLEMS[OPTIONS["problem"]]
    model = f"{problem.name}/reflection"
    client = AsyncOpenAI(base_url=f"{OPTIONS['server']}/v1", api_key="none")
    search = Watched(client, gradient_model=model, apply_edit_model=model, **OPTIONS["search"])
    trainer = Trainer(
        algorithm=search,
        n_runners=OPTIONS["concurrency"],
        initial_resources={
            "prompt_template": PromptTemplate(template=problem.openings[OPTIONS["role"]], engine="f-string")
        },
        adapter=TraceToMessages(),
    )
    train, val = halves(problem.tasks(OPTIONS["seed"], "search", problem.search_tasks))
    trainer.fit(app, train_dataset=train, val_dataset=val)
    Path(OPTIONS["report"]).write_text(json.dumps({"history": search.history, "rollouts": search.rollouts}))


if __name__ == "__main__":
    main()
