"""Take a run's policies and prompts out: a folder that serves and deploys without trainer, store or torch.

    OUT/leyden.json                what is here: policy -> model name, folder, version, roles, sampling, base hash;
                                   role -> system prompt that replaces the agent's own
    OUT/prompts.json               role -> version and text of that prompt
    OUT/PROMPTS.md                 the same for people, with what has changed since the agent's own
    OUT/policies/<name>/           a Hugging Face folder, or PEFT's folder of a LoRA
    OUT/SERVE.md                   how to serve it and how to call it

One idea: the folder is built beside OUT and renamed, so OUT is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec

from leyden.deploying.exported import (
    ADAPTER_CONFIG,
    EXPORT_FILE,
    POLICIES,
    Export,
    ExportedPolicy,
    read_adapter_config,
)
from leyden.deploying.pages import instructions, prompts_page
from leyden.errors import ConfigurationError
from leyden.looping import LoopThread
from leyden.roles import matches
from leyden.spans import new_id
from leyden.sqlite import SQLiteStore
from leyden.training import prompts
from leyden.training.prompts import Prompt
from leyden.training.runfolder import RUN, STORE, checkpoint_folder, read_json, write_json

INSTRUCTIONS = "SERVE.md"
PROMPTS_PAGE = "PROMPTS.md"
WILDCARDS = frozenset("*?[")
"""Characters that make a shell pattern match more than itself."""


class _Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint to export."""

    folder: str
    versions: dict[str, int]
    prompts: dict[str, Prompt]
    own_prompts: dict[str, str]
    """Role -> what it said before any search, where that is known."""


def export(run_folder: str | os.PathLike[str], out: str | os.PathLike[str], *, step: int | None = None) -> Path:
    """Write a checkpoint's policies and prompts to `out`, which must be empty or not exist; return it.

    Args:
        run_folder: of a run that has a checkpoint; it may still be running.
        out: the folder to make.
        step: of the checkpoint; default the latest.

    Raises:
        ConfigurationError: no such run or checkpoint, or `out` is in use.
    """
    run, target = Path(run_folder), Path(os.path.abspath(out))
    record = read_json(run / RUN)
    _refuse_used(target)
    chosen = _choose(run, step)
    policies = cast("dict[str, dict[str, object]]", record.get("policies") or {})
    partial = target.with_name(f".{target.name}.{new_id()}.partial")
    try:
        partial.mkdir(parents=True)
        found = {
            name: _copy_policy(name, policy, run / chosen.folder, partial, chosen, record)
            for name, policy in policies.items()
            if policy.get("trainable", True)
        }
        kept = _kept_roles(policies)
        found = {name: msgspec.structs.replace(one, kept_roles=kept[name]) for name, one in found.items()}
        described = Export(policies=found, prompts={role: one.text for role, one in chosen.prompts.items()})
        write_json(partial / EXPORT_FILE, described)
        prompts.write(partial, chosen.prompts)
        if chosen.prompts:
            (partial / PROMPTS_PAGE).write_text(prompts_page(chosen.prompts, chosen.own_prompts), encoding="utf-8")
        (partial / INSTRUCTIONS).write_text(instructions(described, target.name), encoding="utf-8")
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Path(out)


def _refuse_used(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"{str(target)!r} exists and is not an empty folder; name another one or remove it")


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        # An empty folder is replaced; one that was filled meanwhile is refused by the system.
        os.rename(partial, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _refuse_used(target)
        raise ConfigurationError(f"cannot write {str(target)!r}: {error.strerror}") from error


def _choose(run: Path, step: int | None) -> _Chosen:
    if not (run / STORE).is_file():
        raise ConfigurationError(f"{str(run)!r} holds no run: {STORE} is missing")
    loop = LoopThread("leyden-export")
    try:
        return loop.submit(_read_choice(run, step)).result()
    finally:
        loop.close()


async def _read_choice(run: Path, step: int | None) -> _Chosen:
    """Find the checkpoint and the versions it holds.

    Raises:
        ConfigurationError: there is none, or it was deleted.
    """
    async with await SQLiteStore.open(run / STORE, read_only=True) as store:
        latest, updates, published = await asyncio.gather(
            store.latest_checkpoint(), store.updates(), store.resources(kind="prompt")
        )
    if latest is None:
        raise ConfigurationError(
            f"{str(run)!r} has no checkpoint yet; wait for one, or train with a smaller checkpoint_every"
        )
    folder = latest.folder if step is None else checkpoint_folder(step)
    if not (run / folder / POLICIES).is_dir():
        there = sorted(path.name for path in (run / folder).parent.glob("step-*"))
        raise ConfigurationError(f"{str(run / folder)!r} is not there; checkpoints kept: {', '.join(there) or 'none'}")
    versions = dict(latest.versions)
    if step is not None and step != latest.step:
        versions = {}
        for update in sorted(updates, key=lambda one: one.version):
            if update.step <= step:
                versions[update.policy] = update.version
    return _Chosen(
        folder=folder,
        versions=versions,
        prompts=prompts.of_checkpoint(run / folder),
        own_prompts={one.name: one.content for one in published if one.version == 0 and one.content is not None},
    )


def _copy_policy(
    name: str, policy: Mapping[str, object], checkpoint: Path, out: Path, chosen: _Chosen, record: Mapping[str, object]
) -> ExportedPolicy:
    source, relative = checkpoint / POLICIES / name, f"{POLICIES}/{name}"
    try:
        shutil.copytree(source, out / relative)
    except (OSError, shutil.Error) as error:
        raise ConfigurationError(f"cannot copy policy {name!r} from {str(source)!r}: {error}") from error
    adapter = read_adapter_config(out / relative)
    base = None if adapter is None else _point_at_base(out / relative, adapter.base_model_name_or_path, record)
    sampling = cast("dict[str, object]", policy.get("sampling") or {})
    return ExportedPolicy(
        model=name,
        folder=relative,
        version=chosen.versions.get(name, 0),
        roles=cast("list[str] | None", policy.get("roles")),
        sampling={key: value for key, value in sampling.items() if value is not None and key != "keep_seed"},
        base_sha256=cast("str | None", record.get("base_sha256")),
        base_model=base,
        lora_rank=None if adapter is None else adapter.rank,
    )


def _kept_roles(policies: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """Return trained policy -> the patterns of untrained policies before it that may match a role of its own.

    In training the first policy that matches a role takes it. An untrained one is not exported, so that the roles it
    took would fall to a trained one behind it.
    """
    untrained: list[str] = []
    kept: dict[str, list[str]] = {}
    for name, policy in policies.items():
        roles = cast("list[str] | None", policy.get("roles"))
        if policy.get("trainable", True):
            kept[name] = [pattern for pattern in untrained if _may_meet(pattern, roles)]
        else:
            untrained += ["*"] if roles is None else roles
    return kept


def _may_meet(pattern: str, roles: Sequence[str] | None) -> bool:
    """Say whether one role may match both; a policy whose own roles have wildcards is not looked into."""
    return roles is None or any(WILDCARDS & set(role) or matches([pattern], role) for role in roles)


def _point_at_base(folder: Path, base: str | None, record: Mapping[str, object]) -> str:
    """Return where a LoRA's base is; a folder relative to where the run was started is written out in full.

    Raises:
        ConfigurationError: neither the adapter nor the run names a base.
    """
    base = base or cast("str | None", record.get("base_model"))
    if not base:
        raise ConfigurationError(f"the LoRA in {str(folder)!r} names no base: base_model_name_or_path is missing")
    here = Path(str(record.get("working_folder") or "."), base)
    if here.is_dir():
        base = str(here.resolve())
    file = folder / ADAPTER_CONFIG
    config = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.format(msgspec.json.encode(config | {"base_model_name_or_path": base})))
    return base
