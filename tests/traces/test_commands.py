"""`leyden traces`: files in, a run out, and what is refused at start."""

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import leyden
from leyden.errors import ConfigurationError, DatasetError, EngineError
from leyden.interfaces import Group, RolloutRecords
from leyden.spans import Mode
from leyden.testing.records import a_rollout, a_span
from leyden.training.stored import groups_of
from leyden_plugins.traces.otel import send
from leyden_plugins.traces.otel.command import traces_command
from leyden_plugins.traces.otel.spans import encode_json, read_request
from tests.traces.builders import TRACE, a_call, a_raw, a_request

RECORDED = Path(__file__).parent / "recorded"


def groups(run: Path) -> list[Group]:
    return asyncio.run(groups_of(run, reward_weights={"reward": 1.0}))


@pytest.mark.parametrize("form", ["json", "indented", "lines", "protobuf", "gzip"])
def test_a_file_in_any_form_is_imported_and_can_be_learnt_from(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = a_request(a_raw(1), a_call(2, 1))
    text = encode_json(request)
    content = {
        "json": text.encode(),
        "indented": json.dumps([json.loads(text)], indent=2).encode(),
        "lines": f"{text}\n{text}\n".encode(),
        "protobuf": request.SerializeToString(),
        "gzip": gzip.compress(text.encode()),
    }[form]
    (tmp_path / "traces").write_bytes(content)
    assert traces_command(["import", str(tmp_path / "traces"), str(tmp_path / "run")]) == 0
    (group,) = groups(tmp_path / "run")
    assert (group.task, group.rollouts[0].rollout.mode) == ("How are you?", Mode.RECORDED)
    printed = capsys.readouterr().out
    assert "1 traces that succeeded" in printed
    assert ("2 spans that came twice" in printed) == (form == "lines")


def test_a_trace_may_lie_in_several_files_and_a_damaged_line_costs_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text(encode_json(a_request(a_call(2, 1))) + '\n{"resourceSp')
    (tmp_path / "b").write_text(encode_json(a_request(a_raw(1))))
    assert traces_command(["import", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "run")]) == 0
    (group,) = groups(tmp_path / "run")
    assert len(group.rollouts[0].spans) == 2
    assert "1 damaged lines left out, such as line 2 of" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"{}", b'{"a"\n{"b"', b"[]"])
def test_a_file_without_traces_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "traces").write_bytes(content)
    with pytest.raises(DatasetError, match=r"no spans|neither OTLP|no line"):
        traces_command(["import", str(tmp_path / "traces"), str(tmp_path / "run")])


def test_roles_come_from_a_function_in_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "role_of_span_for_test.py").write_text("def role(span):\n    return span.name.split()[0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "traces"
    file.write_text(encode_json(a_request(a_call(1, name="writer 1"))))
    traces_command(["import", str(file), str(tmp_path / "run"), "--role-from", "role_of_span_for_test:role"])
    (group,) = groups(tmp_path / "run")
    assert group.rollouts[0].spans[0].role == "writer"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["import", "x", "y", "--role-from", "no_such_module:role"], "no_such_module"),
        (["import", "x", "y", "--role-from", "json:no_such"], "no_such"),
        (["import", "x", "y", "--role-from", "json:__name__"], "not a function"),
        (["receive", "y", "--host", "0.0.0.0"], "--token-env"),
        (["receive", "y", "--token-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["export", "no/such/run", "--to", "http://127.0.0.1:1/v1/traces"], "no/such/run"),
        (["export", "no/such/run", "--to", "http://127.0.0.1:1/v1/traces", "--header", "key"], "KEY=VALUE"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(arguments: list[str], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        traces_command(arguments)


# ---- sending


class Sink:
    """An OTLP server that answers with a list of statuses, then takes everything."""

    def __init__(self, statuses: list[int]) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = gzip.decompress(self.rfile.read(int(self.headers["content-length"])))
                sink.headers.append({name.lower(): value for name, value in self.headers.items()})
                status = statuses.pop(0) if statuses else 200
                if status == 200:
                    sink.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(status)
                if status == 429:
                    self.send_header("retry-after", "7")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"


@pytest.fixture
def sink() -> Iterator[Sink]:
    statuses: list[int] = []
    found = Sink(statuses)
    found.statuses = statuses  # type: ignore[attr-defined]
    thread = Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()


def one_rollout() -> RolloutRecords:
    return RolloutRecords(rollout=a_rollout(attempt=1), spans=[a_span()], completions=[], rewards=[])


def test_a_busy_server_is_asked_again_after_the_time_it_names(sink: Sink) -> None:
    sink.statuses += [429, 503]  # type: ignore[attr-defined]
    waits: list[float] = []
    assert send([one_rollout()], sink.url, sleep=waits.append) == 2
    assert waits == [7.0, 2.0]
    assert len(sink.requests) == 1


def test_a_server_that_refuses_is_not_asked_again(sink: Sink) -> None:
    sink.statuses += [401]  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="HTTP 401"):
        send([one_rollout()], sink.url)
    assert len(sink.headers) == 1


def test_a_server_that_stays_busy_is_given_up(sink: Sink) -> None:
    sink.statuses += [503] * 9  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="in 6 tries: HTTP 503"):
        send([one_rollout()], sink.url, sleep=lambda _: None)


def test_a_run_is_exported_with_headers_and_comes_back_equal(tmp_path: Path, sink: Sink) -> None:
    file = RECORDED / "openinference-autogen-agentchat-0.1.22.jsonl"
    run, again = tmp_path / "run", tmp_path / "again"
    traces_command(["import", str(file), str(run)])
    assert traces_command(["export", str(run), "--to", sink.url, "--header", "authorization=Bearer x"]) == 0
    assert sink.headers[0]["authorization"] == "Bearer x"
    (tmp_path / "sent").write_bytes(sink.requests[0].SerializeToString())
    traces_command(["import", str(tmp_path / "sent"), str(again)])
    assert groups(again) == groups(run)
    assert {one.trace_id for one in read_request(sink.requests[0]).spans} == {
        groups(run)[0].rollouts[0].rollout.rollout_id
    }


def test_rewards_that_came_afterwards_are_exported(tmp_path: Path, sink: Sink) -> None:
    run = tmp_path / "run"
    (tmp_path / "traces").write_text(encode_json(a_request(a_raw(1), a_call(2, 1))))
    traces_command(["import", str(tmp_path / "traces"), str(run)])
    leyden.reward(TRACE, 0.75, store=run)
    traces_command(["export", str(run), "--to", sink.url])
    (root,) = [one for one in read_request(sink.requests[0]).spans if one.parent_id is None]
    assert root.attributes["leyden.reward"] == 0.75
    assert root.events[0].attributes["gen_ai.evaluation.score.value"] == 0.75


def test_the_command_receives_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "leyden.cli", "traces", "receive", str(tmp_path / "run"), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            url = re.search(r"http://\S+", process.stdout.readline())
            assert url is not None
            content = a_request(a_call(1)).SerializeToString()
            answer = httpx.post(url.group(), content=content, headers={"content-type": "application/x-protobuf"})
            assert answer.status_code == 200
        finally:
            process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
        assert process.wait(20) == 0
    assert "1 traces that succeeded" in printed
    assert groups(tmp_path / "run")[0].rollouts[0].rollout.rollout_id == TRACE
