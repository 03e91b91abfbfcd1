"""What a learner has to say reaches the user before the first step."""

from pathlib import Path

from tests.running.small import CountingLearner, Notes, small_trainer


class TalkingLearner(CountingLearner):
    def notes(self) -> list[str]:
        return [f"training {sorted(self.steps)!r} takes up to 3 GiB"]


def test_a_learners_notes_are_told_before_anything_is_sampled_or_trained(tmp_path: Path) -> None:
    sink = Notes()
    small_trainer(tmp_path / "run", learner=TalkingLearner(), sinks=[sink]).fit(steps=1)
    assert sink.lines[0] == "training ['me'] takes up to 3 GiB"
    assert any(line.startswith("rewards of the first group") for line in sink.lines[1:])
