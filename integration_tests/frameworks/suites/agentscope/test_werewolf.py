"""The Werewolf example: its rules, and what Leyden records of a game."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from examples.werewolf import game
from examples.werewolf.demonstrations import demonstrate
from examples.werewolf.rules import MOST_DAYS, VILLAGER, WEREWOLF, Moderator, Result, Turn
from integration_tests.frameworks.suites.agentscope.conftest import Run
from leyden.spans import Kind
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI, serving


def played(seed: int, *answers: str) -> tuple[list[Turn], Moderator]:
    """Answer a game's first turns; return the turns and the moderator."""
    moderator = Moderator(seed)
    turns = moderator.play()
    seen = [next(turns)]
    for answer in answers:
        seen.append(turns.send(answer))
    return seen, moderator


def test_a_game_is_decided_by_its_seed_and_the_answers() -> None:
    first, second = (demonstrate(7, random.Random(1)) for _ in range(2))
    assert first == second
    assert {Moderator(seed).setting for seed in range(3)} == {Moderator(seed).setting for seed in range(3)}
    assert len({Moderator(seed).setting for seed in range(50)}) > 30


def test_scripted_players_move_legally_and_both_camps_win() -> None:
    rng = random.Random(0)
    winners = Counter(demonstrate(seed, rng)[1] for seed in range(400))
    assert min(winners.values()) > 100


def test_the_seer_learns_what_he_asked_and_the_victim_is_gone() -> None:
    _, moderator = played(3)
    wolves, seer = moderator.setting.wolves, moderator.setting.seer
    victim = next(player for player in moderator.living if player not in (*wolves, seer))
    turns, moderator = played(3, f"CHECK {wolves[1]}", f"KILL {victim}")
    assert [turn.asked for turn in turns] == ["CHECK", "KILL", "SPEAK"]
    assert turns[1].player == wolves[0]
    assert victim not in moderator.living
    told = turns[2].text if turns[2].player == seer else "\n".join(moderator.news[seer])
    assert told.startswith(f"{wolves[1]} is a wolf\n{victim} died")


@pytest.mark.parametrize("answer", ["KILL 9", "kill 1", "KILL", "", "KILL 1 or 2"])
def test_a_move_that_is_not_legal_does_nothing_and_is_counted(answer: str) -> None:
    _, moderator = played(3, "CHECK 0", answer)
    assert len(moderator.living) == 6
    assert (moderator.result.moves[WEREWOLF], moderator.result.legal[WEREWOLF]) == (1, 0)


def test_nobody_may_vote_for_themselves_and_what_is_not_legal_is_not_heard() -> None:
    turns, moderator = played(3, "CHECK 0", "KILL 0")
    speaker = turns[-1].player
    _, moderator = played(3, "CHECK 0", "KILL 0", f"I suspect {speaker}. VOTE {speaker}")
    listener = next(player for player in moderator.living if player != speaker and moderator.news[player])
    assert moderator.news[listener][-1] == f"{speaker}: nothing"


def test_the_werewolves_win_when_they_are_as_many_as_the_others() -> None:
    moderator = Moderator(1)
    moderator.living = [*moderator.setting.wolves, moderator.setting.seer]
    assert moderator.is_over()
    assert moderator.result.winner == WEREWOLF
    moderator.living = [moderator.setting.seer]
    assert moderator.is_over()
    assert moderator.result.winner == VILLAGER


@pytest.fixture(scope="module")
def fakes() -> Iterator[tuple[FakeOpenAI, FakeOpenAI]]:
    with serving() as village, serving() as gateway:
        yield village, gateway


@pytest.mark.usefixtures("instrumented")
def test_the_camps_are_roles_and_the_wolves_go_to_the_gateway(
    run: Run, fakes: tuple[FakeOpenAI, FakeOpenAI], monkeypatch: pytest.MonkeyPatch
) -> None:
    village, gateway = fakes
    monkeypatch.setenv("OPENAI_BASE_URL", village.base_url)
    game.model.cache_clear()

    async def episode() -> tuple[Recorded, Result]:
        with rollout(routing_to(gateway.base_url, WEREWOLF)) as recorded:
            return recorded, await game.play_game(5)

    recorded, result = run(episode())
    assert (result.winner, result.days) == (VILLAGER, MOST_DAYS), "the fake's answers are not legal"
    assert Counter(call.role for call in recorded.calls) == result.moves
    assert {span.name for span in recorded.spans(Kind.AGENT)} == {WEREWOLF, VILLAGER}
    assert (len(gateway.seen), len(village.seen)) == (result.moves[WEREWOLF], result.moves[VILLAGER])
    assert game.score({"seed": 5}, {"winner": WEREWOLF, "legal": {WEREWOLF: 0.5}}, None) == {
        "reward": 1.0,
        "legal": 0.5,
    }
