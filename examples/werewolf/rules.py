"""Werewolf for six: what a game is made of, what may be said, and a moderator that is plain code.

One idea: the moderator is a generator. It yields whose turn it is with what that player is told, is sent the answer,
and returns who won; agents, scripts or people can play alike.
"""

import random
import re
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field

PLAYERS = 6
WOLVES = 2
MOST_DAYS = 4
"""Then the village has won: only moves that are not legal make a game so long."""

WEREWOLF, VILLAGER = "werewolf", "villager"
"""The camps. The seer is a villager."""

KILL = re.compile(r"KILL (\d)")
CHECK = re.compile(r"CHECK (\d)")
SPEECH = re.compile(
    r"(?:I know nothing|I trust (?P<trusted>\d)|I suspect (?P<suspect>\d)|I am the seer, (?P<wolf>\d) is a wolf)\. "
    r"VOTE (?P<vote>\d)"
)
"""All that may be said by day: a short speech and a vote."""


@dataclass(frozen=True)
class Setting:
    """Who is who; players have the numbers from 1."""

    wolves: tuple[int, int]
    seer: int

    def camp(self, player: int) -> str:
        """Return a player's camp."""
        return WEREWOLF if player in self.wolves else VILLAGER

    def identity(self, player: int) -> str:
        """Return what a player is told of themselves at the start."""
        if player in self.wolves:
            return f"werewolf {player} with {sum(self.wolves) - player}"
        return f"{'seer' if player == self.seer else 'villager'} {player}"


@dataclass(frozen=True)
class Turn:
    """One player's turn."""

    player: int
    text: str
    """What happened since their last one, and what is asked."""
    asked: str
    """`KILL`, `CHECK` or `SPEAK`."""


@dataclass
class Result:
    """How a game went."""

    winner: str = VILLAGER
    days: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    """Camp -> moves asked for."""
    legal: Counter[str] = field(default_factory=Counter)
    """Camp -> moves that were legal."""


class Moderator:
    """One game, decided by its seed and the players' answers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"werewolf-{seed}")
        first, second, seer = self.rng.sample(range(1, PLAYERS + 1), 3)
        self.setting = Setting((first, second), seer)
        self.living = list(range(1, PLAYERS + 1))
        self.first_speaker = self.rng.randrange(PLAYERS)
        self.news: dict[int, list[str]] = {player: [] for player in self.living}
        """Player -> what they have not been told yet."""
        self.result = Result()

    def play(self) -> Generator[Turn, str, Result]:
        """Moderate the game."""
        while self.result.days < MOST_DAYS:
            self.result.days += 1
            yield from self.night()
            if self.is_over():
                break
            yield from self.day()
            if self.is_over():
                break
        return self.result

    def is_over(self) -> bool:
        """Say whether a camp has won, and remember which."""
        wolves = sum(player in self.setting.wolves for player in self.living)
        self.result.winner = WEREWOLF if wolves * 2 >= len(self.living) else VILLAGER
        return wolves == 0 or self.result.winner == WEREWOLF

    def night(self) -> Generator[Turn, str, None]:
        """Let the seer look at somebody, and one of the wolves choose a victim."""
        if self.setting.seer in self.living:
            seen = yield from self.choose(self.setting.seer, "CHECK", CHECK)
            if seen is not None:
                what = "a wolf" if seen in self.setting.wolves else "good"
                self.news[self.setting.seer].append(f"{seen} is {what}")
        wolf = next(player for player in self.setting.wolves if player in self.living)
        victim = yield from self.choose(wolf, "KILL", KILL)
        if victim is not None:
            self.leave(victim, f"{victim} died")

    def choose(self, player: int, asked: str, move: re.Pattern[str]) -> Generator[Turn, str, int | None]:
        """Ask a player for another living one; an answer that is not legal chooses nobody."""
        answer = yield self.turn(player, asked)
        found = move.fullmatch(answer)
        chosen = self.other(player, found and found[1])
        self.count(player, chosen is not None)
        return chosen

    def day(self) -> Generator[Turn, str, None]:
        """Let everybody speak and vote in turn; who has most votes leaves, ties are decided by lot."""
        speakers = [(self.first_speaker + index) % PLAYERS + 1 for index in range(PLAYERS)]
        self.first_speaker += 1
        votes: Counter[int] = Counter()
        for player in [speaker for speaker in speakers if speaker in self.living]:
            answer = yield self.turn(player, "SPEAK")
            found = SPEECH.fullmatch(answer)
            vote = self.other(player, found and found["vote"])
            self.count(player, vote is not None)
            if vote is not None:
                votes[vote] += 1
            self.tell(f"{player}: {answer if vote is not None else 'nothing'}", besides=player)
        if votes:
            most = max(votes.values())
            out = self.rng.choice(sorted(player for player, count in votes.items() if count == most))
            self.leave(out, f"{out} was {self.setting.camp(out)}")

    def turn(self, player: int, asked: str) -> Turn:
        """Return a player's turn, with the news."""
        told, self.news[player] = self.news[player], []
        when = f"{'day' if asked == 'SPEAK' else 'night'} {self.result.days} of {' '.join(map(str, self.living))}"
        return Turn(player, "\n".join([*told, when, asked]), asked)

    def other(self, player: int, number: str | None) -> int | None:
        """Return the living other player of this number."""
        other = int(number or 0)
        return other if other in self.living and other != player else None

    def count(self, player: int, is_legal: bool) -> None:
        """Count a move of a player's camp."""
        camp = self.setting.camp(player)
        self.result.moves[camp] += 1
        self.result.legal[camp] += is_legal

    def leave(self, player: int, why: str) -> None:
        """Take a player out of the game and tell the others."""
        self.living.remove(player)
        self.tell(why)

    def tell(self, line: str, besides: int = 0) -> None:
        """Tell all who live but one."""
        for player in self.living:
            if player != besides:
                self.news[player].append(line)
