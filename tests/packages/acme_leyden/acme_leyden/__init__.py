"""Offer Acme's algorithm and sink to Leyden."""

from collections.abc import Mapping

from leyden.hookspecs import Registry, hookimpl, lazy

leyden_api_version = 1

steps: list[int] = []
"""The steps that Acme was told about."""


@hookimpl
def leyden_register(registry: Registry) -> None:
    """Name both components."""
    registry.algorithm("acme", lazy("acme_leyden.algorithm:Acme"), summary="Acme's own estimator")
    registry.sink("acme", lazy("acme_leyden.sink:AcmeSink"), summary="metrics to Acme")


@hookimpl
def step_finished(step: int, metrics: Mapping[str, float]) -> None:
    """Remember the step."""
    steps.append(step)
