"""An export routes the running app's roles, and lets go of them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import leyden
from leyden import wire
from leyden.errors import ConfigurationError
from leyden.wire import patience
from tests.capture.servers import FakeOpenAI

BODY = {"model": "gpt", "messages": [{"role": "system", "content": "old"}, {"role": "user", "content": "x"}]}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    policy = {"model": "served-sql", "folder": "policies/sql", "version": 7, "roles": ["writer"], "sampling": {}}
    description = {"schema": 1, "policies": {"sql": {**policy, "base_sha256": "ab"}}, "prompts": {"critic": "better"}}
    (tmp_path / "leyden.json").write_text(json.dumps(description))
    return tmp_path


def call(library: Any, base_url: str, **options: Any) -> Any:
    with library.Client(headers={"authorization": "Bearer user-key"}) as client:
        return client.post(base_url + "/chat/completions", json=BODY, **options)


def test_deployed_roles_and_prompts_take_effect_until_closed(
    library: Any, export: Path, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    original = library.Client.send
    with leyden.deploy(export, gateway.base_url, api_key="served-key") as deployment:
        for name in ("writer", "critic", "other"):
            with leyden.role(name):
                call(library, user_server.base_url)
        assert deployment.export.policies["sql"].version == 7
    deployment.close()
    with leyden.role("writer"):
        call(library, user_server.base_url)
    (served,) = gateway.seen
    assert (served.body["model"], served.headers["authorization"]) == ("served-sql", "Bearer served-key")
    assert not [name for name in served.headers if name.startswith("x-leyden")]
    assert [seen.body["messages"][0]["content"] for seen in user_server.seen] == ["better", "old", "old"]
    assert {seen.headers["authorization"] for seen in user_server.seen} == {"Bearer user-key"}
    assert library.Client.send is original
    assert wire.default_routing() is None


def test_a_kept_role_stays_with_the_apps_own_model_under_a_policy_of_every_role(
    library: Any, export: Path, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    description = json.loads((export / "leyden.json").read_text())
    description["policies"]["sql"] |= {"roles": None, "kept_roles": ["judge*"]}
    (export / "leyden.json").write_text(json.dumps(description))
    with leyden.deploy(export, gateway.base_url):
        for name in ("judge", "writer"):
            with leyden.role(name):
                call(library, user_server.base_url)
        with pytest.raises(ConfigurationError, match=r"role 'judge' .* take \[\['\*'\]\] except \['judge\*'\]"):
            leyden.endpoint("judge")
    assert [seen.body["model"] for seen in gateway.seen] == ["served-sql"]
    assert [seen.headers["authorization"] for seen in user_server.seen] == ["Bearer user-key"]


def test_a_server_that_is_down_falls_back_only_when_asked_to(
    library: Any, export: Path, user_server: FakeOpenAI, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("leyden.wire.patience.CONNECT_PATIENCE_SECONDS", 0.1)
    patience.warn_of_fallback.cache_clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with leyden.deploy(export, down, fallback=True), leyden.role("writer"):
        assert call(library, user_server.base_url).json()["model"] == "gpt"
        call(library, user_server.base_url)
    assert caplog.text.count("the app's own model answers instead") == 1
    assert {seen.headers["authorization"] for seen in user_server.seen} == {"Bearer user-key"}
    with leyden.deploy(export, down), leyden.role("writer"), pytest.raises(library.ConnectError):
        call(library, user_server.base_url)


def test_deploy_refuses_what_it_cannot_use(tmp_path: Path, export: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no readable leyden\.json"):
        leyden.deploy(tmp_path / "nothing", "http://127.0.0.1:1/v1")
    with pytest.raises(ConfigurationError, match=r"'127\.0\.0\.1:1' is not an address"):
        leyden.deploy(export, "127.0.0.1:1")
    with (
        leyden.deploy(export, "http://127.0.0.1:1/v1"),
        pytest.raises(ConfigurationError, match=r"deployed .* already"),
    ):
        leyden.deploy(export, "http://127.0.0.1:1/v1")
    (export / "leyden.json").write_text('{"schema": 1, "policies": []}')
    with pytest.raises(ConfigurationError, match="is not an export"):
        leyden.deploy(export, "http://127.0.0.1:1/v1")
    (export / "leyden.json").write_text('{"schema": 2, "policies": {}}')
    with pytest.raises(ConfigurationError, match="has schema 2"):
        leyden.deploy(export, "http://127.0.0.1:1/v1")


def test_a_deployed_app_loads_no_trainer_store_or_torch(export: Path) -> None:
    code = (
        "import sys, leyden\n"
        f"with leyden.deploy({str(export)!r}, 'http://127.0.0.1:1/v1'): pass\n"
        "print([m for m in ('torch', 'sqlite3', 'leyden.training.trainer', 'leyden.sqlite', 'httpx', 'langchain_core')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
