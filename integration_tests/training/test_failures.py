"""What goes wrong, and what the user is told."""

import subprocess
import sys
import textwrap

import pytest

import leyden
from integration_tests.training.plain_agent import MODEL, ROOT
from leyden.errors import ConfigurationError, RoleError, RolloutError
from leyden_plugins.engines.transformers import TransformersEngine


def test_a_role_that_nobody_has_is_an_error_that_lists_the_roles_there_are(app, make_trainer):
    policies = [leyden.Policy("me", roles=["main"]), leyden.Policy("other", roles=["wirter"])]
    trainer = make_trainer(app.solve, policies=policies)
    with pytest.raises(RoleError, match=r"trains role 'wirter', but no such role exists.*'main': 4"):
        trainer.fit(1)


def test_a_forgotten_return_stops_the_run_with_the_functions_name(app, make_trainer):
    with pytest.raises(ConfigurationError, match="plain_app:forgets_to_return: the agent returned None"):
        make_trainer(app.forgets_to_return).fit(1)


def test_nan_stops_the_run_with_the_rollouts_id(app, make_trainer):
    with pytest.raises(ConfigurationError, match=r"rollout 's1-t\d+-\d': a reward is a finite"):
        make_trainer(app.returns_nan).fit(1)


def test_an_agent_that_always_raises_stops_the_run_with_its_traceback(app, make_trainer):
    with pytest.raises(RolloutError, match="the app is broken"):
        make_trainer(app.raises).fit(1)


def test_an_agent_that_sometimes_raises_is_trained_on_its_failures_and_counted(app, make_trainer):
    summary = make_trainer(app.raises_sometimes, tasks_per_step=8).fit(2)
    assert summary["failures"].keys() == {"LookupError"}
    assert 0 < summary["failures"]["LookupError"] < summary["rollouts"] == 64


def test_a_reward_that_never_varies_changes_no_weight_bit_for_bit(app, make_trainer):
    engine = TransformersEngine(MODEL, seed=0)
    make_trainer(app.never_varies, engine=engine).fit(2)
    assert engine.sha256("me") == engine.sha256("base")


def test_a_dead_endpoint_of_an_untrained_role_is_the_agents_own_failure(app, make_trainer):
    trainer = make_trainer(app.untrained_role_is_down, policies=[leyden.Policy("me", roles=["main"])])
    with pytest.raises(RolloutError, match=r"all 16 rollouts of step 1 failed: {'APIConnectionError': 16}"):
        trainer.fit(1)


def test_a_run_folder_that_holds_a_run_is_not_overwritten(app, make_trainer):
    make_trainer(app.never_varies).fit(1)
    with pytest.raises(ConfigurationError, match="already holds a run"):
        make_trainer(app.never_varies).fit(1)


def test_a_run_that_is_not_there_cannot_be_resumed(app, make_trainer):
    with pytest.raises(ConfigurationError, match="holds no run to resume"):
        make_trainer(app.never_varies).fit(1, resume=True)


def test_a_script_without_a_main_guard_is_told_to_add_one(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(f"""
        import leyden
        from leyden_plugins.algorithms.rl import GRPO
        from leyden_plugins.engines.transformers import TransformersEngine

        def solve(task):
            return 1.0

        leyden.Trainer(
            solve, tasks=[1, 2], tasks_per_step=1, policies=[leyden.Policy("me")], run={str(tmp_path / "r")!r},
            engine=TransformersEngine({str(MODEL)!r}), algorithm=GRPO(group_size=2),
        ).fit(1)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode != 0
    assert 'if __name__ == "__main__":' in done.stderr
