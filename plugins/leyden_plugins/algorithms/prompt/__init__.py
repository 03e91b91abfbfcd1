"""Automatic prompt optimisation: better system prompts for chosen roles of any app, weights or none.

`GEPA` evolves prompts by reflection, `BeamSearch` follows textual gradients. Both run on one `Search`, which counts the
budget, finds what was paid before in the store, and decides the winner; `Method` is what another one has to do.
"""

from leyden_plugins.algorithms.prompt.algorithm import PromptSearch
from leyden_plugins.algorithms.prompt.beam import BeamSearch
from leyden_plugins.algorithms.prompt.gepa import GEPA
from leyden_plugins.algorithms.prompt.record import Candidate, SearchRecord
from leyden_plugins.algorithms.prompt.reflection import Reflection, ReflectionError
from leyden_plugins.algorithms.prompt.search import Method, Search, Tried

__all__ = [
    "GEPA",
    "BeamSearch",
    "Candidate",
    "Method",
    "PromptSearch",
    "Reflection",
    "ReflectionError",
    "Search",
    "SearchRecord",
    "Tried",
]
