"""What recorded apps do besides plain calls: streams, deployed roles, nonsense on the line, sudden ends."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

import leyden
from leyden.spans import Kind, Span
from leyden.sqlite import SQLiteStore
from tests.capture.servers import FakeOpenAI, serving
from tests.recording.app import recorded, say


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with serving() as running:
        yield running


def model_calls(folder: Path) -> list[Span]:
    return [
        span
        for group in recorded(folder)
        for one in group.rollouts
        for span in one.spans
        if span.kind is Kind.MODEL_CALL
    ]


def test_streamed_answers_are_recorded_whole(tmp_path: Path, server: FakeOpenAI) -> None:
    async def stream(text: str) -> str:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none") as client:
            pieces = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": text}], stream=True
            )
            return "".join([piece.choices[0].delta.content or "" async for piece in pieces if piece.choices])

    with leyden.record(tmp_path) as recording, recording.rollout("task"):
        with leyden.role("writer"):
            said = asyncio.run(stream("hello"))
    [call] = model_calls(tmp_path)
    assert said and said in json.dumps(call.attributes["gen_ai.output.messages"])


def test_a_deployed_app_goes_on_being_recorded_under_its_new_prompts(tmp_path: Path, server: FakeOpenAI) -> None:
    policy = {"model": "tuned", "folder": "policies/tuned", "version": 1, "roles": ["writer"], "sampling": {}}
    export = {"schema": 1, "policies": {"tuned": policy}, "prompts": {"critic": "be strict"}}
    (tmp_path / "leyden.json").write_text(json.dumps(export))
    server.clear()
    with leyden.record(tmp_path / "production") as recording:
        with leyden.deploy(tmp_path, server.base_url), recording.rollout("deployed"):
            say(server.base_url, "writer", "one")
            say(server.base_url, "critic", "two")
        with recording.rollout("as it was"):
            say(server.base_url, "writer", "three")
    assert [seen.body["model"] for seen in server.seen] == ["tuned", "m", "m"]
    one, two, three = model_calls(tmp_path / "production")
    assert [span.role for span in (one, two, three)] == ["writer", "critic", "writer"]
    assert two.attributes["gen_ai.input.messages"] == server.seen[1].body["messages"]
    assert server.seen[1].body["messages"][0] == {"role": "system", "content": "be strict"}
    assert all(span.attributes["gen_ai.output.messages"] for span in (one, two, three))


@contextmanager
def answering(status: int, kind: str, content: bytes) -> Iterator[str]:
    """Answer every POST with the same bytes; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1/chat/completions"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


@pytest.mark.parametrize(
    ("status", "kind", "content"),
    [
        (200, "application/json", b"{"),
        (200, "application/json", b'{"choices": 7}'),
        (200, "application/json", b'{"choices": [{"message": [1]}], "usage": "much"}'),
        (200, "application/json", b"\xff\xfe[null]"),
        (200, "text/event-stream", b"data: {\n\ndata: 7\n\ndata: [DONE]\n\n"),
        (500, "text/html", b"<html>"),
    ],
)
def test_nonsense_on_the_line_reaches_the_app_as_it_is(tmp_path: Path, status: int, kind: str, content: bytes) -> None:
    bodies = [
        b'{"model": "m", "messages": [{"role": "user", "content": "hello"}]}',
        b'{"model": "m", "messages": "hello"}',
        b'{"model": ["m"], "messages": [7, null, {"content": {"deep": []}}], "tools": "none"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}], "stream": true}',
        b"[1, 2]",
        b"\xff",
    ]
    with leyden.record(tmp_path) as recording, answering(status, kind, content) as url:
        with httpx.Client(trust_env=False) as client, recording.rollout("task"):
            for body in bodies:
                reply = client.post(url, content=body)
                assert (reply.status_code, reply.content) == (status, content)
        assert recording.flush()
        assert recording.stored + sum(recording.dropped.values()) == 1
        with recording.rollout("next"):
            pass
    assert "next" in [group.task for group in recorded(tmp_path)]


def test_an_app_killed_while_it_stores_leaves_whole_rollouts_only(tmp_path: Path) -> None:
    script = f"""
        import leyden
        recording = leyden.record({str(tmp_path)!r}, queue=1000000)
        number = 0
        while True:
            with recording.rollout(number):
                for _ in range(5):
                    with leyden.tool("look"):
                        pass
            number += 1
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until and count(tmp_path) < 300:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    groups = recorded(tmp_path)
    assert [group.task for group in groups] == list(range(len(groups)))  # a batch at most is lost, and no hole is left
    assert len(groups) >= 300
    assert {len(one.spans) for group in groups for one in group.rollouts} == {6}


def count(folder: Path) -> int:
    return len(recorded(folder)) if (folder / "store.db").exists() and is_readable(folder / "store.db") else 0


def is_readable(path: Path) -> bool:
    """Say whether a store that is just being made can be read yet."""

    async def look() -> None:
        async with await SQLiteStore.open(path, read_only=True):
            pass

    try:
        asyncio.run(look())
    except Exception:
        return False
    return True


def test_what_the_users_function_takes_out_is_never_stored(tmp_path: Path, server: FakeOpenAI) -> None:
    def redact(text: str) -> str:
        if "unreadable" in text:
            raise ValueError("cannot say")
        return text.replace("Ada Lovelace", "[name]")

    with leyden.record(tmp_path, redact=redact) as recording:
        with recording.rollout({"customer": "Ada Lovelace"}) as rollout:
            rollout.output = ["for Ada Lovelace", say(server.base_url, "writer", "Ada Lovelace asks")]
        with pytest.raises(KeyError), recording.rollout("fails"):
            raise KeyError("Ada Lovelace")
        with recording.rollout("unreadable"):
            pass
        recording.flush()
        assert recording.dropped == {"redact raised an exception": 1}
    assert b"Lovelace" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    first, second = (group.rollouts[0].rollout for group in recorded(tmp_path))
    assert first.task == {"customer": "[name]"}
    assert second.error == "'[name]'"
    [call] = model_calls(tmp_path)
    assert call.attributes["gen_ai.input.messages"] == [{"role": "user", "content": "[name] asks"}]
