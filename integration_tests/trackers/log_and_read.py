"""Log a run of two parts to every tracker and print what each of them kept, as JSON. Runs where they are installed.

    WANDB_MODE=offline TRACKIO_DIR=FOLDER/trackio SOME_API_KEY=... python log_and_read.py FOLDER

The parts are those of a run that was killed after step 3 and resumed after its checkpoint of step 2.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from trackio.sqlite_storage import SQLiteStorage
from wandb.proto.wandb_internal_pb2 import Record

from leyden.plugins import load_plugins
from leyden.training.sinks import Sinks
from leyden_plugins.observers.wandb import WandbSink

RUN = Path(sys.argv[1]) / "runs" / "sql"
INFO = {"run_folder": str(RUN), "total_steps": 4}
BLOCK = 32768
"""Bytes of a block of wandb's file, which is a log of LevelDB's format behind a header of seven bytes."""


def metrics(step: int, *, part: int) -> dict[str, float]:
    """Return a step's metrics, which tell the part that logged them; one is never finite."""
    return {
        "reward/mean": step / 10 + part,
        "reward/role/writer": 0.25,
        "sql/loss/entropy": 1.0 / step,
        "gradient_norm": float("inf"),
    }


def log() -> None:
    """Log both parts, each with sinks of its own and from a thread, as a trainer does."""
    RUN.mkdir(parents=True)
    (RUN / "run.json").write_text(json.dumps({"algorithm": "GRPO(group_size=4)", "key": os.environ["SOME_API_KEY"]}))
    summary = {
        **INFO,
        "steps": 4,
        "train_seconds": 1.5,
        "checkpoint": "checkpoints/step-000004",
        "evaluations": {"before": {"reward": {"mean": 0.125}}, "after": {"reward": {"mean": 0.875}}},
    }
    for part, steps in enumerate([(1, 2, 3), (3, 4)]):
        sinks = Sinks(["tensorboard", "trackio", WandbSink(tags=["mine"])], load_plugins())

        def fit(sinks: Sinks = sinks, part: int = part, steps: tuple[int, ...] = steps) -> None:
            sinks.notice(f"before part {part}")
            sinks.run_started(INFO)
            for step in steps:
                sinks._each("step_finished", step, metrics(step, part=part))
            sinks.notice(f"after part {part}")
            if part:
                sinks.run_finished(summary)
            else:
                close(sinks)

        thread = threading.Thread(target=fit)
        thread.start()
        thread.join()
        time.sleep(1.1)  # wandb names its folders by the second


def close(sinks: Sinks) -> None:
    """End a part that never came to its end, as the process's own end would."""
    board, track, weights = sinks._sinks
    board._writer.close()
    track._run.finish()
    weights._run.finish(exit_code=1)


def of_tensorboard() -> dict[str, object]:
    """Read scalars and texts as TensorBoard does."""
    events = EventAccumulator(str(RUN / "tensorboard"), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
    tags = events.Tags()
    texts = {tag: [one.tensor_proto.string_val[0].decode() for one in events.Tensors(tag)] for tag in tags["tensors"]}
    scalars = {tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in tags["scalars"]}
    return {"scalars": scalars, "texts": texts}


def of_trackio() -> dict[str, object]:
    """Read every row of every run of the project."""
    (name,) = SQLiteStorage.get_runs("leyden")
    rows = SQLiteStorage.get_logs("leyden", name)
    return {
        "name": name,
        "rows": rows,
        "config": SQLiteStorage.get_run_config("leyden", name),
    }


def of_wandb() -> dict[str, object]:
    """Read the files that `wandb sync` would send."""
    found: dict[str, list[object]] = {"ids": [], "rows": [], "summary": [], "tags": [], "config": [], "project": []}
    for path in sorted(RUN.glob("wandb/offline-run-*/run-*.wandb"), key=lambda one: one.stat().st_mtime_ns):
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found["ids"].append(record.run.run_id)
                found["tags"].append(list(record.run.tags))
                found["project"].append(record.run.project)
                found["config"].append({one.key: one.value_json for one in record.run.config.update})
            elif kind == "history":
                found["rows"].append(items(record.history.item))
            elif kind == "summary":
                found["summary"].append(items(record.summary.update))
    return dict(found)


def items(pairs: object) -> Mapping[str, object]:
    return {
        (one.key or "/".join(one.nested_key)): json.loads(one.value_json)
        for one in pairs  # type: ignore[attr-defined] # a repeated field
    }


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log of LevelDB's format (its doc/log_format.md)."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


if __name__ == "__main__":
    log()
    print(json.dumps({"tensorboard": of_tensorboard(), "trackio": of_trackio(), "wandb": of_wandb()}))
