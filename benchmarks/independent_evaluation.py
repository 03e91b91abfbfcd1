"""Evaluate an exported checkpoint of the demo with Transformers alone; imports nothing of Leyden.

It walks the agent's graph by hand, greedily, one question at a time, and prints JSON: the accuracy of the whole
agent and of the first query, over all questions and by kind. Leyden's own evaluation must give the same figures.

    python -m benchmarks.independent_evaluation CHECKPOINT --bucket tuning --count 200 --seed 0
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from langchain_core.messages import BaseMessage
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.text_to_sql import agent, questions, reward
from examples.text_to_sql.databases import path, query

MODEL = Path(__file__).parent.parent / "examples" / "text_to_sql" / "model"
ROLES = {"system": "system", "human": "user", "ai": "assistant"}


class Speaker:
    """A checkpoint that answers chat messages greedily."""

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, messages: Sequence[BaseMessage]) -> str:
        """Return the greedy answer's text."""
        chat = [{"role": ROLES[message.type], "content": message.content} for message in messages]
        prompt = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = self.model.generate(**prompt, max_new_tokens=agent.MAX_TOKENS, do_sample=False)
        return self.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def solve(question: questions.Question, policy: Speaker, base: Speaker) -> tuple[str, str]:
    """Return the first and the final query of the agent."""
    file = str(path(question.database))
    first = policy.answer(agent.writer_messages(question.text, file))
    result = query(file, first)
    feedback = base.answer(agent.checker_messages(question.text, file, first, result))
    if feedback == agent.OK:
        return first, first
    return first, policy.answer(agent.rewriter_messages(question.text, file, first, result, feedback))


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="Hugging Face folder of the trained policy")
    parser.add_argument("--bucket", default="tuning", choices=["tuning", "final"])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the questions drawn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy, base = Speaker(options.checkpoint), Speaker(MODEL)
    found: dict[str, list[tuple[float, float]]] = {}
    for question in questions.load(options.bucket, count=options.count, seed=options.seed):
        first, final = solve(question, policy, base)
        pair = (reward.reward(question.task, final), reward.reward(question.task, first))
        for kind in ("all", question.held_out):
            found.setdefault(kind, []).append(pair)
    means = {
        kind: {
            "reward": sum(final for final, _ in pairs) / len(pairs),
            "first_query": sum(first for _, first in pairs) / len(pairs),
            "n": len(pairs),
        }
        for kind, pairs in found.items()
    }
    print(json.dumps(means))


if __name__ == "__main__":
    main()
