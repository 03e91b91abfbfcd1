"""Check a trained camp without Leyden and without AgentScope: play with two checkpoints, count wins and habits.

    python -m examples.werewolf.check runs/NAME/seed-0/checkpoints/step-000032/policies/werewolf

All games run side by side, so that 300 take a minute of one CPU core.
"""

import argparse
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from examples.werewolf.rules import WEREWOLF, Moderator, Result, Turn

MODEL = Path(__file__).parent / "model"
FIRST_GAME = 4_000_000
"""The first game of the bucket `final` in `train.py`."""

MAX_TOKENS = 24


@dataclass
class Table:
    """One game under way."""

    moderator: Moderator
    turns: Generator[Turn, str, Result]
    turn: Turn
    heard: dict[int, str]
    """Player -> their conversation, as the chat template spells it."""

    def prompt(self) -> str:
        """Take the turn's text into its player's conversation, and return that."""
        self.heard[self.turn.player] += f"<|user|>{self.turn.text}<|end|><|assistant|>"
        return self.heard[self.turn.player]

    def habits(self, answer: str) -> Counter[str]:
        """Count what a wolf's move shows."""
        found: Counter[str] = Counter()
        setting, living = self.moderator.setting, self.moderator.living
        partner = sum(setting.wolves) - self.turn.player
        kind = "speeches" if self.turn.asked == "SPEAK" else "kills"
        if partner in living:
            found[f"{kind} with a living partner"] = 1
            found[f"{kind} against the partner"] = int(answer.endswith(str(partner)))
        if kind == "speeches":
            found["speeches"] = 1
            found["speeches as the seer"] = int(answer.startswith("I am the seer"))
        return found


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Sample an answer to each prompt."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    made = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=MAX_TOKENS, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def play(wolves: Path, villagers: Path, count: int) -> tuple[float, Counter[str]]:
    """Play games; return how often the wolves won, and what they did."""
    tokenizer = AutoTokenizer.from_pretrained(villagers)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (wolves, villagers)]
    tables = []
    for seed in range(FIRST_GAME, FIRST_GAME + count):
        moderator = Moderator(seed)
        turns = moderator.play()
        heard = {player: f"<|system|>{moderator.setting.identity(player)}<|end|>" for player in moderator.living}
        tables.append(Table(moderator, turns, next(turns), heard))
    won, habits, under_way = 0, Counter[str](), tables
    while under_way:
        camps: tuple[list[Table], list[Table]] = ([], [])
        for table in under_way:
            camps[table.moderator.setting.camp(table.turn.player) != WEREWOLF].append(table)
        under_way = []
        for model, seats in zip(models, camps, strict=True):
            said = answers(model, tokenizer, [table.prompt() for table in seats]) if seats else []
            for table, answer in zip(seats, said, strict=True):
                table.heard[table.turn.player] += f"{answer}<|end|>"
                if model is models[0]:
                    habits += table.habits(answer)
                try:
                    table.turn = table.turns.send(answer)
                    under_way.append(table)
                except StopIteration as end:
                    won += end.value.winner == WEREWOLF
    return won / count, habits


def main() -> None:
    """Print what the base model's wolves do, and those of a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wolves", type=Path, help="folder of the trained weights")
    parser.add_argument("--games", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, wolves in (("base", MODEL), ("trained", options.wolves)):
        torch.manual_seed(0)
        won, habits = play(wolves, MODEL, options.games)
        shares = {
            "names the partner": habits["speeches against the partner"] / habits["speeches with a living partner"],
            "kills the partner": habits["kills against the partner"] / habits["kills with a living partner"],
            "poses as the seer": habits["speeches as the seer"] / habits["speeches"],
        }
        print(f"{name:8} wolves win {won:.3f}  " + "  ".join(f"{what} {share:.2f}" for what, share in shares.items()))


if __name__ == "__main__":
    main()
