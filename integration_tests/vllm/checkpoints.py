"""Tiny checkpoints for real servers: random ones, one that has learnt to call a tool, and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import HERMES_TEMPLATE, tiny_checkpoint

CONTEXT = 1024
LEARNT = 0.1
"""Nats of a whole answer, below which it is as good as certain."""

TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]},
    },
}
QUESTION = {"role": "user", "content": "How many?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"q": 1}}}
FOUND = {"role": "tool", "tool_call_id": "c1", "content": "42"}
ANSWER = "It is 42."


def random_checkpoint(folder: Path, *, seed: int, tied: bool) -> Path:
    """Write a random Qwen3 of a size that vLLM's kernels take."""
    return tiny_checkpoint(
        folder,
        seed=seed,
        template=HERMES_TEMPLATE,
        tie_word_embeddings=tied,
        hidden_size=64,
        intermediate_size=96,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )


def teach_a_tool_call(folder: Path) -> Path:
    """Train a checkpoint in place until it calls `look` when asked, and says what it found."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    spoken = {"role": "assistant", "content": ANSWER}
    lessons = [lesson(tokenizer, [QUESTION], said), lesson(tokenizer, [QUESTION, said, FOUND], spoken)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(300):
        worst = 0.0
        for tokens, answer_length in lessons:
            logits_T_V = model(torch.tensor([tokens])).logits[0, -answer_length - 1 : -1]
            target_T = torch.tensor(tokens[-answer_length:])
            loss = torch.nn.functional.cross_entropy(logits_T_V, target_T, reduction="sum")
            (loss / answer_length).backward()
            worst = max(worst, loss.item())
        if worst < LEARNT:
            model.save_pretrained(folder)
            return folder
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the tool call was not learnt: {worst} nats are left")


def lesson(
    tokenizer: object, asked: Sequence[Mapping[str, object]], said: Mapping[str, object]
) -> tuple[list[int], int]:
    """Return the tokens of a conversation and how many of them, at the end, are the answer."""

    def render(messages: Sequence[Mapping[str, object]], **options: object) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, **options)  # type: ignore[attr-defined]
        return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[operator, no-any-return]

    prompt, whole = render(asked, add_generation_prompt=True), render([*asked, said])
    assert whole[: len(prompt)] == prompt
    return whole, len(whole) - len(prompt)


def plain_logprobs(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Return log-softmax(logits / temperature) of an answer by one forward pass of Transformers."""
    with torch.no_grad():
        logits_T_V = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    scores_T_V = (logits_T_V / temperature).log_softmax(-1)
    return scores_T_V.gather(1, torch.tensor(list(answer))[:, None])[:, 0].tolist()  # type: ignore[no-any-return]
