"""The HTTP door of an engine: recording for the trainer, or plain serving for everybody else."""

from leyden_plugins.gateway.app import Limits
from leyden_plugins.gateway.gateway import HttpGateway
from leyden_plugins.gateway.serve import Endpoint, serve, serve_checkpoint, serve_folder

__all__ = ["Endpoint", "HttpGateway", "Limits", "serve", "serve_checkpoint", "serve_folder"]
