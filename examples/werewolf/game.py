"""Werewolf in AgentScope: six agents and a moderator that is plain code.

The agents of a camp bear its name, `werewolf` or `villager`; who they are stands in their system prompts. Each agent
remembers what it was told and what it said. The models are whatever OPENAI_BASE_URL and OPENAI_API_KEY point at.

    python -m examples.werewolf.game --seed 7        # plays one game and prints it
"""

import argparse
import asyncio
import functools
import os
from typing import Any

from agentscope.agent import Agent, InjectionConfig
from agentscope.credential import OpenAICredential
from agentscope.message import UserMsg
from agentscope.model import OpenAIChatModel

from examples.werewolf.rules import WEREWOLF, Moderator, Result, Setting

MAX_TOKENS = 24
PLAIN = InjectionConfig(inject_runtime_state=False)
"""Without it AgentScope tells every agent the time."""


@functools.cache
def model(camp: str) -> OpenAIChatModel:
    """Return a camp's model, made on the first use: importing this module needs no key."""
    credential = OpenAICredential(
        api_key=os.environ.get("OPENAI_API_KEY", "none"), base_url=os.environ.get("OPENAI_BASE_URL")
    )
    parameters = OpenAIChatModel.Parameters(temperature=1.0, max_tokens=MAX_TOKENS)
    return OpenAIChatModel(credential, camp, parameters=parameters, stream=False)


def seat(setting: Setting, player: int) -> Agent:
    """Return the agent that plays this player."""
    camp = setting.camp(player)
    return Agent(camp, setting.identity(player), model(camp), injection_config=PLAIN)


async def play_game(seed: int, *, show: bool = False) -> Result:
    """Play a game."""
    moderator = Moderator(seed)
    agents = {player: seat(moderator.setting, player) for player in moderator.living}
    turns = moderator.play()
    turn = next(turns)
    while True:
        answer = (await agents[turn.player].reply(UserMsg("moderator", turn.text))).get_text_content() or ""
        if show:
            print(f"{moderator.setting.identity(turn.player):>22} {turn.asked}: {answer}")
        try:
            turn = turns.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result


async def play(task: dict[str, int]) -> dict[str, Any]:
    """Play the game of a task, `{"seed": 7}`; say who won, after how many days, and how many moves were legal."""
    result = await play_game(task["seed"])
    legal = {camp: result.legal[camp] / count for camp, count in result.moves.items()}
    return {"winner": result.winner, "days": result.days, "legal": legal}


def score(task: dict[str, int], outcome: dict[str, Any], rollout: object) -> dict[str, float]:
    """Reward the werewolves with 1 for a game they won; the share of their legal moves is measured, not rewarded."""
    return {"reward": float(outcome["winner"] == WEREWOLF), "legal": outcome["legal"].get(WEREWOLF, 1.0)}


def main() -> None:
    """Play one game and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of who is who, and of ties")
    options = parser.parse_args()
    result = asyncio.run(play_game(options.seed, show=True))
    print(f"{result.winner} wins after day {result.days}")


if __name__ == "__main__":
    main()
