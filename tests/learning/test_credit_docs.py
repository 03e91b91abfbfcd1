"""The samples of `docs/credit.md` run, one after the other."""

import re
from pathlib import Path

import pytest

from leyden import mdp
from leyden_plugins.algorithms.rl import GRPO
from tests.learning.builders import POLICY, call, choice, group, records
from tests.running.small import SmallEngine

PAGE = Path(__file__).parents[2] / "docs" / "credit.md"


def test_the_samples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-nothing")
    tasks = [{"answer": number} for number in range(16)]
    names: dict[str, object] = {"tasks": tasks, "engine": SmallEngine(), "algorithm": GRPO(group_size=2)}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    one = records(call([1], choice([5, 6, 7])), call([2], choice([8]), span_id="s1", start_ns=1), total=2.0)
    found = mdp.transitions(one, [POLICY], credit=names["shared_by_length"])  # type: ignore[arg-type]  # a function
    assert [each.value for each in found] == [1.5, 0.5]
    rollouts = group(None, None).rollouts
    judged = names["shortest_right_answer"]({"answer": None}, rollouts)  # type: ignore[operator]  # a function
    assert judged == [1.0, 1.0]
