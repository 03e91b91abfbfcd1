"""Token ids come back exactly, whatever the order, and cost what is new."""

import asyncio
import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from leyden.errors import StoreError
from leyden.interfaces import RolloutRecords
from leyden.redaction import Redactor
from leyden.spans import Completion, Record, Span
from leyden.sqlite import SQLiteStore
from leyden.sqlite.codec import RecordCodec
from leyden.sqlite.packing import PackedTokens, PromptIndex
from leyden.testing.records import a_choice, a_completion, a_rollout, a_span
from leyden.testing.store_contract.harness import unnumbered

TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3), max_size=30)
LOGPROBS = st.floats(width=32, allow_nan=False, max_value=0.0)
YES_OR_NO = st.sampled_from([True, False])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Completion]:
    """Draw prompts that go on from earlier ones, break off inside them, or start anew."""
    made: list[Completion] = []
    for _ in range(draw(st.integers(1, 8))):
        prompt: list[int] = []
        goes_on = draw(YES_OR_NO)
        if made and goes_on:
            base = draw(st.sampled_from(made))
            prompt = list(base.prompt_token_ids)
            for choice in draw(st.permutations(base.choices))[: draw(st.integers(0, 1))]:
                prompt += choice.token_ids
            prompt = prompt[: draw(st.integers(0, len(prompt)))] if draw(YES_OR_NO) else prompt
        prompt += draw(TOKENS)
        choices = []
        for index in range(draw(st.integers(0, 3))):
            answer = draw(TOKENS)
            logprobs = draw(st.lists(LOGPROBS, min_size=len(answer), max_size=len(answer)))
            choices.append(a_choice(answer, index=index, logprobs=logprobs, text=draw(st.text(max_size=5))))
        attempt = draw(st.sampled_from([1, 1, 1, 2]))
        made.append(a_completion(prompt=prompt, choices=choices, attempt=attempt))
    return draw(st.permutations(made))


def packed_by(index: PromptIndex, completion: Completion) -> PackedTokens:
    """Return a completion's numbers, packed against what the index knows."""
    record = RecordCodec(Redactor()).encode_record(completion)
    assert record.numbers is not None
    return index.pack(record.rollout_id, record.attempt, record.key, record.numbers)


async def stored(path: Path, batches: Sequence[Sequence[Record]]) -> tuple[RolloutRecords, Sequence[Record]]:
    """Store the batches for a rollout at its first attempt; return its records, and the late ones."""
    async with await SQLiteStore.open(path) as store:
        await store.add_rollouts([a_rollout(attempt=1)])
        for batch in batches:
            await store.add_records(batch)
        [records] = await store.records(["rollout-1"])
        return records, await store.late_records("rollout-1")


@settings(max_examples=60, deadline=None)
@given(conversation=conversations(), cuts=st.lists(st.integers(0, 8), max_size=3))
def test_completions_come_back_exactly_in_any_order_and_any_batches(
    conversation: list[Completion], cuts: list[int]
) -> None:
    edges = [0, *sorted(cuts), len(conversation)]
    batches = [conversation[a:b] for a, b in itertools.pairwise(edges)]
    with tempfile.TemporaryDirectory() as folder:
        records, late = asyncio.run(stored(Path(folder) / "store.db", batches))
    assert [unnumbered(r) for r in records.completions] == [c for c in conversation if c.attempt == 1]
    assert [unnumbered(r) for r in late] == [c for c in conversation if c.attempt == 2]


@settings(max_examples=60, deadline=None)
@given(attributes=st.lists(st.dictionaries(st.text(max_size=10), JSON, max_size=4), min_size=1, max_size=5))
def test_unknown_attributes_of_spans_come_back_exactly(attributes: list[dict[str, object]]) -> None:
    assume(Redactor().clean(attributes) == attributes)  # hypothesis finds words of ours, such as names of secrets
    spans = [a_span(attributes=one) for one in attributes]
    with tempfile.TemporaryDirectory() as folder:
        records, _ = asyncio.run(stored(Path(folder) / "store.db", [spans]))
    assert [unnumbered(span) for span in records.spans] == spans


@settings(max_examples=60, deadline=None)
@given(conversation=conversations(), limit_bytes=st.integers(0, 200))
def test_an_index_that_forgets_still_packs_exactly(conversation: list[Completion], limit_bytes: int) -> None:
    index = PromptIndex(limit_bytes)
    paths: dict[tuple[str, int], Completion] = {}
    for completion in conversation:
        packed = packed_by(index, completion)
        shared: list[int] = []
        if packed.base is not None:
            base = paths[packed.base]
            answer = base.choices[packed.base_choice].token_ids if packed.base_choice >= 0 else []
            assert base.attempt == completion.attempt
            shared = [*base.prompt_token_ids, *answer][: packed.shared]
        assert shared == completion.prompt_token_ids[: len(shared)]
        assert len(shared) == packed.shared
        assert len(packed.prompt) == 4 * (len(completion.prompt_token_ids) - packed.shared)
        paths[(completion.span_id, completion.http_attempt)] = completion


def test_a_growing_rollout_costs_what_is_new() -> None:
    codec, index = RecordCodec(Redactor()), PromptIndex()
    prompt = [random.Random(0).randrange(150_000) for _ in range(1_000)]
    bytes_of_turns = []
    for _ in range(50):
        completion = a_completion(prompt=prompt, answer=range(60))
        body = codec.encode_record(completion).body
        bytes_of_turns.append(len(body) + len(codec.encode_tokens(packed_by(index, completion))))
        prompt = [*prompt, *range(60), *range(1_000, 1_040)]
    # 60 answer tokens with their log-probabilities and 40 new prompt tokens: 640 bytes; the rest is the record.
    assert max(bytes_of_turns[1:]) < 640 + 500
    assert max(bytes_of_turns[1:]) - min(bytes_of_turns[1:]) < 10, "no turn may cost more than another"


def test_the_file_of_a_growing_rollout_is_linear_in_its_turns(tmp_path: Path) -> None:
    def bytes_with(turns: int) -> int:
        path = tmp_path / f"{turns}.db"
        prompt, made = list(range(1_000)), []
        for _ in range(turns):
            made.append(a_completion(prompt=prompt, answer=range(60)))
            prompt = [*prompt, *range(60), *range(1_000, 1_040)]
        asyncio.run(stored(path, [[completion] for completion in made]))
        return path.stat().st_size

    empty, at_25, at_50 = bytes_with(0), bytes_with(25), bytes_with(50)
    assert at_50 - empty < 2.5 * (at_25 - empty)
    # Whole prompts would be 50 * 4 bytes * (1,000 + 50 * 100 / 2) = 700,000 bytes.
    assert at_50 - empty < 120_000


def test_a_broken_prefix_costs_what_follows_the_break() -> None:
    index = PromptIndex()
    prompt = list(range(1_000))
    packed_by(index, a_completion(prompt=prompt))
    packed = packed_by(index, a_completion(prompt=[*prompt[:900], 5, *prompt[901:]]))
    assert packed.shared == 900
    assert len(packed.prompt) == 4 * 100
    again = packed_by(index, a_completion(prompt=prompt))
    assert again.shared == 1_000, "the branch that was left can be taken up again"


def test_a_token_that_shares_bytes_but_differs_is_not_shared() -> None:
    index = PromptIndex()
    packed_by(index, a_completion(prompt=[0x01020304, 0x05060708]))
    packed = packed_by(index, a_completion(prompt=[0x01020304, 0x0A060708]))
    assert packed.shared == 1


def test_the_index_stays_within_its_limit() -> None:
    index = PromptIndex(limit_bytes=10_000)
    first = a_completion("rollout-0", prompt=range(500))
    packed_by(index, first)
    for i in range(1, 20):
        packed_by(index, a_completion(f"rollout-{i}", prompt=range(500)))
    again = a_completion("rollout-0", prompt=range(500))
    assert packed_by(index, again).base is None, "the quietest rollout should be forgotten"
    latest = a_completion("rollout-19", prompt=range(500))
    assert packed_by(index, latest).shared == 500


def test_an_ignored_copy_is_never_a_base(tmp_path: Path) -> None:
    original = a_completion(span_id="s", prompt=[1, 2, 3], answer=[4])
    copy = a_completion(span_id="s", prompt=[1, 2, 9, 9], answer=[9])
    follower = a_completion(prompt=[1, 2, 9, 9, 9, 5])
    for number, batches in enumerate([[[original, copy, follower]], [[original], [copy], [follower]]]):
        records, _ = asyncio.run(stored(tmp_path / f"{number}.db", batches))
        assert [unnumbered(r) for r in records.completions] == [original, follower]


def test_log_probabilities_are_kept_to_float32(tmp_path: Path) -> None:
    choice = a_choice([1, 2], logprobs=[-1.2345678901, -20.000001])
    records, _ = asyncio.run(stored(tmp_path / "store.db", [[a_completion(choices=[choice])]]))
    assert records.completions[0].choices[0].logprobs == pytest.approx(choice.logprobs, rel=6e-8)


def test_values_json_does_not_know_are_kept_as_text(tmp_path: Path) -> None:
    class Tool:
        def __repr__(self) -> str:
            return "<Tool search>"

    loop: list[object] = []
    loop.append(loop)
    span = a_span(attributes={"tool": Tool(), "big": 2**70, "cut": "half \ud83d emoji", "loop": loop})
    records, _ = asyncio.run(stored(tmp_path / "store.db", [[span]]))
    attributes = records.spans[0].attributes
    assert attributes["tool"] == "<Tool search>"
    assert attributes["big"] == str(2**70)
    assert attributes["cut"] == "half ? emoji"
    assert "nested too deeply" in str(attributes["loop"])


def test_a_token_id_that_is_no_32_bit_integer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="32-bit"):
        asyncio.run(stored(tmp_path / "store.db", [[a_completion(prompt=[2**31])]]))


def test_a_stream_joined_in_the_middle_knows_the_tokens_before_it(tmp_path: Path) -> None:
    turns = [a_completion(prompt=range(10 + 5 * turn)) for turn in range(5)]

    async def last() -> Record:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_records([a_span(), *turns])
            async for number, record in store.stream(cursor=5):
                assert number == 6
                return record
        raise AssertionError("the stream was empty")

    assert unnumbered(asyncio.run(last())) == turns[-1]


def test_records_name_their_own_sequence(tmp_path: Path) -> None:
    spans: list[Span] = [a_span(sequence=77) for _ in range(300)]
    records, _ = asyncio.run(stored(tmp_path / "store.db", [spans]))
    assert [span.sequence for span in records.spans] == list(range(1, 301))
