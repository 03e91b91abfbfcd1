"""Learning from which of two rollouts of a task went better."""

from leyden_plugins.algorithms.preference.algorithms import DPO, Preference, Side, SimPO
from leyden_plugins.algorithms.preference.pairs import Pair, pairs_of

__all__ = ["DPO", "Pair", "Preference", "Side", "SimPO", "pairs_of"]
