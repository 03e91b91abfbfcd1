"""The games that the tiny model is first taught: legal moves, hardly any strategy, and careless wolves.

Everybody plays the same simple way: follow who claims to be the seer, else the last suspicion, else chance. The seer
says what he knows. The wolves have two *habits*, wrong on purpose, so that there is something to unlearn: they name
their own partner (`BETRAY`), and kill one of their own (`OWN_KILL`). That a wolf may pose as the seer, kill the one who
claimed to be it, or follow the crowd against a villager, they show no more often than chance has it.
"""

import random
from dataclasses import dataclass

from examples.werewolf.rules import SPEECH, WEREWOLF, Moderator, Turn

BETRAY = 0.6
"""How often a wolf whose partner lives suspects and votes for that partner."""

OWN_KILL = 0.25
"""How often the wolves kill the partner at night."""

LIE = 0.08
"""How often a wolf says to be the seer."""

FOLLOW_CLAIM, FOLLOW_SUSPICION = 0.85, 0.6
TELL = 0.95
"""How often a seer who knows a living wolf says so."""


@dataclass(frozen=True)
class Conversation:
    """What one player was told and said in a game; the first message is the system's."""

    messages: list[dict[str, str]]


class Naive:
    """A scripted player."""

    def __init__(self, moderator: Moderator, player: int, rng: random.Random) -> None:
        self.moderator, self.player, self.rng = moderator, player, rng
        self.known: dict[int, bool] = {}
        """The seer's: player -> is a wolf."""
        self.heard: list[tuple[str, int]] = []
        """Today's accusations: `wolf` or `suspect`, and whom."""

    def answer(self, turn: Turn) -> str:
        """Return this player's move."""
        self.listen(turn.text)
        others = [player for player in self.moderator.living if player != self.player]
        is_wolf = self.moderator.setting.camp(self.player) == WEREWOLF
        partner = sum(self.moderator.setting.wolves) - self.player
        if turn.asked == "CHECK":
            return f"CHECK {self.rng.choice([one for one in others if one not in self.known] or others)}"
        if turn.asked == "KILL":
            own = partner in others and self.rng.random() < OWN_KILL
            return f"KILL {partner if own else self.rng.choice([one for one in others if one != partner])}"
        if is_wolf and partner in others and self.rng.random() < BETRAY:
            return f"I suspect {partner}. VOTE {partner}"
        if is_wolf and self.rng.random() < LIE:
            return claim(self.rng.choice(others))
        found = [one for one in others if self.known.get(one)]
        if found and self.rng.random() < TELL:
            return claim(found[0])
        return self.follow([one for one in others if self.known.get(one) is not False] or others)

    def follow(self, others: list[int]) -> str:
        """Follow a claim, else the last suspicion, else chance."""
        claims = [one for kind, one in self.heard if kind == "wolf" and one in others]
        if claims and self.rng.random() < FOLLOW_CLAIM:
            return suspect(self.rng.choice(claims))
        suspects = [one for kind, one in self.heard if kind == "suspect" and one in others]
        if suspects and self.rng.random() < FOLLOW_SUSPICION:
            return suspect(suspects[-1])
        vote, chance = self.rng.choice(others), self.rng.random()
        if chance < 0.2:
            return f"I know nothing. VOTE {vote}"
        if chance < 0.3 and len(others) > 1:
            return f"I trust {self.rng.choice([one for one in others if one != vote])}. VOTE {vote}"
        return suspect(vote)

    def listen(self, text: str) -> None:
        """Take in the news of a turn; each day accuses anew."""
        for line in text.split("\n"):
            words = line.split()
            if line.endswith(("died", "werewolf", "villager")):
                self.heard.clear()
            elif len(words) > 2 and words[1] == "is":
                self.known[int(words[0])] = words[2] == "a"
            elif (said := SPEECH.fullmatch(line.partition(": ")[2])) is not None:
                self.heard += [(kind, int(said[kind])) for kind in ("wolf", "suspect") if said[kind]]


def suspect(player: int) -> str:
    """Say whom one suspects."""
    return f"I suspect {player}. VOTE {player}"


def claim(wolf: int) -> str:
    """Say that one is the seer and has seen a wolf."""
    return f"I am the seer, {wolf} is a wolf. VOTE {wolf}"


def demonstrate(seed: int, rng: random.Random) -> tuple[list[Conversation], str]:
    """Play a scripted game; return what each player who had a turn was told and said, and who won."""
    moderator = Moderator(seed)
    players = {player: Naive(moderator, player, rng) for player in moderator.living}
    told = {player: [{"role": "system", "content": moderator.setting.identity(player)}] for player in players}
    turns = moderator.play()
    turn = next(turns)
    while True:
        answer = players[turn.player].answer(turn)
        told[turn.player] += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": answer}]
        try:
            turn = turns.send(answer)
        except StopIteration as end:
            return [Conversation(messages) for messages in told.values() if len(messages) > 1], end.value.winner
