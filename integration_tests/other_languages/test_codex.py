"""OpenAI's Codex from npm repairs a project: a coding agent that nobody here wrote, as a program under `Command`.

A small model cannot drive it, so a script says what the model would. Codex's own part is real: its prompts, its tools,
its edits. It talks Responses, as a stream, and asks the gateway for nothing that is not asked here.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import leyden
from integration_tests.other_languages.packages import ROOT, npm_folder
from integration_tests.other_languages.rollouts import call, check, results, run
from leyden.interfaces import GenerationRequest
from leyden.testing.fakes import Answer, FakeEngine

EXAMPLE = ROOT / "examples" / "other_languages" / "codex"
ROLE = "coder"

BROKEN = "def mean(values):\n    return sum(values) / (len(values) + 1)\n"
CHECK = 'python3 -c "from stats import mean; assert mean([1, 2, 3]) == 2"'


def task(rollout_id: str) -> dict[str, object]:
    prompt = f"[[rollout={rollout_id}]] The check fails: {CHECK}. Repair stats.py."
    return {"files": {"stats.py": BROKEN}, "prompt": prompt, "check": CHECK}


@pytest.fixture(scope="module")
def repair() -> Path:
    return npm_folder(EXAMPLE) / "repair.py"


class Elsewhere:
    """Stands where a proxy would, and counts who wants to go anywhere but this machine."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                self.asked.append(connection.recv(200))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that lead every client here, but for what is on this machine."""
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        proxies = {spelled: self.url for name in names for spelled in (name, name.lower())}
        return {**proxies, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    place = Elsewhere()
    yield place
    place.close()


def repairs(request: GenerationRequest) -> Answer:
    """Look, repair, check, and say so."""
    seen = results(request)
    match len(seen):
        case 0:
            return Answer(
                text="I look first.", tool_calls=call("call_0", "exec_command", cmd="cat stats.py").tool_calls
            )
        case 1:
            assert BROKEN in seen[0]
            return call("call_1", "exec_command", cmd="sed -i 's/(len(values) + 1)/len(values)/' stats.py")
        case 2:
            return call("call_2", "exec_command", cmd=f"{CHECK} && echo it is right")
    assert "it is right" in seen[2]
    return Answer(text="Repaired: the mean was divided by one too many.")


def test_codex_repairs_a_project_and_every_token_of_it_is_recorded(repair: Path, elsewhere: Elsewhere) -> None:
    engine = FakeEngine(repairs, context_length=200_000, tokens_per_delta=16)
    command = leyden.Command([sys.executable, str(repair)], role=ROLE, environment=elsewhere.environment)
    ran = run(command, engine, rollouts=2, roles=(ROLE,), task=task)
    check(ran, calls=4, role=ROLE)
    for rollout_id in ran.results:
        assert ran.rewards(rollout_id) == {"reward": 1.0}
        assert [one.choices[0].finish_reason for one in ran.completions(rollout_id)] == ["tool_calls"] * 3 + ["stop"]
    assert elsewhere.asked == []


def test_a_repair_that_repairs_nothing_has_no_reward(repair: Path) -> None:
    ran = run(leyden.Command([sys.executable, str(repair)]), FakeEngine("It looks fine to me."), task=task)
    assert ran.rewards("r0") == {"reward": 0.0}
    check(ran, calls=1)
