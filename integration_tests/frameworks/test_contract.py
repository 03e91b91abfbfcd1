"""Every framework, in every lane that holds it, in every mode it has: each call under its own role, rollout and parent,
and with the engine's own tokens. And the suite turns red where the path is broken on purpose.
"""

from __future__ import annotations

import pytest

from integration_tests.frameworks.contract import COLUMNS
from integration_tests.frameworks.contract_runs import FRAMEWORKS, run_contract, serving
from integration_tests.frameworks.drive import EPISODES
from integration_tests.frameworks.mutations import CLIENT, SERVER
from scripts.environments import lane

CASES = [(framework, name) for framework, names in FRAMEWORKS.items() for name in names]
FULL_LANE = "together"
FEWER_EPISODES = 15
"""In the other lanes, to save time; `make compatibility` runs all of them in every lane."""

CHEAPEST = ("langchain", "together")

EXPECTED = {
    "adapter_off": "misrouted",
    "keys_swapped": "wrong_rollout",
    "one_id_changed": "token_mismatches",
    "role_dropped": "wrong_role",
    "roles_swapped": "wrong_role",
    "span_lost": "open_spans",
    "spans_swapped": "wrong_parent",
    "stream_cut": "token_mismatches",
}
"""Mutation -> the column that must not be 0."""


@pytest.mark.parametrize(("framework", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_every_call_has_its_role_rollout_parent_and_tokens(control: str, framework: str, name: str) -> None:
    episodes = EPISODES if name == FULL_LANE else FEWER_EPISODES
    verdicts = run_contract(framework, lane(name), control, episodes=episodes)
    assert [fault for verdict in verdicts for fault in verdict.faults] == []
    assert all(verdict.calls >= episodes for verdict in verdicts)


@pytest.mark.parametrize("mutation", sorted(CLIENT | SERVER))
def test_a_broken_path_turns_the_contract_red(control: str, mutation: str) -> None:
    framework, name = CHEAPEST
    options = {"modes": ["async-stream"], "episodes": 4}
    if mutation in CLIENT:
        (verdict,) = run_contract(framework, lane(name), control, mutation=mutation, **options)  # type: ignore[arg-type]
    else:
        with serving(mutation) as broken:
            (verdict,) = run_contract(framework, lane(name), broken, **options)  # type: ignore[arg-type]
    assert verdict.counts[EXPECTED[mutation]] > 0, verdict.faults
    assert set(EXPECTED.values()) == set(COLUMNS)
