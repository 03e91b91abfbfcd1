"""The command `leyden serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from leyden_plugins.gateway.serve import ENGINE, serve_checkpoint


def serve_command(arguments: Sequence[str]) -> int:
    """Serve a folder until Ctrl-C; return the exit status.

    Raises:
        ConfigurationError: there is no model in the folder, or the port is taken.
    """
    parser = argparse.ArgumentParser(
        prog="leyden serve", description="Serve an export, a checkpoint or a Hugging Face folder on this machine."
    )
    parser.add_argument("folder", type=Path, help="what `leyden export` wrote, a run's checkpoint, or a model folder")
    parser.add_argument("--port", type=port_number, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--api-key", help="what clients must send; without it every process of this machine may call")
    parser.add_argument("--model-name", help="what clients call a single model; default its folder's name")
    parser.add_argument("--engine", default=ENGINE, help=f"an engine plugin (default {ENGINE})")
    options = parser.parse_args(arguments)
    serve_checkpoint(
        options.folder,
        model_name=options.model_name,
        api_key=options.api_key,
        port=options.port,
        engine=options.engine,
    )
    return 0


def port_number(text: str) -> int:
    """Read a TCP port.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)
