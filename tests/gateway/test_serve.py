"""Plain serving: an OpenAI endpoint in a thread of its own, and folders of checkpoints."""

from __future__ import annotations

import asyncio
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from leyden import plugins
from leyden.deploying.exported import Export, ExportedPolicy
from leyden.errors import ConfigurationError
from leyden.interfaces import GenerationRequest
from leyden.roles import Policy
from leyden.testing.fakes import FakeEngine
from leyden_plugins.gateway import serve
from leyden_plugins.gateway.serve import model_folders, serve_folder
from tests.gateway.builders import ask


def post(base_url: str, body: object, key: str = "k") -> httpx.Response:
    return httpx.post(f"{base_url}/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})


def test_an_engine_is_started_served_and_left_running() -> None:
    engine = FakeEngine("hello")
    with serve(engine) as endpoint:
        response = post(endpoint.base_url, ask(model="base"))
        assert response.json()["choices"][0]["message"]["content"] == "hello"
        assert endpoint.models == ("base",)
    assert engine.started
    with pytest.raises(httpx.ConnectError):
        post(endpoint.base_url, ask(model="base"))


def test_clients_may_call_the_model_by_other_names() -> None:
    engine = FakeEngine("hello")
    with serve(engine, names=["checker", "gpt-4o-mini"]) as endpoint:
        assert post(endpoint.base_url, ask(model="checker")).json()["model"] == "checker"
        assert post(endpoint.base_url, ask(model="base")).status_code == 404
        listed = httpx.get(f"{endpoint.base_url}/models").json()["data"]
        assert [model["id"] for model in listed] == ["checker", "gpt-4o-mini"]
    assert [one.request.model for one in engine.log] == ["base"]


def test_a_key_is_checked_only_where_one_was_given() -> None:
    with serve(FakeEngine(), api_key="secret-1") as endpoint:
        assert endpoint.api_key == "secret-1"
        assert post(endpoint.base_url, ask(model="base"), "secret-1").status_code == 200
        assert post(endpoint.base_url, ask(model="base"), "other").status_code == 401
    with serve(FakeEngine()) as endpoint:
        assert httpx.post(f"{endpoint.base_url}/chat/completions", json=ask(model="base")).status_code == 200


def test_the_agents_own_sampling_is_used_and_leydens_headers_mean_nothing() -> None:
    engine = FakeEngine()
    with serve(engine) as endpoint:
        headers = {"x-leyden-rollout": "elsewhere", "x-leyden-attempt": "9", "x-leyden-span": "s"}
        body = ask(model="base", temperature=0, seed=5)
        assert httpx.post(f"{endpoint.base_url}/chat/completions", json=body, headers=headers).status_code == 200
    assert (engine.log[0].request.sampling.temperature, engine.log[0].request.sampling.seed) == (0.0, 5)


def test_an_engine_serves_while_another_loop_uses_it() -> None:
    engine = FakeEngine(lambda request: f"for {request.model}", delta_seconds=0.001)

    async def train(base_url: str) -> None:
        await engine.start([Policy("sql")])

        async def own() -> str:
            request = GenerationRequest(model="sql", messages=[{"role": "user", "content": "x"}])
            return "".join([delta.text async for delta in (await engine.generate(request)).deltas])

        async with httpx.AsyncClient() as client:
            served = [client.post(f"{base_url}/chat/completions", json=ask(model="base")) for _ in range(20)]
            texts, last = await asyncio.gather(asyncio.gather(*(own() for _ in range(20))), asyncio.gather(*served))
        assert set(texts) == {"for sql"}
        assert {one.json()["choices"][0]["message"]["content"] for one in last} == {"for base"}

    with serve(engine) as endpoint:
        asyncio.run(train(endpoint.base_url))


def test_a_port_that_is_taken_is_named() -> None:
    with serve(FakeEngine()) as endpoint:
        port = int(endpoint.base_url.split(":")[2].split("/")[0])
        with pytest.raises(ConfigurationError, match=rf"port {port} cannot be used"):
            with serve(FakeEngine(), port=port):
                pass


def test_an_engine_that_cannot_start_ends_serving_with_its_error() -> None:
    class Broken(FakeEngine):
        async def start(self, policies: object) -> None:
            raise ConfigurationError("no such model 'x'")

    with pytest.raises(ConfigurationError, match="no such model"), serve(Broken()):
        pass


def exported(folder: Path) -> Path:
    """Write an export of two policies."""
    policies = {
        name: ExportedPolicy(
            model=name, folder=f"policies/{name}", version=3, roles=[name], sampling={}, base_sha256=None
        )
        for name in ("sql", "judge")
    }
    for policy in policies.values():
        (folder / policy.folder).mkdir(parents=True)
        (folder / policy.folder / "config.json").write_text("{}")
    (folder / "leyden.json").write_bytes(msgspec.json.encode(Export(policies=policies)))
    return folder


def test_the_models_of_a_folder_are_found(tmp_path: Path) -> None:
    export = exported(tmp_path / "out")
    assert model_folders(export) == {name: export / "policies" / name for name in ("sql", "judge")}
    (export / "leyden.json").unlink()
    assert model_folders(export) == {name: export / "policies" / name for name in ("sql", "judge")}
    single = export / "policies" / "sql"
    assert model_folders(single) == {"sql": single}
    assert model_folders(single, "gpt") == {"gpt": single}


def test_a_folder_without_a_model_or_with_a_broken_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no model"):
        model_folders(tmp_path)
    export = exported(tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"several models.*leave out 'gpt'"):
        model_folders(export, "gpt")
    (export / "leyden.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"leyden\.json.*is not an export"):
        model_folders(export)


def test_every_model_of_an_export_is_served_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakeEngine] = []

    def make(folder: str) -> FakeEngine:
        made.append(FakeEngine(f"from {Path(folder).name}"))
        return made[-1]

    register(monkeypatch, make)
    with serve_folder(exported(tmp_path / "out"), engine="fake") as endpoint:
        for name in ("sql", "judge"):
            text = post(endpoint.base_url, ask(model=name)).json()["choices"][0]["message"]["content"]
            assert text == f"from {name}"
        assert post(endpoint.base_url, ask(model="sql", logprobs=True)).status_code == 400
    assert [engine.started for engine in made] == [False, False]


def register(monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
    """Install a plugin that offers an engine named `fake`."""
    from leyden.hookspecs import Registry, hookimpl

    class Plugin:
        leyden_api_version = 1

        @hookimpl
        def leyden_register(self, registry: Registry) -> None:
            registry.engine("fake", lambda: engine)

    plugin = Plugin()

    class Entry(metadata.EntryPoint):
        def load(self) -> object:
            return plugin

    loaded = plugins.load_plugins([Entry("faker", "faker", "leyden")])
    # The package's `serve` is the function; the module of that name is found through the import system.
    monkeypatch.setattr(import_module("leyden_plugins.gateway.serve"), "load_plugins", lambda: loaded)


def make_lora(folder: Path, base: str | None) -> Path:
    """Write what tells PEFT's folder of a LoRA from others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "adapter_config.json").write_bytes(msgspec.json.encode({"r": 4, "base_model_name_or_path": base}))
    return folder


def test_all_loras_on_one_base_are_served_by_one_engine_beside_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(tmp_path / "out")
    (base := tmp_path / "base").mkdir()
    loras = [make_lora(out / "policies" / name, str(base)) for name in ("judge", "sql")]
    whole = out / "policies" / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    (out / "leyden.json").unlink()
    made: dict[str, FakeEngine] = {}

    def make(folder: str) -> FakeEngine:
        made[folder] = FakeEngine(lambda request: f"{request.model} of {Path(folder).name}")
        return made[folder]

    register(monkeypatch, make)
    assert list(model_folders(out)) == ["judge", "sql", "whole"]
    with serve_folder(out, engine="fake") as endpoint:
        texts = [
            post(endpoint.base_url, ask(model=name)).json()["choices"][0]["message"]["content"]
            for name in endpoint.models
        ]
    assert len(made) == 2
    published = made[str(base)].published
    assert [weights.folder for _, _, weights in published] == loras
    assert texts == [f"{published[0][0]} of base", f"{published[1][0]} of base", "base of whole"]


def test_a_lora_may_be_called_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    folder = make_lora(tmp_path / "sql", "../base")
    register(monkeypatch, lambda folder: FakeEngine(f"on {Path(folder).name}"))
    with serve_folder(folder, model_name="team/sql", engine="fake") as endpoint:
        reply = post(endpoint.base_url, ask(model="team/sql"))
        assert reply.json()["choices"][0]["message"]["content"] == "on base"


@pytest.mark.parametrize("base", [None, "", "/nowhere/base", "../missing", "a/b/c"])
def test_a_lora_whose_base_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str | None
) -> None:
    register(monkeypatch, lambda folder: FakeEngine())
    folder = make_lora(tmp_path / "sql", base)
    with pytest.raises(ConfigurationError, match=rf"base_model_name_or_path .* is {base!r}, which is no folder here"):
        with serve_folder(folder, engine="fake"):
            pass
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="is not the configuration of a LoRA"):
        with serve_folder(folder, engine="fake"):
            pass


def test_a_lora_whose_base_the_engine_cannot_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeEngine):
        async def start(self, policies: object) -> None:
            raise ConfigurationError("no such model")

    register(monkeypatch, lambda folder: Broken())
    with pytest.raises(ConfigurationError, match=r"cannot serve '.*sql' on 'fake', the base named in .*no such model"):
        with serve_folder(make_lora(tmp_path / "sql", "org/model"), engine="fake"):
            pass


def test_loras_of_peft_are_served_as_peft_runs_them(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.engines.asking import plain_logprobs
    from tests.tiny import tiny_checkpoint

    base = tiny_checkpoint(tmp_path / "base")
    tokens = [9, 40, 70]
    wanted = {}
    for seed, name in enumerate(("critic", "sql")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4 + seed, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
        model.save_pretrained(tmp_path / "step/policies" / name)
        model.generation_config.eos_token_id = None
        answer = model.generate(input_ids=torch.tensor([tokens]), do_sample=False, max_new_tokens=6)
        wanted[name] = plain_logprobs(model, tokens, answer[0, len(tokens) :].tolist()).tolist()
    with serve_folder(tmp_path / "step") as endpoint:
        for name, logprobs in wanted.items():
            body = {"model": name, "prompt": tokens, "temperature": 0, "max_tokens": 6, "logprobs": 1}
            choice = httpx.post(f"{endpoint.base_url}/completions", json=body).json()["choices"][0]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
    assert wanted["critic"] != pytest.approx(wanted["sql"], abs=0.1)
