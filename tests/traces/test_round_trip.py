"""Our records as OTLP and back: through protobuf, JSON, a file, our receiver's store."""

import asyncio
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.interfaces import RolloutRecords
from leyden.spans import Completion, Kind, Mode, Reward, Rollout, RolloutState, Span, Status
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_choice, a_completion, a_reward, a_rollout, a_span
from leyden_plugins.traces.otel import Rules, assemble, import_files, to_otlp
from leyden_plugins.traces.otel.spans import (
    RawSpan,
    decode_json,
    decode_protobuf,
    encode_json,
    read_attributes,
    read_request,
)

TEXT = st.text(st.characters(codec=None), max_size=12)  # lone surrogates too: models write them
NAMES = st.text(min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
TIMES = st.integers(0, 2**63 - 1)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@st.composite
def whole_rollouts(draw: st.DrawFn) -> RolloutRecords:
    """Draw a rollout with spans, completions and rewards, ids of any form, parents known or not."""
    name = draw(st.sampled_from(["s12-t301-4", "0af7651916cd43dd8448eb211c80319c", "0" * 32]) | NAMES)
    ids = draw(st.lists(st.from_regex(r"[0-9a-f]{16}", fullmatch=True) | NAMES, unique=True, max_size=4))
    attempt = draw(st.integers(1, 3))
    spans = [
        Span(
            span_id=span_id,
            parent_id=draw(st.none() | st.sampled_from(ids) | NAMES),
            rollout_id=name,
            attempt=attempt,
            kind=draw(st.sampled_from(list(Kind))),
            name=draw(TEXT),
            role=draw(NAMES),
            start_ns=draw(TIMES),
            end_ns=draw(TIMES),
            status=draw(st.sampled_from(list(Status))),
            error=draw(st.none() | TEXT),
            attributes=draw(
                st.dictionaries(NAMES | st.sampled_from(["leyden.export.rewards", "input.value"]), VALUES, max_size=3)
            ),
            sequence=number,
        )
        for number, span_id in enumerate(ids)
    ]
    targets = st.none() | st.sampled_from([*ids, "never stored"])
    return RolloutRecords(
        rollout=Rollout(
            rollout_id=name,
            task=draw(VALUES),
            task_id=draw(NAMES),
            group_id=draw(NAMES),
            mode=draw(st.sampled_from(list(Mode))),
            step=draw(st.integers(0, 9)),
            state=draw(st.sampled_from(list(RolloutState))),
            attempt=attempt,
            reward=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
            output=draw(VALUES),
            error=draw(st.none() | TEXT),
            versions=draw(st.dictionaries(NAMES, st.integers(0, 9), max_size=2)),
            started_ns=draw(TIMES),
            ended_ns=draw(TIMES),
        ),
        spans=spans,
        completions=[
            a_completion(
                name,
                span_id=draw(st.sampled_from([*ids, "never stored"])),
                attempt=attempt,
                prompt=draw(TOKENS),
                choices=[a_choice(answer, logprobs=[draw(st.floats(max_value=0, allow_nan=False)) for _ in answer])],
                sequence=number,
            )
            for number, answer in enumerate(draw(st.lists(TOKENS, max_size=3)))
        ],
        rewards=[
            a_reward(name, draw(st.floats(allow_nan=False, allow_infinity=False)), target_span=target, index=number)
            for number, target in enumerate(draw(st.lists(targets, max_size=3)))
        ],
    )


def read_back(spans: list[RawSpan]) -> RolloutRecords:
    return assemble(list(reversed(spans)), Rules()).records


def comparable(records: RolloutRecords) -> tuple[Rollout, list[Span], list[Completion], list[Reward]]:
    return (
        records.rollout,
        list(records.spans),
        list(records.completions),
        sorted(records.rewards, key=lambda one: one.index),
    )


@settings(max_examples=40)
@given(whole_rollouts())
def test_what_is_exported_comes_back_equal_through_protobuf_and_json(records: RolloutRecords) -> None:
    request = to_otlp([records])
    by_protobuf = decode_protobuf(request.SerializeToString())
    by_json = decode_json(encode_json(request))
    for found in (by_protobuf, by_json):
        assert comparable(read_back(list(read_request(found).spans))) == comparable(records)


@settings(max_examples=20)
@given(whole_rollouts())
def test_every_exported_span_hangs_below_one_root_and_is_valid_otlp(records: RolloutRecords) -> None:
    decoded = read_request(to_otlp([records]))
    assert decoded.refused == []
    assert len({one.span_id for one in decoded.spans}) == len(decoded.spans) == 1 + len(records.spans)
    known = {one.span_id for one in decoded.spans}
    (root,) = [one for one in decoded.spans if one.parent_id is None]
    assert "leyden.export.rollout" in root.attributes
    assert all(one.parent_id in known for one in decoded.spans if one is not root)


def test_a_viewer_sees_kinds_messages_roles_and_scores() -> None:
    asked = [{"role": "user", "content": "How are you?"}]
    call = a_span(
        kind=Kind.MODEL_CALL,
        span_id="00f067aa0ba902b7",
        role="writer",
        attributes={"gen_ai.input.messages": asked, "gen_ai.request.model": "m"},
    )
    tool = a_span(kind=Kind.TOOL, attributes={"gen_ai.tool.name": "search", "gen_ai.tool.call.result": "found"})
    records = RolloutRecords(
        rollout=a_rollout(attempt=1, state=RolloutState.SUCCEEDED, reward=0.5),
        spans=[call, tool],
        completions=[],
        rewards=[a_reward(value=0.5, target_span=call.span_id)],
    )
    root, seen, used = read_request(to_otlp([records])).spans
    assert root.attributes["leyden.reward"] == 0.5
    assert seen.span_id == call.span_id
    assert seen.attributes["openinference.span.kind"] == "LLM"
    assert seen.attributes["gen_ai.operation.name"] == "chat"
    assert seen.attributes["gen_ai.agent.name"] == "writer"
    assert msgspec.json.decode(str(seen.attributes["gen_ai.input.messages"])) == asked
    assert seen.events[0].attributes == {"gen_ai.evaluation.name": "reward", "gen_ai.evaluation.score.value": 0.5}
    assert (used.attributes["openinference.span.kind"], used.attributes["output.value"]) == ("TOOL", "found")


def test_a_file_of_an_export_makes_a_store_with_equal_rollouts(tmp_path: Path) -> None:
    records = RolloutRecords(
        rollout=a_rollout(
            attempt=2, state=RolloutState.FAILED, reward=0.25, error="boom", versions={"p": 3}, started_ns=5, ended_ns=9
        ),
        spans=[a_span(attempt=2, sequence=1, attributes={"x": [1, None]})],
        completions=[a_completion(attempt=2, sequence=2)],
        rewards=[a_reward(attempt=2)],
    )
    path = tmp_path / "traces.jsonl"
    path.write_text(encode_json(to_otlp([records])) + "\n")

    async def imported() -> RolloutRecords:
        await import_files([path], tmp_path / "run", Rules())
        await import_files([path], tmp_path / "run", Rules())
        async with await SQLiteStore.open(tmp_path / "run" / "store.db", read_only=True) as store:
            (found,) = await store.records(["rollout-1"])
            return found

    assert comparable(asyncio.run(imported())) == comparable(records)


def test_attributes_go_over_the_wire_as_what_they_are() -> None:
    span = a_span(attributes={"a": 1, "b": True, "c": 0.5, "d": [1]})
    request = to_otlp([RolloutRecords(rollout=a_rollout(), spans=[span], completions=[], rewards=[])])
    found = read_attributes(request.resource_spans[0].scope_spans[0].spans[1].attributes)
    assert {name: found[name] for name in "abcd"} == {"a": 1, "b": True, "c": 0.5, "d": "[1]"}


def test_a_damaged_export_is_left_out_and_said(tmp_path: Path) -> None:
    request = to_otlp([RolloutRecords(rollout=a_rollout(), spans=[a_span()], completions=[], rewards=[])])
    del request.resource_spans[0].scope_spans[0].spans[0]  # the rollout's own
    path = tmp_path / "traces.pb"
    path.write_bytes(request.SerializeToString())
    noticed = asyncio.run(import_files([path], tmp_path / "run", Rules()))
    assert [name for name in noticed if "the rollout's own span is missing" in name]
