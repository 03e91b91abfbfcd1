"""The contract between Leyden and a plugin, with packages that are really found on the path."""

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from leyden import errors
from leyden.errors import ConfigurationError, DeadlineExceeded, LeydenError, MissingExtraError, PluginError
from leyden.extras import extra
from leyden.hookspecs import API_VERSION, KINDS, Registry, lazy
from leyden.plugins import disabled_names, load_plugins

Install = Callable[..., None]

HEAD = """
from leyden.hookspecs import hookimpl, lazy
leyden_api_version = 1
"""
REGISTERS = (
    HEAD
    + """
@hookimpl
def leyden_register(registry):
    registry.algorithm("{name}", lazy("{module}:Algorithm"), summary="from {module}")

class Algorithm: ...
"""
)


def registers(name: str, *, module: str) -> str:
    return REGISTERS.format(name=name, module=module)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package with one module and one entry point on the path."""
    monkeypatch.delenv("LEYDEN_PLUGINS_DISABLE", raising=False)

    def install(package: str, source: str, *, plugin: str | None = None) -> None:
        folder = tmp_path / package
        metadata = folder / f"{package}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{package}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[leyden]\n{plugin or package} = {package}\n")
        monkeypatch.syspath_prepend(str(folder))

    return install


def test_builtins_are_registered_and_come_first(install: Install) -> None:
    install("aaa", registers("a", module="aaa"))
    plugins = load_plugins()
    assert plugins.loaded[:2] == ("builtin", "aaa")
    assert {"grpo", "rejection-sampling"} <= set(plugins.names("algorithm"))
    assert {"in-process", "workers"} <= set(plugins.names("executor"))
    assert {"terminal", "jsonl", "report"} <= set(plugins.names("sink"))


def test_a_third_party_plugin_is_found_and_its_component_imported_on_demand(install: Install) -> None:
    install("plug_a", registers("acme-grpo", module="plug_a"))
    plugins = load_plugins()
    assert "acme-grpo" in plugins.names("algorithm")
    assert plugins.components["algorithm", "acme-grpo"].summary == "from plug_a"
    assert plugins.get("algorithm", "acme-grpo").__name__ == "Algorithm"


def test_a_broken_plugin_is_logged_with_its_traceback_and_skipped(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("plug_b", "raise ZeroDivisionError('at import')")
    install("plug_c", registers("fine", module="plug_c"))
    plugins = load_plugins()
    assert "fine" in plugins.names("algorithm")
    (broken,) = plugins.broken
    assert (broken.name, broken.package) == ("plug_b", "plug_b 1.0")
    assert isinstance(broken.error, ZeroDivisionError)
    assert "Traceback" in caplog.text
    assert "plug_b 1.0" in caplog.text


def test_a_plugin_that_fails_half_way_registers_nothing(install: Install) -> None:
    register = HEAD + (
        "@hookimpl\ndef leyden_register(registry):\n"
        "    registry.sink('half', lazy('m:a'))\n    raise RuntimeError('half-way')\n"
    )
    install("plug_d", register)
    plugins = load_plugins()
    assert "half" not in plugins.names("sink")
    assert "plug_d" not in plugins.loaded


def test_a_misspelt_hook_is_reported(install: Install) -> None:
    install("plug_e", HEAD + "@hookimpl\ndef step_finnished(step, metrics): ...\n")
    (broken,) = load_plugins().broken
    assert "step_finnished" in str(broken.error)


def test_a_misspelt_hook_argument_is_reported(install: Install) -> None:
    install("plug_f", HEAD + "@hookimpl\ndef step_finished(step, metricks): ...\n")
    (broken,) = load_plugins().broken
    assert "metricks" in str(broken.error)


def test_a_plugin_without_a_hook_is_reported(install: Install) -> None:
    install("plug_g", HEAD + "def leyden_register(registry): ...\n")
    (broken,) = load_plugins().broken
    assert "implements no hook" in str(broken.error)


@pytest.mark.parametrize("line", ["leyden_api_version = 99", ""])
def test_another_api_version_is_refused(install: Install, line: str) -> None:
    install("plug_h", registers("x", module="plug_h").replace("leyden_api_version = 1", line))
    (broken,) = load_plugins().broken
    assert f"speaks version {API_VERSION}" in str(broken.error)


def test_two_plugins_with_one_name_are_refused_naming_both_packages(install: Install) -> None:
    install("plug_i", registers("i", module="plug_i"), plugin="same")
    install("plug_j", registers("j", module="plug_j"), plugin="same")
    with pytest.raises(PluginError, match=r"'same'.*plug_[ij] 1\.0.*plug_[ij] 1\.0"):
        load_plugins()


def test_two_plugins_with_one_component_are_refused_naming_both(install: Install) -> None:
    install("plug_k", registers("grpo", module="plug_k"))
    with pytest.raises(PluginError, match="'builtin' and 'plug_k' both register the algorithm 'grpo'"):
        load_plugins()


def test_one_plugin_registering_a_name_twice_is_refused() -> None:
    registry = Registry("p")
    registry.store("s", lazy("m:a"))
    with pytest.raises(PluginError, match="store 's' twice"):
        registry.store("s", lazy("m:b"))


def test_the_variable_switches_plugins_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("plug_l", "raise AssertionError('imported although disabled')")
    install("plug_m", registers("m", module="plug_m"))
    monkeypatch.setenv("LEYDEN_PLUGINS_DISABLE", "plug_l, plug_m,")
    plugins = load_plugins()
    assert plugins.broken == ()
    assert not {"plug_l", "plug_m"} & set(plugins.loaded)


def test_disabled_names_are_read_without_blanks() -> None:
    assert disabled_names(" a, b,,") == {"a", "b"}
    assert disabled_names("") == set()


def test_an_unknown_name_suggests_the_nearest_and_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match=r"'grop'; did you mean 'grpo'\? Known: .*rejection-sampling"):
        load_plugins().get("algorithm", "grop")


def test_an_unknown_name_mentions_plugins_that_failed_to_load(install: Install) -> None:
    install("plug_n", "1 / 0")
    with pytest.raises(ConfigurationError, match="failed to load: plug_n"):
        load_plugins().get("engine", "of-plug-n")


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ConfigurationError, match=r"'algorthm' is not a kind .*framework, algorithm"):
        load_plugins().get("algorthm", "grpo")  # type: ignore[arg-type]  # the mistake under test


def test_every_kind_has_a_method_of_the_registry() -> None:
    registry = Registry("p")
    for kind in KINDS:
        getattr(registry, kind)("x", lazy("m:a"))
    assert set(registry.components) == {(kind, "x") for kind in KINDS}


def test_a_component_that_cannot_be_imported_names_itself_and_its_plugin(install: Install) -> None:
    install("plug_o", registers("o", module="plug_o").replace("class Algorithm: ...", ""))
    with pytest.raises(PluginError, match="algorithm 'o' of plugin 'plug_o' cannot be imported: Attribute"):
        load_plugins().get("algorithm", "o")


def test_a_component_that_lacks_its_extra_says_what_to_install(install: Install) -> None:
    source = registers("p", module="plug_p_heavy").replace("class Algorithm: ...", "")
    install("plug_p", source)
    heavy = "from leyden.extras import extra\nwith extra('train'):\n    import no_such_module\n"
    install("plug_p_heavy", heavy, plugin="unused")
    with pytest.raises(MissingExtraError, match=r"pip install 'leyden\[train\]'"):
        load_plugins(disabled={"unused"}).get("algorithm", "p")


@pytest.mark.parametrize("path", ["module", "module:", ":attribute"])
def test_a_lazy_path_needs_both_halves(path: str) -> None:
    with pytest.raises(PluginError, match=r"package\.module:Attribute"):
        lazy(path)


def test_observers_are_told_in_order_and_a_failing_one_stops_nobody(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    tells = "seen = []\n@hookimpl\ndef step_finished(step, metrics):\n    seen.append((step, dict(metrics)))\n"
    install("plug_q", HEAD + tells + "    metrics.clear()\n    raise ValueError('observer broke')\n")
    install("plug_r", HEAD + tells)
    metrics = {"reward": 0.5}
    load_plugins().hook.step_finished(step=3, metrics=metrics)
    assert sys.modules["plug_q"].seen == sys.modules["plug_r"].seen == [(3, {"reward": 0.5})]
    assert metrics == {"reward": 0.5}
    assert "plugin 'plug_q' failed in step_finished" in caplog.text
    assert "observer broke" in caplog.text


def test_an_observer_may_take_fewer_arguments(install: Install) -> None:
    source = "seen = []\n@hookimpl\ndef rollout_finished():\n    seen.append(1)\n"
    install("plug_s", HEAD + source)
    load_plugins().hook.rollout_finished(rollout=object())
    assert sys.modules["plug_s"].seen == [1]


def test_importing_leyden_and_listing_plugins_imports_no_framework_and_no_torch() -> None:
    code = (
        "import sys, leyden; from leyden.plugins import load_plugins; from leyden.hookspecs import KINDS\n"
        "plugins = load_plugins(); assert all(plugins.names(kind) is not None for kind in KINDS)\n"
        "top = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(top - set(sys.stdlib_module_names)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(result.stdout.strip("[]\n").replace("'", "").split(", "))
    allowed = {"__main__", "leyden", "leyden_plugins", "pluggy", "msgspec"}
    assert {name for name in imported if not name.startswith(("_", "sitecustomize"))} <= allowed


def test_pluggy_is_quiet_about_a_healthy_load(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    load_plugins()
    assert caplog.records == []


# Errors and extras: what plugins raise


@pytest.mark.parametrize("name", sorted(vars(errors).keys() - vars(errors)["__builtins__"].keys()))
def test_every_error_survives_pickling(name: str) -> None:
    kind = getattr(errors, name)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return
    copy = pickle.loads(pickle.dumps(kind("what is wrong")))
    assert type(copy) is kind
    assert str(copy) == "what is wrong"


def test_a_missing_extra_keeps_the_module_name_through_pickling() -> None:
    with pytest.raises(MissingExtraError) as caught, extra("langchain"):
        import no_such_module  # noqa: F401  # type: ignore[import-not-found]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.name == "no_such_module"
    assert "pip install 'leyden[langchain]'" in str(copy)


def test_an_installed_module_that_fails_raises_its_own_error() -> None:
    with pytest.raises(ImportError, match="cannot import name") as caught, extra("train"):
        from json import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)


def test_a_missing_module_of_leyden_itself_is_not_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError) as caught, extra("train"):
        import leyden_plugins.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, LeydenError)


def test_the_deadline_is_not_caught_by_except_exception() -> None:
    assert not issubclass(DeadlineExceeded, Exception)
