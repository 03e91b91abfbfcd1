"""A run exported to a real Phoenix server, read back through its REST API and imported: equal, span by span."""

import asyncio
import json
import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from leyden.interfaces import RolloutRecords
from leyden.spans import Kind, RolloutState, Status
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_completion, a_reward, a_rollout, a_span
from leyden_plugins.traces.otel import Rules, import_files, to_otlp
from leyden_plugins.traces.otel.command import traces_command
from leyden_plugins.traces.otel.spans import RawSpan, decode_json, read_request
from leyden_plugins.traces.otel.storing import put

RECORDED = Path(__file__).parents[2] / "tests" / "traces" / "recorded"
START_SECONDS = 240.0

NOT_HELD = {"start_ns", "end_ns", "times of events", "resource", "scope", "tool.parameters"}
"""What Phoenix's own model cannot hold, as docs/traces.md lists it; times are cut to microseconds."""


@pytest.fixture(scope="module")
def phoenix(phoenix_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server with an empty database; yield its address."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, grpc_port = one.getsockname()[1], other.getsockname()[1]
    environment = {
        **os.environ,
        "PHOENIX_WORKING_DIR": str(tmp_path_factory.mktemp("phoenix")),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(grpc_port),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    command = [str(phoenix_python.with_name("phoenix")), "serve"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process)
            yield url
        finally:
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, "Phoenix ended while it started"
        try:
            if httpx.get(f"{url}/v1/projects").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(f"Phoenix did not start within {START_SECONDS} s")


def spans_in(url: str, count: int) -> list[dict[str, object]]:
    """Return the spans that Phoenix holds, once they are so many; it stores them after it has answered."""
    end = time.monotonic() + 60
    found: list[dict[str, object]] = []
    while len(found) < count and time.monotonic() < end:
        found, cursor = [], None
        while True:
            parameters = {"limit": "100", **({"cursor": cursor} if cursor else {})}
            page = httpx.get(f"{url}/v1/projects/default/spans/otlpv1", params=parameters).raise_for_status().json()
            found += page["data"]
            cursor = page.get("next_cursor")
            if not cursor:
                break
        time.sleep(0.2)
    assert len(found) == count
    return found


def a_trained_rollout() -> RolloutRecords:
    """Return a rollout with all that a span of Leyden's may have."""
    call = a_span(
        "s1-t2-3",
        span_id="call",
        kind=Kind.MODEL_CALL,
        attempt=2,
        attributes={"gen_ai.input.messages": [{"role": "user", "content": "Hm?"}], "app": {"deep": [1, None, 0.1]}},
    )
    cut = a_span("s1-t2-3", span_id="cut", parent_id="call", attempt=2, status=Status.INTERRUPTED, error="cut \ud800")
    return RolloutRecords(
        rollout=a_rollout(
            "s1-t2-3", attempt=2, state=RolloutState.TIMED_OUT, reward=-0.5, versions={"p": 7}, started_ns=1, ended_ns=9
        ),
        spans=[call, cut],
        completions=[a_completion("s1-t2-3", span_id="call", attempt=2)],
        rewards=[
            a_reward("s1-t2-3", -0.5, attempt=2, target_span="call"),
            a_reward("s1-t2-3", 0.1, attempt=2, name="x"),
        ],
    )


async def recorded(run: Path) -> None:
    """Make a run of what instrumentations recorded and of what a trainer might have."""
    await import_files(sorted(RECORDED.glob("*.jsonl")), run, Rules())
    async with await SQLiteStore.open(run / "store.db") as store:
        await put(store, [a_trained_rollout()], stored=set())


async def stored(run: Path) -> Sequence[RolloutRecords]:
    async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
        return await store.records(sorted(one.rollout_id for one in await store.rollouts()))


@pytest.mark.timeout(600)
def test_a_run_goes_through_phoenix_and_comes_back_equal(phoenix: str, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    asyncio.run(recorded(run))
    before = asyncio.run(stored(run))
    assert traces_command(["export", str(run), "--to", f"{phoenix}/v1/traces"]) == 0

    held = spans_in(phoenix, sum(1 + len(one.spans) for one in before))
    body = {"resourceSpans": [{"scopeSpans": [{"spans": held}]}]}
    (tmp_path / "phoenix.json").write_text(json.dumps(body))
    traces_command(["import", str(tmp_path / "phoenix.json"), str(again)])
    after = asyncio.run(stored(again))
    assert len(after) == len(before) > 5
    for one, other in zip(before, after, strict=True):
        assert other.rollout == one.rollout
        assert sorted(map(without_sequence, other.spans)) == sorted(map(without_sequence, one.spans))
        assert len(other.completions) == len(one.completions)
        for ours, theirs in zip(one.completions, other.completions, strict=True):
            assert (theirs.prompt_token_ids, theirs.choices) == (ours.prompt_token_ids, ours.choices)
        assert sorted(map(repr, other.rewards)) == sorted(map(repr, one.rewards))

    sent = {one.span_id: one for one in read_request(to_otlp(before)).spans}
    got = read_request(decode_json(json.dumps(body))).spans
    assert differences(sent, got) == NOT_HELD


def without_sequence(span: object) -> str:
    return repr(span).partition(", sequence=")[0]


def differences(sent: dict[str, RawSpan], got: Sequence[RawSpan]) -> set[str]:
    """Return the fields and attributes that Phoenix gives back otherwise than they were sent."""
    found: set[str] = set()
    for one in got:
        ours = sent[one.span_id]
        fields = ("name", "parent_id", "start_ns", "end_ns", "is_error", "error", "links", "resource", "scope")
        found |= {name for name in fields if getattr(ours, name) != getattr(one, name)}
        found |= {name for name, value in ours.attributes.items() if one.attributes.get(name) != value}
        if ours.events != one.events:
            assert [(each.name, each.attributes) for each in ours.events] == [
                (each.name, each.attributes) for each in one.events
            ]
            found.add("times of events")
    return found


def test_phoenix_shows_calls_tools_and_agents_as_what_they_are(phoenix: str, tmp_path: Path) -> None:
    asyncio.run(recorded(tmp_path / "run"))
    records = asyncio.run(stored(tmp_path / "run"))
    traces_command(["export", str(tmp_path / "run"), "--to", f"{phoenix}/v1/traces"])
    spans_in(phoenix, sum(1 + len(one.spans) for one in records))
    shown = httpx.get(f"{phoenix}/v1/projects/default/spans", params={"limit": 1000}).json()["data"]
    kinds = Counter((one["attributes"].get("leyden.kind"), one["span_kind"]) for one in shown)
    calls = sum(span.kind is Kind.MODEL_CALL for one in records for span in one.spans)
    assert kinds["model_call", "LLM"] == calls
    assert {theirs for ours, theirs in kinds if ours == "tool"} == {"TOOL"}
    assert {theirs for ours, theirs in kinds if ours == "agent"} == {"AGENT"}
