"""The fake that other tests trust."""

from __future__ import annotations

import asyncio

import pytest

from leyden.errors import ConfigurationError, ContextLengthError, EngineError
from leyden.interfaces import Delta, Engine, GenerationRequest, SamplingParameters, Weights
from leyden.roles import Policy
from leyden.testing.fakes import END_TOKEN, FakeEngine


def generate(engine: FakeEngine, model: str = "base", **sampling: object) -> list[Delta]:
    """Return every delta of one answer."""

    async def run() -> list[Delta]:
        await engine.start([Policy("sql")])
        request = GenerationRequest(
            model=model,
            messages=[{"role": "user", "content": "hi"}],
            sampling=SamplingParameters(**sampling),  # type: ignore[arg-type]
        )
        return [delta async for delta in (await engine.generate(request)).deltas]

    return asyncio.run(run())


def spelled(deltas: list[Delta]) -> tuple[str, list[int], str | None]:
    """Return the text, the ids and the finish reason."""
    ids = [token for delta in deltas for token in delta.token_ids]
    return "".join(delta.text for delta in deltas), ids, deltas[-1].finish_reason


def test_it_is_an_engine() -> None:
    assert isinstance(FakeEngine(), Engine)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_of_any_size_join_to_the_scripted_text(size: int) -> None:
    text, ids, reason = spelled(generate(FakeEngine("aé€😀", tokens_per_delta=size)))
    assert (text, ids, reason) == ("aé€😀", [*"aé€😀".encode(), END_TOKEN], "stop")


def test_a_limit_cuts_tokens_and_says_so() -> None:
    assert spelled(generate(FakeEngine("abcdef"), max_tokens=3)) == ("abc", [*b"abc"], "length")


def test_a_stop_string_ends_the_text_and_its_tokens_count() -> None:
    assert spelled(generate(FakeEngine("ab;cd"), stop=(";",))) == ("ab", [*b"ab;", END_TOKEN], "stop")


def test_scripted_answers_follow_one_another_and_begin_again() -> None:
    engine = FakeEngine(["one", "two"])
    assert [spelled(generate(engine))[0] for _ in range(3)] == ["one", "two", "one"]


def test_a_published_version_is_the_one_that_answers_and_is_never_used_again() -> None:
    engine = FakeEngine()
    generate(engine)
    before = engine.sha256("sql")
    asyncio.run(engine.publish("sql", 1, Weights()))
    generate(engine, "sql")
    assert [one.version for one in engine.log] == [0, 1]
    assert engine.sha256("sql") != before
    with pytest.raises(EngineError, match="versions only grow"):
        asyncio.run(engine.publish("sql", 1, Weights()))


def test_it_refuses_what_an_engine_refuses() -> None:
    with pytest.raises(ConfigurationError, match="'other' is not served"):
        generate(FakeEngine(), "other")
    with pytest.raises(ContextLengthError, match="context length is 5"):
        generate(FakeEngine(context_length=5))
    engine = FakeEngine()
    engine.failure = EngineError("down")
    with pytest.raises(EngineError, match="down"):
        generate(engine)
